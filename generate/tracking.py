"""Expert load as curves over the layers in W&B, which is a mirror of metrics/expert_load.arrow and may fail or be missing.

The launcher sends it once the ranks have ended, from a process of its own: whatever W&B or the network does, a stalled
`wandb.init` included, ends with that process and costs the stage at most WANDB_TIMEOUT_S.

Privacy: no argument vector, host facts, package list, code, git state or console output leaves the process; what is logged
is the figures, the run's name and the task names.
"""

import contextlib
import logging
import multiprocessing
import os
import uuid
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple

from configs.launch import die_with_parent
from configs.wandb_privacy import PRIVATE
from data.expert_figures import LOAD_FILE, LayerLoad

log = logging.getLogger(__name__)

WANDB_TIMEOUT_S = 20.0
_FIGURES = (
    "tokens", "cv", "max_over_mean", "rank_cv", "rank_max_over_mean", "effective_share", "dead_share", "top_share",
    "divergence_nats", "drift_nats", "drift_by_chance_nats",
)  # fmt: skip


class Target(NamedTuple):
    """Where the curves go. folder: of the offline files."""

    folder: Path
    mode: Literal["offline", "online", "disabled"]
    project: str
    name: str


def mirror_expert_load(rows: Sequence[LayerLoad], target: Target) -> None:
    """The rows are in W&B, or a warning says why not."""
    if target.mode == "disabled" or not rows:
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the threads of whatever ran here before
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_report_problem, args=(layer_rows(rows), target, sender), daemon=True)
    process.start()
    sender.close()
    if problem := _wait(receiver):
        log.warning("W&B stopped: %s; metrics/%s is complete", problem, LOAD_FILE)
    process.kill()
    process.join()


def layer_rows(rows: Sequence[LayerLoad]) -> list[dict[str, float]]:
    """One W&B row a layer; figures that nothing could be compared for are left out."""
    by_layer: dict[int, dict[str, float]] = {}
    for row in rows:
        prefix = f"experts/{'all tasks' if row.task is None else row.task}"
        known = {f"{prefix}/{name}": float(value) for name in _FIGURES if (value := getattr(row, name)) is not None}
        by_layer.setdefault(row.layer, {"experts/layer": row.layer}).update(known)
    return [by_layer[layer] for layer in sorted(by_layer)]


def _wait(receiver: Connection) -> str:
    """What went wrong in the other process; empty when nothing did."""
    if not receiver.poll(WANDB_TIMEOUT_S):
        return f"not done within {WANDB_TIMEOUT_S:.0f} s"
    try:
        return receiver.recv()
    except EOFError:
        return "its process died"


def _report_problem(rows: Sequence[dict[str, float]], target: Target, sender: Connection) -> None:
    """The other process."""
    die_with_parent()
    try:
        _send(rows, target)
    except Exception as error:  # best effort by contract, whatever W&B raises
        sender.send(f"{type(error).__name__}: {error}")
    else:
        sender.send("")


def _send(rows: Sequence[dict[str, float]], target: Target) -> None:
    import wandb  # 1 s, and only where it is wanted

    target.folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(init_timeout=WANDB_TIMEOUT_S, **PRIVATE)  # type: ignore[arg-type]
    run = wandb.init(
        project=target.project,
        group=target.name,
        name=f"{target.name} generate",
        job_type="generate",
        id=_run_id(target.folder),
        resume="allow",
        mode=target.mode if target.mode != "disabled" else None,
        dir=str(target.folder),
        settings=settings,
    )
    run.define_metric("experts/layer")
    run.define_metric("experts/*", step_metric="experts/layer")
    for row in rows:
        run.log(row)
    run.finish()
    wandb.teardown()  # ends the service process too


def _run_id(folder: Path) -> str:
    """The W&B id of this run folder's generation, drawn once. Training has another one: it is another run."""
    path = folder / "wandb-generate-run-id"
    with contextlib.suppress(FileExistsError), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w") as file:
        file.write(uuid.uuid4().hex[:12])
    return path.read_text().strip()
