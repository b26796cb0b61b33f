"""What the words of a command line name: a recipe and its run folder, to work in or only to look at; and stages, run there or
described.

Whatever takes time to import is imported by the function that needs it: a recipe is judged before a stage is imported, so that
a typo answers in half a second, without torch.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from configs.errors import UnusableInput

if TYPE_CHECKING:
    from configs.load import Loaded
    from data.stage import Context, Stage
    from data.store import RunFolder


class Invocation(NamedTuple):
    """CONFIG, the values of -s, and --run-dir, as they were given."""

    config: str
    overrides: Sequence[str] | None = None
    run_dir: Path | None = None

    def load(self) -> "Loaded":
        """Raises UnusableInput, as all that is below does, where the recipe cannot be used."""
        from configs.load import load_recipe

        return load_recipe(self.config, self.overrides or [])

    def open(self) -> "Context":
        """The run folder is there, made if need be, and is this recipe's."""
        from configs.logging import configure_logging
        from data.run_config import open_run

        configure_logging()
        loaded = self.load()
        return self._context(loaded, open_run(loaded, self.run_dir))

    def look(self) -> "Context":
        """The run folder as it would be; nothing is touched, and it need not be there."""
        from data.store import RunFolder

        loaded = self.load()
        return self._context(loaded, RunFolder(self.folder_of(loaded).resolve()))

    def folder_of(self, loaded: "Loaded") -> Path:
        return self.run_dir or Path("runs") / loaded.recipe.name

    def _context(self, loaded: "Loaded", run: "RunFolder") -> "Context":
        from data.stage import Context

        return Context(loaded, run, str(loaded.path), tuple(self.overrides or ()), Console())


def existing_run(path: Path) -> "RunFolder":
    """Raises UnusableInput when `path` is not the folder of a run."""
    from data.store import RunFolder

    folder = RunFolder(path.resolve())
    if not folder.config.is_file():
        raise UnusableInput(f"{path}: not a run folder (no config.yaml); make one with: tracestill run RECIPE --run-dir {path}")
    return folder


def print_plan(stages: Callable[[], Sequence["Stage"]], named: Invocation) -> None:
    """Prints what would be done; touches nothing."""
    from data.store import read_rollup

    context = named.look()
    for stage in stages():
        folder = stage.folder(context.run)
        done = "  (a finished one is there)" if read_rollup(folder) is not None else ""
        print(f"{stage.name:<9} -> {folder}{done}\n          {stage.plan(context)}")


def run_one(stage: Callable[[], "Stage"], named: Invocation, *, dry_run: bool) -> None:
    """One stage, or what it would do. stage: called once the recipe is known to be good."""
    if dry_run:
        print_plan(lambda: [stage()], named)
    else:
        context = named.open()
        from data.stage import run_stage

        run_stage(stage(), context)
