"""Bootstrap intervals of ratios of sums, drawing whole groups again: the attempts at an item stand or fall together, and drawn
one by one they would look like that many independent witnesses.

    G groups    M metrics    R resamples
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 4000
NUM_CURVE_RESAMPLES = 1000
"""Of figures that are no ratio of sums (student/curves.py), which cost a pass over all rows each time."""
Z = 1.959963984540054
"""Of 95 %, two-sided."""
_CELLS = 1 << 22


class Interval(NamedTuple):
    """A two-sided 95 % percentile bootstrap interval."""

    low: float
    high: float


def ratio_draws(sums_GM: np.ndarray, counts_GM: np.ndarray, *, seed: int, num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """float64 [R, M]: sum over the drawn groups of sums / of counts, every metric on the same draws. NaN where counts come to 0;
    inf where they do and sums do not."""
    num_metrics = sums_GM.shape[1]
    ratios_RM = np.empty((num_resamples, num_metrics))
    stacked_GM = np.hstack([sums_GM, counts_GM]).astype(np.float64)
    row = 0
    at_once = max(1, _CELLS // max(len(sums_GM), 1))
    for weights_RG in draw_weights(len(sums_GM), seed, num_resamples, at_once=at_once):
        drawn_RM = weights_RG @ stacked_GM
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios_RM[row : row + len(weights_RG)] = drawn_RM[:, :num_metrics] / drawn_RM[:, num_metrics:]
        row += len(weights_RG)
    return ratios_RM


def draw_weights(num_groups: int, seed: int, num_resamples: int, *, at_once: int) -> Iterator[np.ndarray]:
    """How often each group was drawn, float64 [at most at_once, G]; the draws do not depend on at_once."""
    random = np.random.default_rng(seed)
    for start in range(0, num_resamples, at_once):
        drawn_RG = random.integers(0, num_groups, (min(at_once, num_resamples - start), num_groups))
        yield np.stack([np.bincount(drawn_G, minlength=num_groups) for drawn_G in drawn_RG]).astype(np.float64)


def interval_of(draws_R: np.ndarray, num_groups: int, ends: Interval) -> Interval | None:
    """Draws in which there was nothing to measure are left out; None when all are. Its ends are draws, not between two of them:
    nothing is between a number and infinity.

    num_groups: that the figure stands on. ends: the least and the most that it can be. Where all draws coincide, two groups would
    be as certain as two thousand: what has not been seen in N groups may be z^2 / (N + z^2) of them (for a share of 0 or 1 that
    is Wilson's interval), and each of those may lie at either end.
    """
    known = draws_R[~np.isnan(draws_R)]
    if not len(known):
        return None
    low, high = float(np.quantile(known, 0.025, method="lower")), float(np.quantile(known, 0.975, method="higher"))
    if low < high or not num_groups:  # none: dollars for nothing completed, which are infinite however often one draws
        return Interval(low, high)
    seen = num_groups / (num_groups + Z**2)
    return Interval(seen * low + (1 - seen) * ends.low, seen * high + (1 - seen) * ends.high)
