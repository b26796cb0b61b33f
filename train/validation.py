"""What is measured between steps: the loss on held-out traces, and how many of their prompts the student answers rightly."""

import math
import time

from configs.draining import Drain
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
        rank, size = run.step.world.rank, run.step.world.size
        found = run.answers.measure(
            run.step.generation_model(), run.tokenizer, rank=rank, size=size, is_stopped=lambda: bool(stop.requested)
        )
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


def mean_loss(run: Run, stop: Drain) -> float:
    """Nats of cross-entropy per supervised token over the validation split, its rows shared out over the ranks. Cross-entropy
    whatever the objective, so that runs can be compared."""
    loss_sum = 0.0
    for rows in run.validation_rows:
        agree_on_stopping(run.step, stop)
        loss_sum += run.step.evaluate(run.batch(run.corpus.validation, rows[run.step.world.data_rank]))
    return run.step.sum_over_ranks([loss_sum])[0] / int(run.corpus.validation.trained().sum())
