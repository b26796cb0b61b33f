"""What is measured between steps: the loss on held-out traces, and how many of their prompts the student answers rightly."""

import itertools
import math
import time

from configs.draining import Drain
from configs.progress import Count, Report, beat_reporter
from train.measures import VALIDATION_ACCURACY, VALIDATION_LOSS
from train.setup import Run
from train.taking import agree_on_stopping
from train.tracking import Metrics


def validate(run: Run, *, stop: Drain) -> Metrics:
    """Every rank calls it. Leaves the training as it was: no gradient, no random number, no parameter is touched.

    Raises StopAsked between rows and between tokens of answers; a resume measures it whole.
    """
    started = time.perf_counter()
    metrics: Metrics = {VALIDATION_LOSS: mean_loss(run, stop)}
    if run.answers is not None:
        agree_on_stopping(run.step, stop)
        rank, size, told, passes = run.step.world.rank, run.step.world.size, _told_by(run), itertools.count()

        def is_stopped() -> bool:  # asked at every token
            told(Count(next(passes), 0, unit="passes for answers"))
            return bool(stop.requested)

        found = run.answers.measure(run.step.generation_model(), run.tokenizer, rank=rank, size=size, is_stopped=is_stopped)
        agree_on_stopping(run.step, stop)
        right, answered, truncated, unjudged, tokens = run.step.sum_over_ranks(found)
        metrics[VALIDATION_ACCURACY] = right / answered if answered else math.nan
        metrics |= {
            "validation/answers": answered,
            "validation/truncated_answers": truncated,
            "validation/unjudged_answers": unjudged,
            "validation/answer_tokens": tokens,
        }
    return metrics | {"perf/validation_seconds": time.perf_counter() - started}


def _told_by(run: Run) -> Report:
    """The first rank's signs of life: all ranks pass together, so one that hangs silences it."""
    return beat_reporter("train") if run.step.world.rank == 0 else lambda count: None


def mean_loss(run: Run, stop: Drain) -> float:
    """Nats of cross-entropy per supervised token over the validation split, its rows shared out over the ranks. Cross-entropy
    whatever the objective, so that runs can be compared."""
    loss_sum, told, passes = 0.0, _told_by(run), run.validation_rows
    for number, rows in enumerate(passes):
        agree_on_stopping(run.step, stop)
        told(Count(number, len(passes), unit="validation rows a rank"))
        loss_sum += run.step.evaluate(run.batch(run.corpus.validation, rows[run.step.world.data_rank]))
    return run.step.sum_over_ranks([loss_sum])[0] / int(run.corpus.validation.trained().sum())
