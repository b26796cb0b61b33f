"""Accuracy by where in a long prompt the answer stood: is what lies in the middle lost?

The depth of a place is the share of the prompt's tokens before it, by the teacher's tokenizer, as measured when the prompt was
built. An answer that needs two places counts in the bucket of each, and as `middle` when either of them lies there. What nobody
judged is counted and stands outside every share. Intervals treat attempts as independent, which samples of one prompt are not
quite.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypedDict

from data.calibration_metrics import wilson_interval

NUM_BUCKETS = 10
MIDDLE = range(3, 7)
"""Buckets from depth 0.3 to 0.7. Of the 42 pairs of depths of the documents source 24 have a fact there, and 18 have none."""


class Places(NamedTuple):
    """Where in a prompt stands what its answer needs. depths: in [0, 1]; none where nobody knows. total_tokens: of the message,
    by the teacher's tokenizer, whoever reads it."""

    depths: tuple[float, ...]
    total_tokens: int


class Share(TypedDict):
    """Right ones among judged attempts: the teacher's traces, or answers to evaluation items. accuracy and its
    95 % Wilson interval are null where there are none."""

    traces: int
    correct: int
    accuracy: float | None
    interval: tuple[float, float] | None


class DepthBucket(Share):
    """Attempts with a place at a depth in [low, high)."""

    low: float
    high: float


class DepthFigures(TypedDict):
    """One task of `accuracy_by_depth` in `tracestill report --json` and in evaluation/MODEL.json. by_depth: buckets that have
    attempts. ends: no place in [0.3, 0.7); middle: at least one. lost_in_the_middle: accuracy of ends less that of middle, null
    unless both were measured; its interval is Newcombe's, of 95 %."""

    traces: int
    unjudged: int
    by_depth: list[DepthBucket]
    ends: Share
    middle: Share
    lost_in_the_middle: float | None
    lost_in_the_middle_interval: tuple[float, float] | None


class Outcome(NamedTuple):
    """An attempt at a prompt whose places are known. correct: None when nobody judged it."""

    task: str
    depths: tuple[float, ...]
    correct: bool | None


# --- places ------------------------------------------------------------------------------------------------------


def places_of(evidence: str) -> Places:
    """evidence: as data.records.Prompt has it; "" has no places."""
    if not evidence:
        return Places((), 0)
    said = json.loads(evidence)
    return Places(tuple(place["depth"] for place in said["places"]), said["total_tokens"])


def bucket_of(depth: float) -> int:
    """Depths are recorded with four digits: rounded before it is cut, so that 0.7 is not 6.999... tenths."""
    return min(NUM_BUCKETS - 1, int(round(depth * NUM_BUCKETS, 6)))


def is_middle(depths: Iterable[float]) -> bool:
    """Whether one of them lies in [0.3, 0.7)."""
    return any(bucket_of(depth) in MIDDLE for depth in depths)


# --- figures -----------------------------------------------------------------------------------------------------


def depth_figures(outcomes: Iterable[Outcome]) -> dict[str, DepthFigures]:
    """By task, in name order."""
    by_task: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome.task, []).append(outcome)
    return {task: _figures_of(by_task[task]) for task in sorted(by_task)}


def _figures_of(outcomes: Sequence[Outcome]) -> DepthFigures:
    judged = [(outcome.depths, outcome.correct) for outcome in outcomes if outcome.correct is not None]
    in_bucket: list[list[bool]] = [[] for _ in range(NUM_BUCKETS)]
    for depths, correct in judged:
        for number in set(map(bucket_of, depths)):
            in_bucket[number].append(correct)
    ends = share_of([correct for depths, correct in judged if not is_middle(depths)])
    middle = share_of([correct for depths, correct in judged if is_middle(depths)])
    lost = difference(ends, middle)
    return DepthFigures(
        traces=len(judged),
        unjudged=len(outcomes) - len(judged),
        by_depth=[
            DepthBucket(low=number / NUM_BUCKETS, high=(number + 1) / NUM_BUCKETS, **share_of(verdicts))
            for number, verdicts in enumerate(in_bucket)
            if verdicts
        ],
        ends=ends,
        middle=middle,
        lost_in_the_middle=None if lost is None else lost[0],
        lost_in_the_middle_interval=None if lost is None else lost[1:],
    )


def share_of(verdicts: Sequence[bool]) -> Share:
    if not verdicts:
        return Share(traces=0, correct=0, accuracy=None, interval=None)
    correct, total = sum(verdicts), len(verdicts)
    return Share(traces=total, correct=correct, accuracy=correct / total, interval=wilson_interval(correct, total))


def difference(first: Share, second: Share) -> tuple[float, float, float] | None:
    """first less second, with its 95 % interval from the two Wilson intervals. Source: Newcombe 1998, method 10."""
    if first["accuracy"] is None or second["accuracy"] is None or first["interval"] is None or second["interval"] is None:
        return None
    (p, (low, high)), (q, (under, over)) = (first["accuracy"], first["interval"]), (second["accuracy"], second["interval"])
    return p - q, p - q - math.hypot(p - low, over - q), p - q + math.hypot(high - p, q - under)
