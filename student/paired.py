"""Two models on the same items: is one better, or was it luck? Unpaired intervals would count the items' difficulty twice."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np

from configs.errors import UnusableInput
from student.grades import Grade, GradedItem
from student.resampling import Interval, interval_of, ratio_draws
from student.scoring import ENDS, SHARE, missed_nothing, ratio_of, ratio_sums, standing_on

Test = Literal["exact McNemar", "paired bootstrap"]


class Paired(NamedTuple):
    """One model's figure against another's on num_items items. value: difference or quotient, first against second; None where
    either has none. interval: 95 %, items drawn again with both models' attempts. p: two-sided, of no difference; by `test`."""

    metric: str
    num_items: int
    value: float | None
    interval: Interval | None
    p: float | None
    test: Test


def difference(first: Sequence[GradedItem], second: Sequence[GradedItem], metric: str = "accuracy", *, seed: int = 0) -> Paired:
    """`first`'s figure less `second`'s. p is McNemar's where each item is one attempt that is right or wrong, else the
    bootstrap's: twice the share of draws on the rarer side of zero, and never below one draw.

    Raises UnusableInput when they did not answer the same items.
    """
    draws_R2, num_items, standing = _draws(first, second, metric, seed)
    one, other = ratio_of(metric, first), ratio_of(metric, second)
    if one is None or other is None:
        return Paired(metric, num_items, None, None, None, "paired bootstrap")
    with np.errstate(invalid="ignore"):
        draws_R = draws_R2[:, 0] - draws_R2[:, 1]
    ends = ENDS.get(metric, SHARE)
    interval = interval_of(draws_R, standing, Interval(ends.low - ends.high, ends.high - ends.low))
    if metric == "accuracy" and all(item.sample == 0 for item in first):
        return Paired(metric, num_items, one - other, interval, mcnemar(*discordant(first, second)), "exact McNemar")
    known = draws_R[~np.isnan(draws_R)]
    rarer = min(np.sum(known <= 0), np.sum(known >= 0)) if len(known) else 0
    p = min(1.0, 2 * (int(rarer) + 1) / (len(known) + 1))
    return Paired(metric, num_items, one - other, interval, p, "paired bootstrap")


def quotient(first: Sequence[GradedItem], second: Sequence[GradedItem], metric: str = "accuracy", *, seed: int = 0) -> Paired:
    """`first`'s figure over `second`'s; None where that is not above 0. Raises UnusableInput as `difference` does."""
    draws_R2, num_items, standing = _draws(first, second, metric, seed)
    one, other = ratio_of(metric, first), ratio_of(metric, second)
    if one is None or other is None or other <= 0 or math.isinf(other):
        return Paired(metric, num_items, None, None, None, "paired bootstrap")
    with np.errstate(divide="ignore", invalid="ignore"):
        draws_R = draws_R2[:, 0] / draws_R2[:, 1]
    interval = interval_of(draws_R, standing, Interval(-math.inf if ENDS.get(metric, SHARE).low < 0 else 0.0, math.inf))
    return Paired(metric, num_items, one / other, interval, None, "paired bootstrap")


def _draws(
    first: Sequence[GradedItem], second: Sequence[GradedItem], metric: str, seed: int
) -> tuple[np.ndarray, int, int]:  # fmt: skip
    """float64 [R, 2]: both figures on the same draws of items; how many items there are, and how many the figure with fewer of
    them stands on."""
    first, second = matched(first, second)
    pairs = [ratio_sums(items, [metric]) for items in (first, second)]
    sums_G2, counts_G2 = (np.hstack([pair[part] for pair in pairs]) for part in (0, 1))
    if not len(sums_G2):
        return np.empty((0, 2)), 0, 0
    draws_R2 = ratio_draws(sums_G2, counts_G2, seed=seed)
    standing = min(standing_on(metric, items, counts_G2[:, column]) for column, items in enumerate((first, second)))
    draws_R2 = missed_nothing(draws_R2, [*first, *second]) if metric == "hallucination_rate" else draws_R2
    return draws_R2, len(sums_G2), standing


def matched(first: Sequence[GradedItem], second: Sequence[GradedItem]) -> tuple[list[GradedItem], list[GradedItem]]:
    """Both in one order. Raises UnusableInput when one has an attempt that the other lacks."""
    ours, theirs = ({(item.item, item.sample): item for item in items} for items in (first, second))
    if len(ours) < len(first) or len(theirs) < len(second):
        raise UnusableInput("a paired comparison needs named items, each attempt once")
    if ours.keys() != theirs.keys():
        raise UnusableInput(
            f"models that did not answer the same items cannot be compared: {len(ours.keys() - theirs.keys())} attempts only the "
            f"first has, {len(theirs.keys() - ours.keys())} only the second; evaluate both with the same suites and samples"
        )
    return [ours[key] for key in sorted(ours)], [theirs[key] for key in sorted(ours)]


def discordant(first: Sequence[GradedItem], second: Sequence[GradedItem]) -> tuple[int, int]:
    """Answerable items that only the first got right, and that only the second did."""
    right = [
        (one.grade is Grade.CORRECT, other.grade is Grade.CORRECT)
        for one, other in zip(*matched(first, second), strict=True)
        if one.is_answerable
    ]
    return right.count((True, False)), right.count((False, True))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the exact test: of `only_first` or a rarer split of all discordant items by fair coins. 1.0 without any."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, float(Fraction(2 * tail, 2**total)))
