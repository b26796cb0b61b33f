"""Training state on disk: small, whole, and there completely or not at all.

Only the adapter and AdamW's moments change, so a checkpoint holds those by parameter name in float32, whatever the
number of ranks or the ZeRO stage: one that was written by two ranks under ZeRO-3 continues in one process. Everything
else follows from the step number, because the order of traces, the learning rate and dropout's noise are functions of
(seed, step). DeepSpeed's own checkpoints are pickles, tied to their layout.

    checkpoints/step-00000120/state.safetensors   parameters, exp_avg, exp_avg_sq
    checkpoints/step-00000120/state.json          counters, identity, sha256 of the former
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
from safetensors.torch import load_file, save_file

from configs.errors import UnusableInput
from student.lora import publish_folder
from train.step import OptimizerState

logger = logging.getLogger(__name__)

SCHEMA = 1
KEPT_CHECKPOINTS = 2  # the newest may be damaged by the disk, never by a kill
TENSORS, COUNTERS = "state.safetensors", "state.json"

Identity = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Progress:
    """Counters of a run. step: optimizer steps taken. tokens and supervised_tokens: trained so far, padding left out."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    progress: Progress
    state: OptimizerState


def save_checkpoint(folder: Path, checkpoint: Checkpoint, identity: Identity) -> Path:
    """Writes checkpoints/step-N durably, then removes all but the newest KEPT_CHECKPOINTS. Rank 0 only."""
    final = folder / f"step-{checkpoint.progress.step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = checkpoint.state
    groups = {"parameters": state.parameters, **state.moments}
    save_file(
        {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}, temporary / TENSORS
    )
    counters = {
        "schema": SCHEMA,
        "progress": asdict(checkpoint.progress),
        "optimizer_steps": state.steps,
        "identity": dict(identity),
        "sha256": sha256(temporary / TENSORS),
    }
    (temporary / COUNTERS).write_text(json.dumps(counters, indent=1))
    publish_folder(temporary, final)
    for old in saved_steps(folder)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)
    return final


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
            counters = json.loads((path / COUNTERS).read_text())
            intact = sha256(path / TENSORS) == counters["sha256"]
        except (OSError, ValueError, KeyError):
            intact, counters = False, {}
        if not intact:
            logger.warning("checkpoint %s is damaged; trying the one before it", path.name)
            damaged.append(path.name)
            continue
        _refuse_another_run(path, counters, identity)
        return Checkpoint(Progress(**counters["progress"]), _read_state(path / TENSORS, counters["optimizer_steps"]))
    if damaged:
        raise UnusableInput(
            f"{folder}: every checkpoint is damaged ({', '.join(damaged)}); remove the folder to train from the start"
        )
    return None


def _read_state(path: Path, steps: int) -> OptimizerState:
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return OptimizerState(groups.pop("parameters"), groups, steps)


def _refuse_another_run(path: Path, counters: Mapping[str, Any], identity: Identity) -> None:
    if counters.get("schema") != SCHEMA:
        raise UnusableInput(
            f"checkpoint {path.name}: schema {counters.get('schema')}, expected {SCHEMA}; remove the folder to train afresh"
        )
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
