"""How good a probability is: pure metrics over N forecasts and what came of them.

    p_N        float64 in [0, 1], forecast probability of being correct
    correct_N  bool, what came of it
    groups_N   integers, rows with the same number belong together (the samples of a prompt); resampled as one

No figure depends on the order of the rows: rows with equal forecasts are treated alike. A figure over no rows is None, never 0.
"""

import math
from typing import NamedTuple

import numpy as np

from data.groups import running_total

NUM_BINS = 15
NUM_RESAMPLES = 1000
RISK = 0.05
ONE_SIDED_95 = 1.6448536269514722
"""The standard normal's 95 % quantile."""
TWO_SIDED_95 = 1.959963984540054
"""Its 97.5 % quantile."""
_BOOTSTRAP_CELLS = 1 << 22
_ERROR_UNITS = float(1 << 30)
"""Errors are added up as whole units, so that the sums do not depend on how groups are numbered."""


class Bin(NamedTuple):
    """One row of a reliability table. low, high: the forecasts' range, low excluded (but for 0); of an equal-mass bin, the least
    and the greatest forecast in it. mean_p, accuracy: None when num_rows is 0."""

    low: float
    high: float
    num_rows: int
    mean_p: float | None
    accuracy: float | None


class Estimate(NamedTuple):
    """A mean and its two-sided 95 % bootstrap interval over groups."""

    value: float
    low: float
    high: float


# --- calibration -------------------------------------------------------------------------------------------------


def reliability(p_N: np.ndarray, correct_N: np.ndarray, *, num_bins: int = NUM_BINS) -> tuple[Bin, ...]:
    """Equal-width bins (0, 1/B], (1/B, 2/B], ..., empty ones included; a forecast of 0 stands in the first (Guo et al. 2017)."""
    edges = np.arange(num_bins + 1) / num_bins
    bin_N = np.clip(np.searchsorted(edges, p_N, side="left") - 1, 0, num_bins - 1)
    return tuple(
        _bin(float(edges[number]), float(edges[number + 1]), p_N[bin_N == number], correct_N[bin_N == number])
        for number in range(num_bins)
    )


def equal_mass(p_N: np.ndarray, correct_N: np.ndarray, *, num_bins: int = NUM_BINS) -> tuple[Bin, ...]:
    """Bins of about N / B rows each, no empty ones. Equal forecasts share the bin of the first of them, so that no bin's content
    is decided by the order of the rows."""
    sorted_N = np.sort(p_N)
    bin_N = num_bins * np.searchsorted(sorted_N, p_N, side="left") // max(len(p_N), 1)
    members = [(p_N[bin_N == number], correct_N[bin_N == number]) for number in np.unique(bin_N)]
    return tuple(_bin(float(forecasts.min()), float(forecasts.max()), forecasts, came) for forecasts, came in members)


def _bin(low: float, high: float, p_N: np.ndarray, correct_N: np.ndarray) -> Bin:
    return Bin(low, high, len(p_N), _mean(p_N), _mean(correct_N))


def _mean(values_N: np.ndarray) -> float | None:
    """Sorted first: the last bits of a float sum would follow the order of the rows."""
    return float(np.mean(np.sort(values_N))) if len(values_N) else None


def calibration_error(bins: tuple[Bin, ...]) -> float | None:
    """Mean of |accuracy - mean forecast| over bins, weighted by their rows: ECE on `reliability`, its adaptive form on
    `equal_mass` (Nixon et al. 2019)."""
    gaps = [
        each.num_rows * abs(each.accuracy - each.mean_p) for each in bins if each.accuracy is not None and each.mean_p is not None
    ]
    return sum(gaps) / sum(each.num_rows for each in bins) if gaps else None


def brier(p_N: np.ndarray, correct_N: np.ndarray) -> float | None:
    """Mean squared error of the forecast, in [0, 1]; a coin's 0.5 earns 0.25."""
    return _mean((p_N - correct_N) ** 2)


def log_loss(p_N: np.ndarray, correct_N: np.ndarray) -> float | None:
    """Mean negative log likelihood in nats. Forecasts are held 1e-15 off 0 and 1, so that one miss costs at most 34.5."""
    held_N = np.clip(p_N, 1e-15, 1.0 - 1e-15)
    return _mean(-np.log(np.where(correct_N, held_N, 1.0 - held_N)))


# --- ranking -----------------------------------------------------------------------------------------------------


def auroc(p_N: np.ndarray, correct_N: np.ndarray) -> float | None:
    """Probability that a correct row is forecast higher than a wrong one, ties counting half. None without both."""
    num_correct, num_wrong = int(np.sum(correct_N)), int(np.sum(~correct_N))
    if not num_correct or not num_wrong:
        return None
    sorted_N = np.sort(p_N)
    below, upto = (np.searchsorted(sorted_N, p_N[correct_N], side=side) for side in ("left", "right"))
    rank_sum = (below + upto + 1).sum() / 2  # mean rank of each tie, counted from 1; halves are exact in float64
    return float((rank_sum - num_correct * (num_correct + 1) / 2) / (num_correct * num_wrong))


class RiskCoverage(NamedTuple):
    """If the N likeliest rows are answered. risk_N: expected share of wrong ones among the first 1, 2, ... N; rows that tie are
    taken in random order. cuttable_N: True where a threshold on the forecast can stop, which is after the last of a tie."""

    risk_N: np.ndarray
    cuttable_N: np.ndarray


