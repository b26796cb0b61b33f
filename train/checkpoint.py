"""Training state on disk: small, whole, and there completely or not at all.

Only what is trained and AdamW's moments change, so a checkpoint holds those by parameter name in float32, whatever the
number of ranks or the ZeRO stage: one that was written by two ranks under ZeRO-3 continues in one process. Everything
else follows from the step number, because the order of traces, the learning rate and dropout's noise are functions of
(seed, step). DeepSpeed's own checkpoints are pickles, tied to their layout.

    checkpoints/step-00000120/state.safetensors   parameters, exp_avg, exp_avg_sq
    checkpoints/step-00000120/state.json          counters, identity, sha256 of the former
    checkpoints/best-00000100/                    an adapter in PEFT's layout, the best one that a checkpoint knows of; files.json
                                                  has the sha256 of each of its files
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from configs.errors import UnusableInput
from data.checksum import checked_json, parse_checked
from data.store import write_bytes
from student.adapter_files import publish_folder, write_tensors
from train.step import OptimizerState
from train.tracking import Metrics

logger = logging.getLogger(__name__)

SCHEMA = 2
TENSORS, COUNTERS, BEST_FILES = "state.safetensors", "state.json", "files.json"

Identity = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Best:
    """The best validation so far: its metric, and the step after which it was measured."""

    value: float
    step: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is, and all that its next decisions depend on.

    step: optimizer steps taken, skipped ones among them. tokens and supervised_tokens: trained so far. group: ranks that the rows
    were grouped for at the first start, which later ones keep to. skipped: steps that were not applied, non_finite of them
    because loss or gradient was no number. recent_norms: of the last steps applied. validations_without_better: since `best`.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    restarts: int = 0
    group: int = 1
    skipped: int = 0
    non_finite: int = 0
    recent_norms: tuple[float, ...] = ()
    best: Best | None = None
    validations_without_better: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """unlogged: the metrics of the last step, where a stop came before its validation: they are logged together."""

    progress: Progress
    state: OptimizerState
    unlogged: Metrics | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, identity: Identity, *, kept: int) -> Path:
    """Writes checkpoints/step-N durably, then removes all but the newest `kept`, and best adapters that none of them knows of.
    Rank 0 only."""
    final = folder / step_name(checkpoint.progress.step)
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = checkpoint.state
    groups = {"parameters": state.parameters, **state.moments}
    write_tensors(
        temporary / TENSORS, {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
    )
    counters = {
        "schema": SCHEMA,
        "progress": asdict(checkpoint.progress),
        "unlogged": checkpoint.unlogged,
        "optimizer_steps": state.steps,
        "identity": dict(identity),
        "sha256": sha256(temporary / TENSORS),
    }
    (temporary / COUNTERS).write_bytes(checked_json(counters, indent=1))
    publish_folder(temporary, final)
    for old in [path for path in saved_steps(folder) if path <= final][:-kept]:
        shutil.rmtree(old)
    remove_worse(folder)
    return final


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def best_folder(folder: Path, step: int) -> Path:
    """Where the adapter of the best validation, after `step` steps, lies."""
    return folder / f"best-{step:08d}"


def remove_worse(folder: Path) -> None:
    """Best adapters but those that a checkpoint knows of: each may be the one to go back to. One that was written after the
    newest goes too: its steps are about to be taken again, and on a GPU they may come out otherwise."""
    kept = {best_folder(folder, step) for path in saved_steps(folder) if (step := _best_step(path)) is not None}
    for path in folder.glob("best-*"):
        if path not in kept:
            shutil.rmtree(path)


def _best_step(path: Path) -> int | None:
    """What a checkpoint says of the best adapter, without a look at its tensors; None too where it cannot be read."""
    try:
        best = json.loads((path / COUNTERS).read_bytes())["progress"]["best"]
        return None if best is None else int(best["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def seal_best(folder: Path) -> None:
    """The folder says what its files hold: days may pass until it is the adapter."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != BEST_FILES}
    write_bytes(folder / BEST_FILES, checked_json(files))


