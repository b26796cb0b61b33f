"""The figures of a run as one typed object: what `tracestill report --json` prints and the page is drawn from."""

from typing import TypedDict

from configs.errors import UnusableInput
from data.ledger import read_ledger
from data.store import RunFolder, read_json, read_rollup

MODELS = ("teacher", "base", "student", "export")
FIGURES = ("accuracy", "by_family", "hallucination_rate", "abstention_rate", "omniscience_index", "reasoning_tokens_per_correct")
STAGES = ("prompts", "generate", "data", "train", "evaluate", "export")


class ModelFigures(TypedDict):
    """One evaluated model. Rates are in [0, 1], the index in [-100, 100]; null where there was nothing to measure."""

    accuracy: float | None
    by_family: dict[str, float]
    hallucination_rate: float | None
    abstention_rate: float | None
    omniscience_index: float | None
    reasoning_tokens_per_correct: float | None


class LedgerFigures(TypedDict):
    """Counts of traces; requested = completed + failed + pending. kept, rejected and unjudged are null before a dataset is
    built, and add up to completed afterwards."""

    requested: int
    completed: int
    failed: int
    pending: int
    kept: int | None
    rejected: int | None
    unjudged: int | None
    failed_by_reason: dict[str, int]
    rejected_by_reason: dict[str, int]
    unjudged_by_reason: dict[str, int]


class Summary(TypedDict):
    """`tracestill report --json`. seconds: of each finished stage, from its manifest."""

    teacher: ModelFigures | None
    base: ModelFigures | None
    student: ModelFigures | None
    export: ModelFigures | None
    ledger: LedgerFigures | None
    seconds: dict[str, float | None]


def report_json(run: RunFolder) -> Summary:
    """The summary of a run folder as it stands. Raises UnusableInput for a damaged file."""
    teacher, base, student, export = (model_figures(run, name) for name in MODELS)
    return Summary(
        teacher=teacher, base=base, student=student, export=export, ledger=ledger_figures(run), seconds=stage_seconds(run)
    )


def model_figures(run: RunFolder, name: str) -> ModelFigures | None:
    path = run.evaluation / f"{name}.json"
    if not path.is_file():
        return None
    try:
        metrics = read_json(path)["metrics"]
        return ModelFigures(**{figure: metrics[figure] for figure in FIGURES})  # type: ignore[typeddict-item]
    except (KeyError, TypeError) as error:
        raise UnusableInput(f"{path}: no {error} in it; delete the file and run: tracestill evaluate") from error


def ledger_figures(run: RunFolder) -> LedgerFigures | None:
    if read_rollup(run.prompts) is None:
        return None
    ledger, viewed = read_ledger(run), read_rollup(run.dataset) is not None
    return LedgerFigures(
        requested=ledger.requested,
        completed=ledger.completed,
        failed=ledger.failed,
        pending=ledger.pending,
        kept=ledger.kept if viewed else None,
        rejected=ledger.rejected if viewed else None,
        unjudged=ledger.unjudged if viewed else None,
        failed_by_reason=ledger.failed_by_reason,
        rejected_by_reason=ledger.rejected_by_reason,
        unjudged_by_reason=ledger.unjudged_by_reason,
    )


def stage_seconds(run: RunFolder) -> dict[str, float | None]:
    """Seconds of every stage of the pipeline, null while it has not finished; a resumed stage counts all its attempts."""
    seconds: dict[str, float | None] = dict.fromkeys(STAGES)
    for folder in (run.prompts, run.traces, run.dataset, run.checkpoints, run.evaluation, run.export):
        if (rollup := read_rollup(folder)) is not None:
            seconds[rollup.stage] = rollup.seconds
    return seconds


# --- figures as text, the same in the table and on the page -------------------------------------------------------------


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def count(value: int | float) -> str:
    """Thousands apart, as the page writes them: 12,345."""
    return f"{value:,.0f}"
