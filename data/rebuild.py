"""A dataset that stands, held against one that other settings would make of the same traces."""

from configs.errors import UnusableInput
from configs.progress import Display
from configs.schema import Data
from data.asking import NOBODY, Models
from data.build import read_generation_ledger
from data.grading import require_judge
from data.judge import compare, judge_run
from data.processes import num_cores
from data.stage import Context, exclusive
from data.store import read_rollup
from data.what_if import Difference


def compare_with_built(context: Context, view: str, models: Models = NOBODY) -> tuple[tuple[str, str], Difference]:
    """The two views' names, and what a build with the recipe's settings, or its view of that name, would change. What new
    settings ask of the traces, of the base student or of a judge is asked and kept; the dataset stays as it is.

    Raises:
        UnusableInput: no dataset yet, no view of that name, a damaged file, or a build is at it: both would ask and pay.
        Refused: as data.judge.judge_run.
    """
    current, other = built_settings(context), _with_view(context.recipe.data, view)
    read_generation_ledger(context.run)
    for settings in (current, other):
        require_judge(context.run, settings.judging, models.judge)
    with exclusive(context.run, "data"), Display("what-if", "segments", context.console) as display:
        found, other_found = (
            judge_run(context.run, asked, num_workers=num_cores(), tell=display.show, folders=context.folders, models=models)
            for asked in (current, other)
        )
    return (f"now: {current.view.name}", other.view.name), compare(found, current, other_found, other)


def built_settings(context: Context) -> Data:
    """Those that the dataset's manifest names. Raises UnusableInput when there is none."""
    rollup = read_rollup(context.run.dataset)
    if rollup is None or "settings" not in rollup.counts:
        raise UnusableInput(f"{context.run.dataset}: no dataset to compare with yet; run: tracestill data build")
    return Data.model_validate(rollup.counts["settings"])


def _with_view(settings: Data, name: str) -> Data:
    if not name:
        return settings
    try:
        return settings.model_copy(update={"view": settings.view_named(name)})
    except ValueError as error:
        raise UnusableInput(f"--view: {error}") from error
