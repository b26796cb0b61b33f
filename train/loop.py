"""LoRA training of the student on a dataset of traces: configuration, set-up, resume, one loop, final save.

Runs in every rank of torchrun, or in one plain process. Equal recipe and data give equal adapters: in one process, a run
that was killed and resumed ends bit-equal to one that was not.
"""

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from configs.errors import TracestillError
from configs.schema import Recipe
from data.chat import Encoded
from data.records import digest
from data.store import RunFolder
from student.lora import save_adapter
from student.model import load_tokenizer
from train.batches import TokenLedger, num_trained, plan_micro_batches, step_members, visiting_order
from train.checkpoint import Checkpoint, Progress, load_latest, save_checkpoint
from train.rendered import Rendered
from train.schedule import learning_rate
from train.setup import Corpus, build_step, load_corpus, open_tracker, prepare_folders, run_identity
from train.step import TrainingStep, World, joined_world
from train.tracking import METRICS_FILE, Metrics, Report, read_metrics


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished training leaves. Losses are nats per supervised token; validation_loss is None without that split."""

    adapter_dir: Path
    steps: int
    resumed_from: int
    seconds: float
    loss: float
    validation_loss: float | None
    ledger: TokenLedger


def train(recipe: Recipe, *, dataset_dir: Path, run_dir: Path, report: Report | None = None) -> TrainResult:
    """Trains an adapter into run_dir/checkpoints/adapter, continuing from the newest checkpoint in run_dir/checkpoints.

    Every rank calls it; rank 0 alone writes, and alone calls report(step, total_steps, metrics).

    Raises:
        UnusableInput: a model, dataset or setting that cannot be used, or checkpoints of another configuration.
        TracestillError: loss or gradient is not finite; the checkpoints before it are intact.
    """
    with joined_world() as world:
        return train_in(world, recipe, dataset_dir, run_dir, report)


def train_in(world: World, recipe: Recipe, dataset_dir: Path, run_dir: Path, report: Report | None) -> TrainResult:
    config, checkpoints = recipe.train, run_dir / "checkpoints"
    is_writer = world.rank == 0

    tokenizer = load_tokenizer(recipe.student.model)
    corpus = load_corpus(recipe, dataset_dir, tokenizer, RunFolder(run_dir).cache, is_writer=is_writer)
    steps = step_members(visiting_order(len(corpus.train), config.epochs, config.seed), config.traces_per_step)
    identity = run_identity(recipe, corpus)
    if is_writer:
        prepare_folders(run_dir, corpus.ledger)
    checkpoint = load_latest(checkpoints, identity)
    progress = replace(checkpoint.progress, restarts=checkpoint.progress.restarts + 1) if checkpoint else Progress()
    resumed_from = progress.step
    step = build_step(recipe, world, corpus, checkpoint)
    tracker = open_tracker(recipe, world, run_dir, identity, resume_step=resumed_from, total_steps=len(steps), report=report)
    if checkpoint is None and corpus.validation:
        tracker.log(0, {"validation/nats_per_token": mean_loss(step, corpus, corpus.validation, config.tokens_per_micro_batch)})

    for index in range(resumed_from, len(steps)):
        lr = learning_rate(index, len(steps), config.lr, config.warmup_share)
        members = [corpus.train[member] for member in steps[index]]
        torch.manual_seed(dropout_seed(config.seed, index, world.rank))
        taken = take_step(step, corpus, members, lr, config.tokens_per_micro_batch)
        refuse_non_finite(index, taken)

        progress = advance(progress, taken)
        is_last = progress.step == len(steps)
        metrics = metrics_of(taken, progress, lr, epoch=config.epochs * progress.step / len(steps))
        if corpus.validation and (is_last or progress.step % config.validation_steps == 0):
            metrics["validation/nats_per_token"] = mean_loss(step, corpus, corpus.validation, config.tokens_per_micro_batch)
        tracker.log(progress.step, metrics)  # before the checkpoint, so that no resumed run lacks a row
        if is_last or progress.step % config.checkpoint_steps == 0:
            state = step.export_state()
            if is_writer:
                save_checkpoint(checkpoints, Checkpoint(progress, state), identity)

    parameters = step.export_parameters()
    if is_writer:
        save_adapter(checkpoints / "adapter", step.adapted, parameters, tokenizer)
    tracker.close()
    step.sum_over_ranks([0.0])  # nobody leaves before rank 0 has written
    step.close()
    return summarise(run_dir, len(steps), resumed_from, progress, corpus.ledger)


class Taken(NamedTuple):
    """One optimizer step, over all ranks. tokens leave padding out; padded_tokens are what was computed."""

    loss_sum: float
    supervised_tokens: int
    tokens: int
    padded_tokens: int
    grad_norm: float
    seconds: float


def take_step(step: TrainingStep, corpus: Corpus, members: Sequence[Encoded], lr: float, tokens_per_micro_batch: int) -> Taken:
    """Trains `members` as one optimizer step: this rank's micro-batches, one update, the sums over all ranks."""
    started = time.perf_counter()
    lengths = [len(member.ids) for member in members]
    supervised = sum(num_trained(member) for member in members)
    plan = plan_micro_batches(lengths, step.world.size, tokens_per_micro_batch)[step.world.rank]
    loss_sum, padded = 0.0, 0
    for number, rows in enumerate(plan, 1):
        batch = corpus.micro_batch([members[row] for row in rows])
        loss_sum += step.accumulate(*batch, tokens_in_step=supervised, is_last=number == len(plan))
        padded += batch.ids_BT.numel()
    grad_norm = step.apply(lr)
    loss_sum, padded_sum = step.sum_over_ranks([loss_sum, padded])
    return Taken(loss_sum, supervised, sum(lengths), round(padded_sum), grad_norm, time.perf_counter() - started)


