"""LoRA training of the student on a dataset of traces: configuration, set-up, resume, one loop, final save.

Runs in every rank of torchrun, or in one plain process. Equal recipe and data give equal adapters: in one process, a run
that was killed and resumed ends bit-equal to one that was not.
"""

import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from configs.draining import Drain, draining
from configs.errors import Refused
from configs.launch import StageFailed
from configs.schema import Recipe
from data.store import RunFolder
from student.adapter_files import publish_folder, save_adapter
from student.model import load_tokenizer
from train.batches import TokenLedger
from train.checkpoint import (
    BEST_FILES,
    Best,
    Checkpoint,
    Identity,
    Progress,
    best_folder,
    check_best,
    load_latest,
    remove_worse,
    save_checkpoint,
    seal_best,
    set_aside,
)
from train.measures import BEST_METRICS, LOSS, VALIDATION_LOSS, StepClock, Taken, finite, metrics_of
from train.policy import is_better, norm_limit, remember
from train.schedule import learning_rate
from train.setup import Run, load_corpus, open_run, open_tracker, prepare_folders, run_identity
from train.standby import HELD_ABOVE_S, Save, Standby, on_standby
from train.step import OptimizerState, TrainingStep, World, joined_world
from train.taking import StopAsked, take_step
from train.tracking import METRICS_FILE, Metrics, Report, read_metrics
from train.validation import validate

logger = logging.getLogger(__name__)

DRAIN_S = 28.0
"""From a signal to a durable checkpoint: torchrun kills its ranks after 30 s. A micro-batch and the files are what it takes."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished training leaves. Losses are nats per supervised token, loss NaN where no step had a
    finite one; validation_loss is None without that split. best:
    the validation whose adapter this is, None where it is the last step's. steps: taken; an early stop takes fewer."""

    adapter_dir: Path
    steps: int
    resumed_from: int
    seconds: float
    loss: float
    validation_loss: float | None
    ledger: TokenLedger
    best: Best | None = None


def train(recipe: Recipe, *, dataset_dir: Path, run_dir: Path, report: Report | None = None) -> TrainResult:
    """Trains an adapter into run_dir/checkpoints/adapter, continuing from the newest checkpoint in run_dir/checkpoints.

    Every rank calls it; rank 0 alone writes, and alone calls report(step, total_steps, metrics).

    Raises:
        UnusableInput: a model, dataset or setting that cannot be used, or checkpoints of another configuration.
        Interrupted: a signal asked for a stop, and the state is saved.
        Refused: too many steps with a loss or gradient that is not finite, or that spikes; what is saved is from before.
    """
    saved = {"limit": f"the {DRAIN_S:g} s that torchrun leaves", "left": "the last checkpoint is continued by the next start",
             "kept": "the state of training is saved: the same command continues"}  # fmt: skip
    with draining(DRAIN_S, **saved) as drain, on_standby() as standby, joined_world(recipe.train.sequence_parallel) as world:
        return train_in(world, recipe, dataset_dir, run_dir, report, drain, standby)


