"""What every stage of a run has in common: its inputs are there, it is not already done, nobody else is at it, and what
it made is sealed. The stages themselves live in their packages; tracestill.py puts them in order."""

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import ValidationError
from rich.console import Console

from configs.errors import UnusableInput
from configs.load import Loaded, describe, fingerprint
from configs.progress import Count, Display
from configs.schema import Recipe
from configs.training import FREE_WHILE_TRAINING
from data.checksum import checked_text
from data.store import (
    ROLLUP,
    Rollup,
    RunFolder,
    code_revision,
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
# What may change under a run folder without making another run of it: where and how fast, not what. No layout changes a
# token's identity: a run that began on two nodes goes on with four, from shards or from the checkpoint. A dataset is a view
# of the traces, which may be taken again; its own manifest says with what settings.
FREE = (
    "data", "slurm", "plan", "teacher.hardware", "teacher.layout", "teacher.experts", "teacher.engine.processes",
    "teacher.engine.batch_size", "teacher.engine.cache_bytes", "teacher.engine.prepared", "teacher.engine.timeout_s",
    "teacher.engine.concurrency", "teacher.engine.base_urls", "teacher.engine.servers_file", "teacher.engine.stream",
    "teacher.engine.deadline_s", "teacher.engine.attempts", "teacher.engine.health_s", "teacher.engine.drain_s",
    "teacher.engine.price_input_per_million", "teacher.engine.price_output_per_million", "teacher.engine.api_key_env",
    "teacher.engine.ca_file", "generate.segment_traces", "generate.segment_seconds", "generate.checkpoint_tokens",
    "generate.lease_ttl_s", "generate.drain_seconds", "generate.budget", "generate.canary", "generate.retry_failed",
    "generate.accept_code_change", *(f"train.{name}" for name in FREE_WHILE_TRAINING),
)  # fmt: skip
RETIRED = ("train.traces_per_step", "train.tokens_per_micro_batch")
"""Settings of releases before rows were packed."""


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
        UnusableInput: an input stage has not finished, or another process is at this stage.
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
            raise UnusableInput(
                f"{run.root}: the {stage} stage is already running here (process {file.read() or '?'}); wait for it or end it"
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


# --- the run folder ----------------------------------------------------------------------------------------------


def open_run(loaded: Loaded, run_dir: Path | None) -> RunFolder:
    """The run folder, made if need be, with config.yaml written first. A folder that holds anything made by another
    configuration is refused; one in which nothing was made yet (a typo in the first try) takes the new one.

    Raises:
        UnusableInput: unwritable folder, or the first difference between its configuration and this one.
    """
    if run_dir is not None and str(run_dir) in ("", "."):
        raise UnusableInput("--run-dir is empty or the working directory itself; name a folder of its own, for example runs/mine")
    run = RunFolder((run_dir or Path("runs") / loaded.recipe.name).resolve())
    wanted = loaded.recipe.model_dump(mode="json")
    # Looked at again: somebody who starts with us may have written it in between.
    if not run.config.is_file() and _holds_something(run.root) and not run.config.is_file():
        raise UnusableInput(
            f"run directory {run.root}: not empty, and without the config.yaml of a run; "
            "choose an empty or new --run-dir, or restore config.yaml"
        )
    if run.config.is_file():
        if not os.access(run.root, os.W_OK):
            raise UnusableInput(f"run directory {run.root}: not writable; choose another --run-dir or change its permissions")
        difference = _difference(run, wanted)
        if difference is None:
            return run
        if any(run.root.glob("*/*.arrow")) or any(run.root.glob("*/manifest.json")):
            key, was, now = difference
            raise UnusableInput(
                f"run directory {run.root}: was made with {key} = {was!r}, this recipe says {now!r}; "
                f"use another --run-dir, or -s {key}={was}"
            )
        log.warning("%s holds nothing made with its old configuration yet; it is replaced", run.config)
    header = {"code_revision": code_revision(), "fingerprint": fingerprint(wanted)}
    text = f"# Resolved configuration of this run; written once.\n{yaml.safe_dump(header | {'recipe': wanted}, sort_keys=False)}"
    try:
        write_bytes(run.config, checked_text(text))
    except OSError as error:
        raise UnusableInput(
            f"run directory {run.root}: cannot be written ({error.strerror}); choose another --run-dir"
        ) from error
    return run


def _holds_something(folder: Path) -> bool:
    """Whether anything but a killed attempt's half-written config.yaml lies there."""
    return folder.is_dir() and any(not path.name.startswith(".config.yaml.") for path in folder.iterdir())


def _difference(run: RunFolder, wanted: dict[str, Any]) -> tuple[str, Any, Any] | None:
    try:
        stored = dict(yaml.safe_load(run.config.read_text())["recipe"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UnusableInput(f"{run.config}: not a configuration written by tracestill; use another --run-dir") from error
    return first_difference(without_free(_as_today(stored)), without_free(wanted))


def _as_today(stored: dict[str, Any]) -> dict[str, Any]:
    """What is free left out, and settings that came after it was written at their defaults: they are how the run was made.
    RETIRED ones are left out; whoever trains that run anew is told by its checkpoint what differs.

    Raises UnusableInput for one that this release does not know."""
    try:
        return Recipe.model_validate(without(without_free(stored), RETIRED)).model_dump(mode="json")
    except ValidationError as error:
        raise UnusableInput(
            f"config.yaml of the run, as another release wrote it: {describe(error)}; use that release, or another --run-dir"
        ) from error


def without_free(value: Any) -> Any:
    """The configuration without what is free to change."""
    return without(value, FREE)


def without(value: Any, left_out: Collection[str], path: str = "") -> Any:
    """The configuration without the settings of these dotted names."""
    if not isinstance(value, dict):
        return value
    inside = {key: f"{path}.{key}" if path else str(key) for key in value}
    return {key: without(value[key], left_out, dotted) for key, dotted in inside.items() if dotted not in left_out}


def first_difference(left: Any, right: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first leaf that differs, as (dotted key, left value, right value); None when equal."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in [*left, *(key for key in right if key not in left)]:
            found = first_difference(left.get(key), right.get(key), f"{path}.{key}" if path else str(key))
            if found is not None:
                return found
        return None
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            if (found := first_difference(one, other, f"{path}.{index}")) is not None:
                return found
        return None
    return None if left == right else (path, left, right)