def risk_coverage(p_N: np.ndarray, correct_N: np.ndarray) -> RiskCoverage:
    order = np.argsort(-p_N, kind="stable")
    _, tie_N, sizes = np.unique(-p_N[order], return_inverse=True, return_counts=True)
    wrong = np.bincount(tie_N, ~correct_N[order])
    expected_N = np.cumsum((wrong / sizes)[tie_N])
    ends = np.cumsum(sizes) - 1
    expected_N[ends] = np.cumsum(wrong)  # exact at the ends of ties, where cuts are made
    cuttable_N = np.zeros(len(p_N), bool)
    cuttable_N[ends] = True
    return RiskCoverage(expected_N / np.arange(1, len(p_N) + 1), cuttable_N)


def aurc(p_N: np.ndarray, correct_N: np.ndarray) -> float | None:
    """Mean risk over all coverages 1/N, 2/N, ... 1: area under the risk-coverage curve (Geifman et al. 2019). Lower is better."""
    return float(np.mean(risk_coverage(p_N, correct_N).risk_N)) if len(p_N) else None


def coverage_at_risk(p_N: np.ndarray, correct_N: np.ndarray, *, risk: float = RISK) -> float | None:
    """Largest share of the rows that some threshold on the forecast keeps with at most `risk` of them wrong; 0 when none does."""
    if not len(p_N):
        return None
    curve = risk_coverage(p_N, correct_N)
    good = np.flatnonzero(curve.cuttable_N & (curve.risk_N <= risk))
    return float((good[-1] + 1) / len(p_N)) if len(good) else 0.0


# --- intervals ---------------------------------------------------------------------------------------------------


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a share in [0, 1], total > 0. Source: Wilson 1927; unlike p +- 2 s it is right at 0 and at 1, too."""
    share, spread = correct / total, TWO_SIDED_95**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = TWO_SIDED_95 / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return (centre - half if correct else 0.0), (centre + half if correct < total else 1.0)  # exact where rounding is not


def bootstrap_mean(
    values_N: np.ndarray, groups_N: np.ndarray, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Estimate | None:
    """Mean of values_N with the percentile interval of drawing whole groups again with replacement.

    The samples of a prompt stand or fall together: drawn one by one they would look like that many independent witnesses.
    """
    if not len(values_N):
        return None
    sums_G, counts_G = _group_sums(values_N, groups_N)
    means = np.empty(num_resamples)
    random = np.random.default_rng(seed)
    at_once = max(1, _BOOTSTRAP_CELLS // len(sums_G))
    for start in range(0, num_resamples, at_once):
        drawn_RG = random.integers(0, len(sums_G), (min(at_once, num_resamples - start), len(sums_G)))
        means[start : start + at_once] = sums_G[drawn_RG].sum(axis=1) / counts_G[drawn_RG].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(sums_G.sum() / counts_G.sum()), float(low), float(high))


def _group_sums(values_N: np.ndarray, groups_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and rows of each group, sorted by both: neither the groups' numbers nor the rows' order reach the random draws.
    Within a group the values are added smallest first, for the same reason."""
    order = np.lexsort((values_N, groups_N))
    _, group_N = np.unique(groups_N[order], return_inverse=True)
    sums_G = np.bincount(group_N, values_N[order].astype(float))
    counts_G = np.bincount(group_N)
    by_value = np.lexsort((counts_G, sums_G))
    return sums_G[by_value], counts_G[by_value]


def error_bounds(errors_K: np.ndarray, groups_K: np.ndarray) -> np.ndarray:
    """Upper end of the one-sided 95 % interval of the mean of the first 1, 2, ... K errors (in [0, 1], in the order given).

    The standard error is that of a ratio over groups, sum over groups of (errors - mean x rows)^2 x G / (G - 1), which is what
    a bootstrap over groups comes to, for every prefix at once; of a single group it is infinite. Whoever takes the largest of
    many prefixes that pass takes a lucky one: the bound is a rule, and only rows with known outcomes can test it.
    """
    everything, ones_K = np.arange(len(errors_K)), np.ones(len(errors_K), np.int64)
    units_K = np.rint(errors_K * _ERROR_UNITS).astype(np.int64)
    errors_K = units_K / _ERROR_UNITS
    before_K = running_total(groups_K, units_K, everything) / _ERROR_UNITS - errors_K
    rank_K = running_total(groups_K, ones_K, everything) - 1
    rows_K, groups_seen_K = everything + 1, np.cumsum(rank_K == 0)
    mean_K = np.cumsum(units_K) / _ERROR_UNITS / rows_K
    # One more row of error e in a group with errors s in n rows adds this much to the sums of s^2, s n and n^2 over groups.
    squares_K = np.cumsum(2 * before_K * errors_K + errors_K**2)
    products_K = np.cumsum(before_K + errors_K * (rank_K + 1))
    sizes_K = np.cumsum(2 * rank_K + 1)
    spread_K = np.maximum(squares_K - 2 * mean_K * products_K + mean_K**2 * sizes_K, 0.0)
    variance_K = spread_K * groups_seen_K / np.maximum(groups_seen_K - 1, 1) / rows_K**2
    return mean_K + np.where(groups_seen_K > 1, ONE_SIDED_95 * np.sqrt(variance_K), np.inf)