def train_in(
    world: World, recipe: Recipe, dataset_dir: Path, run_dir: Path, report: Report | None, drain: Drain, standby: Standby
) -> TrainResult:
    config, checkpoints, is_writer = recipe.train, run_dir / "checkpoints", world.rank == 0

    tokenizer = load_tokenizer(recipe.student.model)
    corpus = load_corpus(recipe, dataset_dir, tokenizer, RunFolder(run_dir), is_writer=is_writer)
    identity = run_identity(recipe, corpus)
    if is_writer:
        prepare_folders(run_dir, corpus.ledger)
    checkpoint = load_latest(checkpoints, identity)
    progress = _agreed(_begun(checkpoint, world, checkpoints), identity, world)
    resumed_from = progress.step
    if is_writer and checkpoint is not None:
        set_aside(checkpoints, progress)
    if is_writer:
        remove_worse(checkpoints)
    run = open_run(recipe, world, corpus, tokenizer, run_dir, checkpoint, group=progress.group)
    total = run.order.num_steps
    # a row that waits for its validation may be in the file already, if a start after that stop was killed
    logged = resumed_from if checkpoint is None or checkpoint.unlogged is None else max(0, resumed_from - 1)
    tracker = open_tracker(recipe, world, RunFolder(run_dir), identity, resume_step=logged, total_steps=total, report=report)
    clock = StepClock()
    last_saved = -1 if checkpoint is None else resumed_from

    def write(checkpoint: Checkpoint) -> None:
        save_checkpoint(checkpoints, checkpoint, identity, kept=config.kept_checkpoints)

    standby.save_with(write)
    saver = Saver(run.step, clock, standby, write, last=last_saved)

    row: Metrics | None = {} if checkpoint is None else checkpoint.unlogged  # of the last step, until it is logged
    try:
        while True:
            if row is not None:
                if run.validates_after(progress.step, total):
                    row |= finite(validate(run, stop=drain))
                    progress = with_validation(progress, row, config.best_metric)
                    keep_if_best(run, checkpoints, progress)
                if row:
                    tracker.log(progress.step, row)  # before the checkpoint, so that no resumed run lacks a row
                row = None
                saver.hold_logged(progress)
                if progress.step % config.checkpoint_steps == 0 and progress.step:
                    saver.save(progress)
            if progress.step == total or waited_enough(progress, config.early_stop_patience):
                break
            lr = learning_rate(progress.step, total, config.lr, config.warmup_share)
            limit = norm_limit(progress.recent_norms, config.spike_factor)
            taken = take_step(run, progress.step, lr, limit, clock, stop=drain)
            progress = advance(progress, taken)
            refuse_many_skipped(progress, taken, config.max_skipped_steps)
            epoch = config.epochs * progress.step / total
            row = finite(metrics_of(taken, progress, lr, clock, flops_share=run.mfu(taken), epoch=epoch))
            saver.hold(taken, progress, row)
    except StopAsked:
        saver.save(progress, unlogged=row)
        tracker.close()
        run.step.sum_over_ranks([0.0])  # nobody leaves before rank 0 has written
        run.step.close()
        drain.join()
        drain.end()

    saver.save(progress)
    parameters = run.step.export_parameters()
    if is_writer:
        publish_adapter(run, checkpoints, progress, parameters)
        tracker.log_adapter(checkpoints / "adapter")
    tracker.close()
    run.step.sum_over_ranks([0.0])
    run.step.close()
    return summarise(run_dir, resumed_from, progress, corpus.ledger)


def _begun(checkpoint: Checkpoint | None, world: World, checkpoints: Path) -> Progress:
    """Where to go on; rows stay grouped as they were at the first start, whatever ranks there are now."""
    if checkpoint is None:
        return Progress(group=world.data_size)
    progress = replace(checkpoint.progress, restarts=checkpoint.progress.restarts + 1)
    if progress.best is not None and not best_folder(checkpoints, progress.best.step).is_dir():
        logger.warning("the best adapter, of step %d, has gone; the next validation is the best so far", progress.best.step)
        return replace(progress, best=None, validations_without_better=0)
    return progress


def _agreed(progress: Progress, identity: Identity, world: World) -> Progress:
    """Rank 0's. Every rank reads by itself, and a disk may show one of them yesterday's files: it would take other steps than the
    others, who would wait for it in the end.

    Raises StageFailed where ranks found different checkpoints, or different things to train: another start, a moment later, may
    find them the same.
    """
    found: list[tuple[Progress, Identity]] = [(progress, identity)] * world.size
    torch.distributed.all_gather_object(found, (progress, dict(identity)))
    for rank, (other, its_identity) in enumerate(found):
        differing = sorted(key for key in identity if found[0][1].get(key) != its_identity.get(key))
        if other.step != found[0][0].step:
            differing.append(f"checkpoint of step {other.step} where the other has {found[0][0].step}")
        if differing:
            raise StageFailed(
                f"rank {rank} found another run folder than rank 0: {', '.join(differing)}; give the same command again when the "
                "disk shows the same files to all nodes"
            )
    return found[0][0]


class Saver:
    """Makes the state after a step durable, once. Every rank calls `hold` and `save`; rank 0 keeps and writes."""

    def __init__(self, step: TrainingStep, clock: StepClock, standby: Standby, write: Save, *, last: int) -> None:
        self.step, self.clock, self.standby, self.write, self.last = step, clock, standby, write, last
        self.is_held = False
        self.state: OptimizerState | None = None

    def hold(self, taken: Taken, progress: Progress, unlogged: Metrics) -> None:
        """Where micro-batches are long, the state after a step waits in rank 0's memory for a signal (train/standby.py)."""
        self.is_held, self.state = taken.micro_step_seconds > HELD_ABOVE_S, None
        if self.is_held:
            with self.clock.saving():
                state = self.step.export_state()
            self.state = state if self.step.world.rank == 0 else None
        self.hold_logged(progress, dict(unlogged))

    def hold_logged(self, progress: Progress, unlogged: Metrics | None = None) -> None:
        """The same state, with what has become known of its step. unlogged: as of `save`."""
        self.standby.hold(None if self.state is None else Checkpoint(progress, self.state, unlogged))

    def save(self, progress: Progress, unlogged: Metrics | None = None) -> None:
        """unlogged: the metrics of the last step, where no row has them yet."""
        if progress.step == self.last:
            return
        with self.clock.saving():
            state = self.state if self.is_held else self.step.export_state()
            if self.step.world.rank == 0:
                assert state is not None
                checkpoint = Checkpoint(progress, state, unlogged)
                if not self.standby.has_written(checkpoint):
                    self.write(checkpoint)
        self.standby.hold(None)
        self.last = progress.step


