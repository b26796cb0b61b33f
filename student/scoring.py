"""Pure metrics over graded items. Every denominator is written down, because they differ.

    answerable   items with an answer: reasoning families, and facts the teacher is meant to know
    closed book  facts, known and unknown: what one can only recall, invent, or decline
    unknown      facts nobody was taught: declining is the best a model can do, so no answer there is ever correct

Definitions follow AA-Omniscience (arXiv 2511.13029): C correct, I incorrect, P partial, NA not attempted, N items.
An `ungraded` item (its judge crashed, timed out or said nothing that parses) earns nothing and stays in every N; it is in no
numerator, and it is not in I + P + NA either. `Metrics.grades` says how many there are.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from data.records import FinishReason

BOOTSTRAP_RESAMPLES = 4000


class Grade(StrEnum):
    """What became of one item. `partial` comes only from judges of answers with several parts."""

    CORRECT = "correct"
    INCORRECT = "incorrect"
    PARTIAL = "partial"
    NOT_ATTEMPTED = "not_attempted"
    UNGRADED = "ungraded"


@dataclass(frozen=True, slots=True)
class GradedItem:
    """One evaluation item. known: None outside the closed book. output_tokens: generated ids, stop included."""

    task: str
    known: bool | None
    grade: Grade
    reasoning_tokens: int
    output_tokens: int
    finish_reason: FinishReason

    @property
    def family(self) -> str:
        """`facts/metals` and `facts/colours` are one family."""
        return self.task.partition("/")[0]


class Interval(NamedTuple):
    """A two-sided 95 % bootstrap interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """One model on one set of items. Rates are in [0, 1]; a figure without items to stand on is None, never 0.

    accuracy, by_family: C / N over the answerable items.
    hallucination_rate: I / (I + P + NA) over the closed book: of what was not answered right, the share that was made up.
    abstention_rate: NA / N over the closed book. omniscience_index: 100 (C - I) / N over the closed book, in [-100, 100].
    unknown_abstention_rate: NA / N over the unknown facts. over_refusal_rate: NA / N over the known facts.
    reasoning_tokens_per_correct: reasoning tokens of ALL answerable items over their C, so that wrong answers cost too.
    truncation_rate: outputs cut at the token limit, over all items. output_tokens: over all items.
    """

    accuracy: float | None
    accuracy_interval: Interval | None
    by_family: dict[str, float]
    hallucination_rate: float | None
    hallucination_interval: Interval | None
    abstention_rate: float | None
    omniscience_index: float | None
    unknown_abstention_rate: float | None
    over_refusal_rate: float | None
    reasoning_tokens_per_correct: float | None
    truncation_rate: float | None
    output_tokens: int
    num_items: int
    num_answerable: int
    num_known: int
    num_unknown: int
    grades: dict[str, int]


def grade_answer(*, known: bool | None, answer: str, abstained: bool, score: float | None) -> Grade:
    """The grade of one parsed answer. score: the verifier's, or None when it reached no verdict.

    An empty answer (a think block that never closed, an output cut at its limit) is not an abstention: nobody reading it
    learns that the model does not know, and counting it as one would let a model buy a low hallucination rate by
    rambling. It is incorrect, in the closed book as well.
    """
    if not answer:
        return Grade.INCORRECT
    if abstained:
        return Grade.NOT_ATTEMPTED
    if known is False:
        return Grade.INCORRECT
    if score is None:
        return Grade.UNGRADED
    # Only a full score counts. reasoning-gym pays 0.01 to 0.5 for a well-formed wrong answer; that is no partial credit.
    return Grade.CORRECT if score == 1.0 else Grade.INCORRECT


