"""One optimizer step: this rank's micro-batches, one update, the sums over all ranks; and agreeing to stop in between."""

import time

import torch

from configs.draining import Drain
from data.records import digest
from train.measures import StepClock, Taken
from train.setup import Run
from train.step import TrainingStep


class StopAsked(Exception):
    """Some rank was asked to stop, and all ranks know it. Nothing of the step that was begun has been applied."""


def agree_on_stopping(step: TrainingStep, stop: Drain) -> None:
    """Every rank calls it at the same places. Raises StopAsked on all when one was asked: a rank that stopped by itself would
    leave the others in a collective for ever."""
    if step.sum_over_ranks([float(bool(stop.requested))])[0]:
        raise StopAsked


def take_step(run: Run, index: int, lr: float, limit: float, clock: StepClock, *, stop: Drain) -> Taken:
    """Trains the rows of step `index` at learning rate `lr`, unless the gradient's norm is above `limit` or no number.

    Raises StopAsked between micro-batches: their gradients are dropped, and a resume takes the step anew.
    """
    started = time.perf_counter()
    step, world = run.step, run.step.world
    micro_steps = run.order.step(index)
    documents = [document for rows in micro_steps for row in rows for document in row]
    supervised = int(run.supervised_N[documents].sum())
    lengths_N = run.lengths_N[documents]
    torch.manual_seed(dropout_seed(run.recipe.train.seed, index, world.rank))
    loss_sum = 0.0
    for number, rows in enumerate(micro_steps, 1):
        agree_on_stopping(step, stop)
        with clock.reading():
            batch = run.batch(run.corpus.train, rows[world.data_rank])
        loss_sum += step.accumulate(batch, tokens_in_step=supervised, is_last=number == len(micro_steps))
    grad_norm, applied = step.apply(lr, limit)
    loss_sum, rank_seconds = step.sum_over_ranks([loss_sum, time.perf_counter() - started])
    return Taken(
        loss_sum=loss_sum,
        supervised_tokens=supervised,
        tokens=int(lengths_N.sum()),
        capacity=run.order.capacity_of(index),
        attended=int((lengths_N**2).sum()),
        grad_norm=grad_norm,
        limit=limit,
        applied=applied,
        seconds=time.perf_counter() - started,
        micro_step_seconds=rank_seconds / world.size / len(micro_steps),
    )


def dropout_seed(seed: int, index: int, rank: int) -> int:
    """Seeds the noise of one step on one rank, so that a resumed run needs no generator state."""
    return int(digest(seed, index, rank, size=7), 16)
