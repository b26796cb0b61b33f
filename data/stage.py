"""What every stage of a run has in common: its inputs are there, it is not already done, nobody else is at it, and what
it made is sealed. The stages themselves live in their packages; tracestill.py puts them in order."""

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from configs.errors import Busy, UnusableInput
from configs.load import Loaded, fingerprint
from configs.progress import Count, Display
from configs.schema import Recipe
from data.run_config import settle
from data.store import (
    ROLLUP,
    Rollup,
    RunFolder,
    input_hashes,
    is_complete,
    read_rollup,
    seal,
    verify_files,
    write_bytes,
)

log = logging.getLogger(__name__)

# What a stage made or reads is hashed again before it is trusted, up to this size (1.5 GB/s); above it, whoever reads a
# file does.
VERIFIED_AT_ONCE_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Context:
    """Everything a stage is told: the recipe, the run folder, and the command-line words that name them again for ranks."""

    loaded: Loaded
    run: RunFolder
    config: str
    overrides: tuple[str, ...]
    console: Console

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def folders(self) -> tuple[Path, Path]:
        """Where relative paths of the recipe are looked up, in order."""
        return (self.loaded.folder, Path.cwd())

    def words(self, command: str) -> list[str]:
        """The command line of one of this run's ranks."""
        overrides = [word for override in self.overrides for word in ("-s", override)]
        return [command, self.config, *overrides, "--run-dir", str(self.run.root)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage made: files to seal, and counts for its manifest (JSON values)."""

    files: Sequence[Path]
    counts: Mapping[str, object] = field(default_factory=dict)
    summary: str = ""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the pipeline. `depends` name folders whose manifests are its inputs; `identity` gives the values that,
    besides those, decide its result (their fingerprint is sealed). `together`: what any number of processes may be at in
    one run folder, before one of them acts and seals. admit: raises when this configuration must not touch what the folder
    holds of an unfinished or outdated stage."""

    name: str
    unit: str
    folder: Callable[[RunFolder], Path]
    depends: tuple[str, ...]
    identity: Callable[[Context], dict[str, Any]]
    act: Callable[[Context, Callable[[Count], None]], Outcome]
    plan: Callable[[Context], str]
    together: Callable[[Context, Callable[[Count], None]], None] | None = None
    admit: Callable[[Context], None] = lambda context: None


def run_stage(stage: Stage, context: Context) -> Rollup:
    """The stage is complete and sealed when this returns; done at once when it already was.

    Raises:
        UnusableInput: an input stage has not finished.
        Busy: another process is at this stage.
    """
    run, folder = context.run, stage.folder(context.run)
    inputs = inputs_of(stage, context)
    for name in stage.depends:
        _verify_if_small(run, read_rollup(run.root / name))
    identity = fingerprint(stage.identity(context))
    if (rollup := _complete(stage, context, identity, inputs)) is not None:
        return rollup
    stage.admit(context)
    with folder_stays(run), Display(stage.name, stage.unit, context.console) as display:
        started = time.perf_counter() - _seconds_so_far(run, stage.name, identity)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if stage.together is not None:
                with exclusive(run, stage.name, waits=True):
                    if not is_complete(run, folder, fingerprint=identity, inputs=inputs):
                        (folder / ROLLUP).unlink(missing_ok=True)  # of what is no longer there: it would hide what is new
                stage.together(context, display.show)
            with exclusive(run, stage.name, waits=stage.together is not None):
                if stage.together and is_complete(run, folder, fingerprint=identity, inputs=inputs):
                    outcome = None  # somebody who was at it with us was quicker
                else:
                    settle(context.loaded, run, stage.name)
                    outcome = stage.act(context, display.show)
                    rollup = seal(
                        run, folder, stage=stage.name, fingerprint=identity, inputs=inputs, files=outcome.files,
                        counts=outcome.counts, seconds=time.perf_counter() - started,
                    )  # fmt: skip
        except BaseException:
            if run.config.is_file():
                with contextlib.suppress(OSError):  # the disk may be what went wrong
                    _note_seconds(run, stage.name, identity, time.perf_counter() - started)
            raise
    if outcome is None or rollup is None:
        rollup = read_rollup(folder)
        assert rollup is not None
    _seconds_file(run, stage.name).unlink(missing_ok=True)
    summary = "sealed by another process" if outcome is None else outcome.summary
    context.console.print(f"[bold]{stage.name:<9}[/bold] {rollup.seconds:6.1f} s  {summary}", highlight=False)
    return rollup


@contextlib.contextmanager
def folder_stays(run: RunFolder) -> Iterator[None]:
    """A run folder that goes away meanwhile is one line."""
    try:
        yield
    except OSError as error:
        if run.config.is_file():
            raise
        raise UnusableInput(
            f"{run.root}: the run folder is gone ({error.strerror}); bring it back, then give the same command"
        ) from error


def completed(stage: Stage, context: Context) -> Rollup | None:
    """Its roll-up where the stage is done for this recipe and these inputs. Raises UnusableInput when an input is not there."""
    return _complete(stage, context, fingerprint(stage.identity(context)), inputs_of(stage, context))


def is_current(stage: Stage, context: Context) -> bool:
    """Whether what the stage has sealed is what this configuration makes of the inputs that are there. True as well where that
    cannot be told from here: an input or a model is on another machine."""
    try:
        identity, inputs = fingerprint(stage.identity(context)), inputs_of(stage, context)
    except UnusableInput:
        return True
    return is_complete(context.run, stage.folder(context.run), fingerprint=identity, inputs=inputs)


def inputs_of(stage: Stage, context: Context) -> dict[str, str]:
    """Hashes of the manifests of the stages that it depends on. Raises UnusableInput when one is not there."""
    return input_hashes(context.run, [_input(context.run, name, stage) for name in stage.depends])


def _complete(stage: Stage, context: Context, identity: str, inputs: Mapping[str, str]) -> Rollup | None:
    """The roll-up of a stage that has nothing to do."""
    folder = stage.folder(context.run)
    if not is_complete(context.run, folder, fingerprint=identity, inputs=inputs):
        return None
    rollup = read_rollup(folder)
    assert rollup is not None
    _verify_if_small(context.run, rollup)
    context.console.print(
        f"[dim]{stage.name:<9} already complete ({rollup.seconds:.0f} s when it ran): skipped[/dim]", highlight=False
    )
    return rollup


def _verify_if_small(run: RunFolder, rollup: Rollup | None) -> None:
    if rollup is not None and sum(rollup.sizes.values()) <= VERIFIED_AT_ONCE_BYTES:
        verify_files(run, rollup)


def _input(run: RunFolder, name: str, stage: Stage) -> Path:
    path = run.root / name / ROLLUP
    if not path.is_file():
        raise UnusableInput(
            f"{stage.name}: its input {path} does not exist; run the stage that makes {name}/ first, or: tracestill run"
        )
    return path


# --- seconds of a stage that failed or was asked to stop count too (those before a SIGKILL are not known) -----------


def _seconds_file(run: RunFolder, stage: str) -> Path:
    return run.cache / f"{stage}.seconds.json"


def _seconds_so_far(run: RunFolder, stage: str, identity: str) -> float:
    try:
        noted = json.loads(_seconds_file(run, stage).read_text())
        return float(noted["seconds"]) if noted["identity"] == identity else 0.0
    except (OSError, ValueError, KeyError):
        return 0.0


def _note_seconds(run: RunFolder, stage: str, identity: str, seconds: float) -> None:
    write_bytes(_seconds_file(run, stage), json.dumps({"identity": identity, "seconds": seconds}).encode())


@contextmanager
def exclusive(run: RunFolder, stage: str, *, waits: bool = False) -> Iterator[None]:
    """Nobody else runs this stage in this folder meanwhile; whoever does is waited for, or is a reason to refuse. The kernel
    drops the lock with the process, however it ends; where a file system has no locks, the commit protocol alone protects
    the run."""
    path = run.root / f".{stage}.lock"
    with _open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise Busy(
                f"{run.root}: the {stage} stage {Busy.says} (process {file.read() or '?'}); wait for it or end it"
            ) from error
        except OSError:
            log.warning("%s: this file system has no locks; do not start the stage twice", run.root)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _open_lock(path: Path) -> IO[str]:
    path.touch()
    return path.open("r+")