def mean_loss(step: TrainingStep, corpus: Corpus, rows: Rendered, tokens_per_micro_batch: int) -> float:
    """Nats per supervised token over `rows`, shared out over the ranks."""
    plan = plan_micro_batches(rows.lengths().tolist(), step.world.size, tokens_per_micro_batch)[step.world.rank]
    loss_sum = sum(step.evaluate(*corpus.micro_batch([rows[row] for row in group])) for group in plan)
    return step.sum_over_ranks([loss_sum])[0] / int(rows.trained().sum())


def dropout_seed(seed: int, index: int, rank: int) -> int:
    """Seeds the noise of one step on one rank, so that a resumed run needs no generator state."""
    return int(digest(seed, index, rank, size=7), 16)


def advance(progress: Progress, taken: Taken) -> Progress:
    return Progress(
        progress.step + 1, progress.tokens + taken.tokens, progress.supervised_tokens + taken.supervised_tokens,
        progress.seconds + taken.seconds, progress.restarts,
    )  # fmt: skip


def metrics_of(taken: Taken, progress: Progress, lr: float, epoch: float) -> Metrics:
    return {
        "loss/nats_per_token": taken.loss_sum / taken.supervised_tokens,
        "loss/supervised_tokens": taken.supervised_tokens,
        "optim/lr": lr,
        "optim/grad_norm": taken.grad_norm,
        "perf/tokens_per_s": taken.tokens / taken.seconds,
        "perf/supervised_tokens_per_s": taken.supervised_tokens / taken.seconds,
        "perf/padding_share": 1.0 - taken.tokens / taken.padded_tokens,
        "perf/step_seconds": taken.seconds,
        "perf/memory_peak_bytes": peak_memory_bytes(),
        "progress/epoch": epoch,
        "progress/tokens": progress.tokens,
        "progress/supervised_tokens": progress.supervised_tokens,
        "progress/seconds": progress.seconds,
        "progress/restarts": progress.restarts,
    }


def peak_memory_bytes() -> int:
    """Of this rank: device memory on a GPU, resident memory of the process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refuse_non_finite(index: int, taken: Taken) -> None:
    """Stops before a poisoned adapter can be logged or saved."""
    if not (math.isfinite(taken.loss_sum) and math.isfinite(taken.grad_norm)):
        raise TracestillError(
            f"train step {index + 1}: loss {taken.loss_sum / taken.supervised_tokens}, gradient norm {taken.grad_norm}; "
            "expected finite numbers; lower train.lr and start in another --run-dir (earlier checkpoints are intact)"
        )


def summarise(run_dir: Path, steps: int, resumed_from: int, progress: Progress, ledger: TokenLedger) -> TrainResult:
    """Reads the last losses from the metrics file, which also has them when there was nothing left to train."""
    rows = read_metrics(run_dir / "metrics" / METRICS_FILE)
    losses = [row["loss/nats_per_token"] for row in rows if "loss/nats_per_token" in row]
    validations = [row["validation/nats_per_token"] for row in rows if "validation/nats_per_token" in row]
    adapter = run_dir / "checkpoints" / "adapter"
    return TrainResult(
        adapter, steps, resumed_from, progress.seconds, losses[-1], validations[-1] if validations else None, ledger
    )