# --- decisions after a step --------------------------------------------------------------------------------------


def advance(progress: Progress, taken: Taken) -> Progress:
    """With the step counted; its tokens too, where it was applied."""
    if not taken.applied:
        non_finite = progress.non_finite + (not math.isfinite(taken.grad_norm))
        return replace(progress, step=progress.step + 1, seconds=progress.seconds + taken.seconds, skipped=progress.skipped + 1,
                       non_finite=non_finite)  # fmt: skip
    return replace(
        progress,
        step=progress.step + 1,
        tokens=progress.tokens + taken.tokens,
        supervised_tokens=progress.supervised_tokens + taken.supervised_tokens,
        seconds=progress.seconds + taken.seconds,
        recent_norms=remember(progress.recent_norms, taken.grad_norm),
    )


def refuse_many_skipped(progress: Progress, taken: Taken, most: int) -> None:
    """Says which step was not applied; gives up at the limit, before anything of it can be logged or saved."""
    if taken.applied:
        return
    said = (
        f"train step {progress.step}: loss {taken.nats_per_token:.4g}, gradient norm {taken.grad_norm:.4g} "
        f"(limit {taken.limit:.4g})"
    )
    logger.warning("%s; not applied (%d of at most %d)", said, progress.skipped, most)
    if progress.skipped > most:
        raise Refused(
            f"{said}: {progress.skipped} steps were not applied, expected at most train.max_skipped_steps {most}; move the "
            "checkpoints away and lower train.lr, or raise max_skipped_steps (earlier checkpoints are intact)"
        )


def with_validation(progress: Progress, row: Metrics, metric: Literal["loss", "accuracy"] | None) -> Progress:
    """With the validation of `row` compared with the best one. That before the first step is of the base, and no adapter's."""
    if metric is None or not progress.step:
        return progress
    value = row.get(BEST_METRICS[metric], math.nan)
    if is_better(metric, value, None if progress.best is None else progress.best.value):
        return replace(progress, best=Best(value, progress.step), validations_without_better=0)
    return replace(progress, validations_without_better=progress.validations_without_better + 1)


def waited_enough(progress: Progress, patience: int | None) -> bool:
    return patience is not None and progress.validations_without_better >= patience


def keep_if_best(run: Run, checkpoints: Path, progress: Progress) -> None:
    """The adapter lies in checkpoints/best-STEP when this step is the best. Every rank calls it. An older best one goes with the
    next checkpoint: until then a kill goes back to it."""
    if progress.best is None or progress.best.step != progress.step:
        return
    parameters = run.step.export_parameters()
    if run.step.world.rank == 0:
        folder = best_folder(checkpoints, progress.step)
        save(run, folder, progress, parameters)
        seal_best(folder)


def save(run: Run, folder: Path, progress: Progress, parameters: Mapping[str, torch.Tensor]) -> None:
    """The adapter as it is now. Layers that learnt nothing are an error unless no step has been applied at all."""
    untrained = progress.step == progress.skipped
    save_adapter(folder, run.step.adapted, parameters, run.tokenizer, may_be_untrained=untrained)


def publish_adapter(run: Run, checkpoints: Path, progress: Progress, parameters: Mapping[str, torch.Tensor]) -> None:
    """checkpoints/adapter is the best one, or the last step's where no metric says which is best."""
    if progress.best is None:
        save(run, checkpoints / "adapter", progress, parameters)
        return
    best, copy = best_folder(checkpoints, progress.best.step), checkpoints / f".adapter.{os.getpid()}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(best, copy, ignore=shutil.ignore_patterns(BEST_FILES))
    check_best(copy, best)
    publish_folder(copy, checkpoints / "adapter")


def summarise(run_dir: Path, resumed_from: int, progress: Progress, ledger: TokenLedger) -> TrainResult:
    """Reads the last losses from the metrics file, which also has them when there was nothing left to train."""
    rows = read_metrics(run_dir / "metrics" / METRICS_FILE)
    losses = [row[LOSS] for row in rows if LOSS in row]
    validations = [row[VALIDATION_LOSS] for row in rows if VALIDATION_LOSS in row]
    return TrainResult(
        run_dir / "checkpoints" / "adapter", progress.step, resumed_from, progress.seconds, losses[-1] if losses else math.nan,
        validations[-1] if validations else None, ledger, progress.best,
    )  # fmt: skip
