"""The training stage: the dataset in, an adapter out, on as many ranks as the recipe says."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.launch import run_ranks
from configs.progress import Count, file_reporter, read_counts
from data.stage import Context, Outcome, Stage
from student.folders import resolve, weights_sha256


def _identity(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    return {
        "base": weights_sha256(resolve(recipe.student.model)),
        "lora": recipe.student.lora.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json"),
    }


def _progress_file(context: Context) -> Path:
    return context.run.cache / "train.progress"


def _act(context: Context, show: Callable[[Count], None]) -> Outcome:
    run, settings = context.run, context.recipe.train
    extensions, log = run.cache / "torch_extensions", run.logs / "train.log"
    progress = _progress_file(context)
    progress.unlink(missing_ok=True)

    def poll() -> None:
        if (count := read_counts([progress])) is not None:
            show(count)

    run_ranks(context.words("train"), processes=settings.processes, extensions=extensions, log=log, poll=poll)
    adapter = run.checkpoints / "adapter"
    metrics = run.metrics / "train.jsonl"
    last = json.loads(metrics.read_bytes().splitlines()[-1])
    files = sorted(path for path in adapter.rglob("*") if path.is_file())
    loss = next((f"loss {value:.4f} nats" for key, value in last.items() if key == "loss/nats_per_token"), "")
    return Outcome([*files, metrics], {"steps": last.get("step")}, f"{last.get('step')} steps, {loss}")


def train_rank(context: Context) -> None:
    """One rank, started by torchrun."""
    from train.loop import train

    report = file_reporter(_progress_file(context))

    def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
        loss = metrics.get("loss/nats_per_token")
        report(Count(step, total, "" if loss is None else f"loss {loss:.3f}"))

    train(
        context.recipe,
        dataset_dir=context.run.dataset,
        run_dir=context.run.root,
        report=on_step if os.environ["RANK"] == "0" else None,
    )


def _plan(context: Context) -> str:
    lora, train = context.recipe.student.lora, context.recipe.train
    return (
        f"LoRA rank {lora.rank} on {context.recipe.student.model}, {train.epochs:g} epochs of {train.traces_per_step} traces "
        f"a step, lr {train.lr:g}, {train.processes} ranks, ZeRO-{train.zero_stage}, {train.dtype}"
    )


TRAIN = Stage("train", "steps", lambda run: run.checkpoints, ("dataset",), _identity, _act, _plan)