def check_best(copy: Path, folder: Path) -> None:
    """The copy of a best adapter has the bytes that were sealed. Raises UnusableInput where it has not."""
    files = parse_checked(folder / BEST_FILES, (folder / BEST_FILES).read_bytes())
    for name, expected in files.items():
        if not (copy / name).is_file() or sha256(copy / name) != expected:
            raise UnusableInput(
                f"{folder / name}: not the bytes that were written; restore it, or remove the folder and the checkpoints after "
                "its step, and the same command trains on from there"
            )


def set_aside(folder: Path, progress: Progress) -> None:
    """Checkpoints after `progress`, from which a start went back: they are damaged. Not removed, because a disk that could not
    be read may be well tomorrow; and not counted any more, or the next ones would be taken for old."""
    for path in saved_steps(folder):
        if path.name > step_name(progress.step):
            damaged = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(damaged, ignore_errors=True)
            path.rename(damaged)
            logger.warning("%s is now %s, and may be removed", path.name, damaged.name)


def saved_steps(folder: Path) -> list[Path]:
    """Committed checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_latest(folder: Path, identity: Identity) -> Checkpoint | None:
    """The newest checkpoint whose bytes are what was written; None when there is none at all.

    Raises:
        UnusableInput: when it was made by another configuration (each difference is named), or when all are damaged.
    """
    damaged = []
    for path in reversed(saved_steps(folder)):
        try:
            counters = parse_checked(path / COUNTERS, (path / COUNTERS).read_bytes())
            intact = sha256(path / TENSORS) == counters["sha256"]
        except (OSError, UnusableInput, KeyError):
            _refuse_first_schema(path)
            intact, counters = False, {}
        if not intact:
            logger.warning("checkpoint %s is damaged; trying the one before it", path.name)
            damaged.append(path.name)
            continue
        _refuse_another_run(path, counters, identity)
        state = _read_state(path / TENSORS, counters["optimizer_steps"])
        return Checkpoint(_progress(counters["progress"]), state, counters["unlogged"])
    if damaged:
        raise UnusableInput(
            f"{folder}: every checkpoint is damaged ({', '.join(damaged)}); remove the folder to train from the start"
        )
    return None


def _progress(stored: Mapping[str, Any]) -> Progress:
    best = stored["best"]
    converted = {"best": None if best is None else Best(**best), "recent_norms": tuple(stored["recent_norms"])}
    return Progress(**{**stored, **converted})


def _read_state(path: Path, steps: int) -> OptimizerState:
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return OptimizerState(groups.pop("parameters"), groups, steps)


def _refuse_first_schema(path: Path) -> None:
    """Schema 1 had no checksum to hold: it is old, not damaged."""
    try:
        schema = json.loads((path / COUNTERS).read_bytes()).get("schema")
    except (OSError, ValueError, AttributeError):
        return
    if schema == 1:
        raise _of_another_schema(path, schema)


def _of_another_schema(path: Path, schema: object) -> UnusableInput:
    return UnusableInput(
        f"checkpoint {path.name}: schema {schema}, expected {SCHEMA}; finish the training with the release that began it, or "
        f"remove {path.parent} to train afresh"
    )


def _refuse_another_run(path: Path, counters: Mapping[str, Any], identity: Identity) -> None:
    if counters.get("schema") != SCHEMA:
        raise _of_another_schema(path, counters.get("schema"))
    stored = counters["identity"]
    if stored == dict(identity):
        return
    keys = sorted(key for key in stored.keys() | identity.keys() if stored.get(key) != identity.get(key))
    differences = "; ".join(f"{key} was {stored.get(key)!r}, is {identity.get(key)!r}" for key in keys)
    raise UnusableInput(
        f"checkpoint {path.name} belongs to another configuration: {differences}; restore it or use another --run-dir"
    )


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed process was still writing."""
    for path in folder.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
