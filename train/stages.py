"""The training stage: the dataset in, an adapter out, on as many ranks as the recipe says."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.launch import Nodes, read_nodes, run_ranks
from configs.progress import Count, file_reporter, read_counts
from configs.training import FREE_WHILE_TRAINING
from data.stage import Context, Outcome, Stage, completed, inputs_of
from student.folders import resolve, weights_sha256

# train.measures and train.certify have the names too; they need torch, and a finished stage is passed over without.
LOSS = "loss/nats_per_token"
CERTIFICATE_FILE = "certificate.json"


def _identity(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    return {
        "base": weights_sha256(resolve(recipe.student.model)),
        "lora": recipe.student.lora.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json", exclude=set(FREE_WHILE_TRAINING)),
    }


def _progress_file(context: Context) -> Path:
    return context.run.cache / "train.progress"


def nodes_of(context: Context) -> Nodes | None:
    """This node's place in a training over several; None on one. Raises UnusableInput when the environment does not say."""
    return read_nodes(context.recipe.train.nodes, os.environ, "train.nodes")


def join_training(context: Context) -> None:
    """Another node's part of the stage: its ranks, and nothing else. The first node shows progress and seals."""
    if completed(TRAIN, context) is None:
        nodes = nodes_of(context)
        _run_ranks_here(context, context.run.logs / f"train.n{nodes.rank if nodes else 0}.log", lambda: None)


def certify_training(context: Context) -> None:
    """metrics/certificate.json is there and holds. Nothing is trained; every node of a launch over several gives the command.

    Raises Refused when the gradients are not those of the reference; and whatever keeps the recipe from being trained at all.
    """
    inputs_of(TRAIN, context)
    nodes = nodes_of(context)
    name = "certify" if nodes is None or nodes.rank == 0 else f"certify.n{nodes.rank}"
    _run_ranks_here(context, context.run.logs / f"{name}.log", lambda: None, "--certify")
    found, dtype = json.loads((context.run.metrics / CERTIFICATE_FILE).read_text()), context.recipe.train.dtype
    context.console.print(
        f"[bold]certificate[/bold] holds: gradients of {found['parameters']} parameters within {found['largest_difference']:.1e} "
        f"of a float64 reference (bound {found['bound']:g}), {found['traces']} traces in {found['rows']} packed rows on "
        f"{found['ranks']} ranks, ZeRO-{context.recipe.train.zero_stage}, in {found['settings']['train']['dtype']}"
        + (f" for want of a GPU, where the recipe says {dtype}" if found["settings"]["train"]["dtype"] != dtype else ""),
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def certify_rank(context: Context) -> None:
    """One rank, started by torchrun."""
    from train.certify import certify_run

    certify_run(context.recipe, context.run)


def _run_ranks_here(context: Context, log: Path, poll: Callable[[], None], *options: str) -> None:
    processes, extensions = context.recipe.train.processes, context.run.cache / "torch_extensions"
    words = [*context.words("train"), *options]
    run_ranks(words, processes=processes, extensions=extensions, log=log, poll=poll, nodes=nodes_of(context))


def _act(context: Context, show: Callable[[Count], None]) -> Outcome:
    run, progress = context.run, _progress_file(context)
    progress.unlink(missing_ok=True)

    def poll() -> None:
        if (count := read_counts([progress])) is not None:
            show(count)

    _run_ranks_here(context, run.logs / "train.log", poll)
    adapter, metrics = run.checkpoints / "adapter", run.metrics / "train.jsonl"
    rows = [json.loads(line) for line in metrics.read_bytes().splitlines()]
    steps = rows[-1]["step"]
    loss = next((f"loss {row[LOSS]:.4f} nats" for row in reversed(rows) if LOSS in row), "no step taken")
    files = sorted(path for path in adapter.rglob("*") if path.is_file())
    return Outcome([*files, metrics], {"steps": steps}, f"{steps} steps, {loss}")


def train_rank(context: Context) -> None:
    """One rank, started by torchrun."""
    from train.loop import train

    report = file_reporter(_progress_file(context))

    def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
        report(Count(step, total, _note(metrics)))

    train(
        context.recipe,
        dataset_dir=context.run.dataset,
        run_dir=context.run.root,
        report=on_step if os.environ["RANK"] == "0" else None,
    )


def _note(metrics: dict[str, float]) -> str:
    """Beside the bar: what the last row says."""
    shown = {LOSS: "loss {:.3f}", "perf/tokens_per_s": "{:,.0f} tokens/s", "perf/mfu": "MFU {:.1%}",
             "optim/skipped_steps": "{:.0f} skipped"}  # fmt: skip
    said = [words.format(metrics[name]) for name, words in shown.items() if metrics.get(name)]
    return ", ".join(said)


def _plan(context: Context) -> str:
    lora, train = context.recipe.student.lora, context.recipe.train
    nodes = f"{train.nodes} nodes of " if train.nodes > 1 else ""
    return (
        f"LoRA rank {lora.rank} on {context.recipe.student.model}, {train.objective.type}, {train.epochs:g} epochs of "
        f"{train.rows_per_step} rows of {train.max_tokens_per_row} tokens a step, lr {train.lr:g}, {nodes}{train.processes} "
        f"ranks, ZeRO-{train.zero_stage}, {train.dtype}"
    )


TRAIN = Stage("train", "steps", lambda run: run.checkpoints, ("dataset",), _identity, _act, _plan)