def measure(items: Sequence[GradedItem], *, seed: int = 0) -> Metrics:
    """The figures of `items`; equal items and seed give equal intervals."""
    answerable = [item for item in items if item.known is not False]
    known = [item.grade for item in items if item.known is True]
    unknown = [item.grade for item in items if item.known is False]
    closed_book = known + unknown
    return Metrics(
        accuracy=accuracy([item.grade for item in answerable]),
        accuracy_interval=accuracy_interval([item.grade for item in answerable], seed=seed),
        by_family=accuracy_by_family(answerable),
        hallucination_rate=hallucination_rate(closed_book),
        hallucination_interval=hallucination_interval(closed_book, seed=seed),
        abstention_rate=abstention_rate(closed_book),
        omniscience_index=omniscience_index(closed_book),
        unknown_abstention_rate=abstention_rate(unknown),
        over_refusal_rate=abstention_rate(known),
        reasoning_tokens_per_correct=reasoning_tokens_per_correct(answerable),
        truncation_rate=ratio(sum(item.finish_reason == "length" for item in items), len(items)),
        output_tokens=sum(item.output_tokens for item in items),
        num_items=len(items),
        num_answerable=len(answerable),
        num_known=len(known),
        num_unknown=len(unknown),
        grades={grade.value: count for grade, count in sorted(Counter(item.grade for item in items).items())},
    )


def ratio(numerator: float, denominator: float) -> float | None:
    """None where nothing was counted: a figure over no items is not a zero."""
    return numerator / denominator if denominator else None


def accuracy(grades: Sequence[Grade]) -> float | None:
    """C / N."""
    return ratio(grades.count(Grade.CORRECT), len(grades))


def accuracy_by_family(items: Sequence[GradedItem]) -> dict[str, float]:
    """C / N of each family, in alphabetical order."""
    families: dict[str, list[bool]] = {}
    for item in items:
        families.setdefault(item.family, []).append(item.grade is Grade.CORRECT)
    return {family: sum(hits) / len(hits) for family, hits in sorted(families.items())}


def hallucination_rate(grades: Sequence[Grade]) -> float | None:
    """I / (I + P + NA). A model with no wrong, partial or declined answer made nothing up: 0. No items at all: None."""
    if not grades:
        return None
    counts = Counter(grades)
    missed = counts[Grade.INCORRECT] + counts[Grade.PARTIAL] + counts[Grade.NOT_ATTEMPTED]
    return counts[Grade.INCORRECT] / missed if missed else 0.0


def abstention_rate(grades: Sequence[Grade]) -> float | None:
    """NA / N."""
    return ratio(grades.count(Grade.NOT_ATTEMPTED), len(grades))


def omniscience_index(grades: Sequence[Grade]) -> float | None:
    """100 (C - I) / N: a right answer earns what a wrong one costs, and declining is neutral."""
    return ratio(100.0 * (grades.count(Grade.CORRECT) - grades.count(Grade.INCORRECT)), len(grades))


def reasoning_tokens_per_correct(items: Sequence[GradedItem]) -> float | None:
    """Reasoning tokens spent on all `items` for each correct one; None (infinite) when none is correct."""
    return ratio(sum(item.reasoning_tokens for item in items), sum(item.grade is Grade.CORRECT for item in items))


def accuracy_interval(grades: Sequence[Grade], *, seed: int) -> Interval | None:
    correct = grades.count(Grade.CORRECT)
    return bootstrap_ratio(hits=correct, misses=len(grades) - correct, outside=0, seed=seed)


def hallucination_interval(grades: Sequence[Grade], *, seed: int) -> Interval | None:
    counts = Counter(grades)
    misses = counts[Grade.PARTIAL] + counts[Grade.NOT_ATTEMPTED]
    hits = counts[Grade.INCORRECT]
    return bootstrap_ratio(hits=hits, misses=misses, outside=len(grades) - hits - misses, seed=seed)


def bootstrap_ratio(*, hits: int, misses: int, outside: int, seed: int) -> Interval | None:
    """Percentile interval of hits / (hits + misses) when all hits + misses + outside items are drawn again with replacement.

    Items of one kind are interchangeable, so a resample is one multinomial draw of the three counts: exactly the item
    bootstrap, at a cost that does not grow with the number of items.
    """
    num_items = hits + misses + outside
    if not num_items:
        return None
    shares = np.array([hits, misses, outside]) / num_items
    draws = np.random.default_rng(seed).multinomial(num_items, shares, size=BOOTSTRAP_RESAMPLES)
    counted = draws[:, 0] + draws[:, 1]
    ratios = np.divide(draws[:, 0], counted, out=np.zeros(len(draws)), where=counted > 0)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(low), float(high))
