"""What a step did, and what is logged of it. Every name carries its unit; an average stands beside its denominator."""

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from train.checkpoint import Progress
from train.tracking import Metrics

LOSS = "loss/nats_per_token"
VALIDATION_LOSS, VALIDATION_ACCURACY = "validation/nats_per_token", "validation/accuracy"
BEST_METRICS = {"loss": VALIDATION_LOSS, "accuracy": VALIDATION_ACCURACY}


@dataclass(frozen=True, slots=True)
class Taken:
    """One optimizer step, over all ranks. loss_sum: of the objective, in nats over its supervised tokens. capacity: tokens that
    its rows could hold. attended: sum over documents of length squared. applied: False where the gradient norm was no number or
    above `limit`, and nothing was changed. micro_step_seconds: the mean over ranks, equal on all of them."""

    loss_sum: float
    supervised_tokens: int
    tokens: int
    capacity: int
    attended: int
    grad_norm: float
    limit: float
    applied: bool
    seconds: float
    micro_step_seconds: float = 0.0

    @property
    def nats_per_token(self) -> float:
        return self.loss_sum / max(1, self.supervised_tokens)


class StepClock:
    """Seconds beside the step itself: for making its batches, and of the checkpoint before it."""

    def __init__(self) -> None:
        self.data_s = self.checkpoint_s = 0.0

    @contextmanager
    def reading(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.data_s += time.perf_counter() - started

    @contextmanager
    def saving(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.checkpoint_s += time.perf_counter() - started

    def read_off(self) -> Metrics:
        """What has passed since the last row."""
        passed = {"perf/data_seconds": self.data_s, "perf/checkpoint_seconds": self.checkpoint_s}
        self.data_s = self.checkpoint_s = 0.0
        return passed


def metrics_of(
    taken: Taken, progress: Progress, lr: float, clock: StepClock, *, flops_share: float | None, epoch: float
) -> Metrics:  # fmt: skip
    """The row of one step. flops_share: of the devices' peak; None where that is unknown."""
    return {
        LOSS: taken.nats_per_token,
        "loss/supervised_tokens": taken.supervised_tokens,
        "optim/lr": lr,
        "optim/grad_norm": taken.grad_norm,
        "optim/skipped_steps": progress.skipped,
        "optim/non_finite_steps": progress.non_finite,
        "perf/tokens_per_s": taken.tokens / taken.seconds,
        "perf/supervised_tokens_per_s": taken.supervised_tokens / taken.seconds,
        **({} if flops_share is None else {"perf/mfu": flops_share}),
        "perf/waste_share": 1.0 - taken.tokens / taken.capacity,
        "perf/step_seconds": taken.seconds,
        **clock.read_off(),
        "perf/memory_peak_bytes": peak_memory_bytes(),
        "progress/epoch": epoch,
        "progress/tokens": progress.tokens,
        "progress/supervised_tokens": progress.supervised_tokens,
        "progress/seconds": progress.seconds,
        "progress/restarts": progress.restarts,
    }


def finite(row: Metrics) -> Metrics:
    """Without what is no number, which JSON cannot hold; optim/non_finite_steps counts such steps."""
    return {name: value for name, value in row.items() if math.isfinite(value)}


def peak_memory_bytes() -> int:
    """Of this rank: device memory on a GPU, resident memory of the process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
