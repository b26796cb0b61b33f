"""Figures of a confidence on resampled rows, without sorting any resample: rows are sorted once, and drawing one again only
changes how often it counts.

    N rows    G groups, drawn whole    R resamples    K different forecasts, descending

Each figure equals that of data/calibration_metrics.py on the rows written out as often as they were drawn.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data.calibration_metrics import NUM_BINS, RISK
from student.resampling import NUM_CURVE_RESAMPLES, draw_weights

_CELLS = 1 << 21
Counts = np.ndarray
"""float64 [R, K]: how many rows of each forecast were drawn."""


class Curve:
    """Rows by forecast. p_N: float64. correct_N: bool. groups_N: int64, 0 to G - 1, each there."""

    def __init__(self, p_N: np.ndarray, correct_N: np.ndarray, groups_N: np.ndarray) -> None:
        order = np.argsort(-p_N, kind="stable")
        self.groups_N, self.correct_N = groups_N[order], correct_N[order]
        self.p_K, self._starts_K = np.unique(-p_N[order], return_index=True)
        self.p_K = -self.p_K

    def counts(self, weights_RG: np.ndarray) -> tuple[Counts, Counts]:
        """Rows drawn of each forecast, and those of them that are correct. weights_RG: how often each group was drawn."""
        weights_RN = weights_RG[:, self.groups_N]
        rows_RK = np.add.reduceat(weights_RN, self._starts_K, axis=1)
        weights_RN *= self.correct_N
        return rows_RK, np.add.reduceat(weights_RN, self._starts_K, axis=1)


def ece(p_K: np.ndarray, rows_RK: Counts, right_RK: Counts) -> np.ndarray:
    """float64 [R]: bins of equal width."""
    edges = np.arange(NUM_BINS + 1) / NUM_BINS
    bin_K = np.clip(np.searchsorted(edges, p_K, side="left") - 1, 0, NUM_BINS - 1)
    gaps = right_RK - rows_RK * p_K
    in_bins = [gaps[:, bin_K == number].sum(axis=1) for number in np.unique(bin_K)]
    return np.abs(in_bins).sum(axis=0) / rows_RK.sum(axis=1)


def adaptive_ece(p_K: np.ndarray, rows_RK: Counts, right_RK: Counts) -> np.ndarray:
    """float64 [R]: bins of equal mass, which differ from one resample to the next."""
    total_R = rows_RK.sum(axis=1)
    below_RK = total_R[:, None] - np.cumsum(rows_RK, axis=1)  # rows with a lower forecast: ranks count from the lowest
    # The highest forecasts, where none of their rows was drawn, have all rows below them: no bin, and nothing to add to one.
    bin_RK = np.minimum(NUM_BINS * below_RK // total_R[:, None], NUM_BINS - 1).astype(np.int64)
    bin_RK += NUM_BINS * np.arange(len(total_R))[:, None]
    gaps = np.bincount(bin_RK.ravel(), (right_RK - rows_RK * p_K).ravel(), minlength=NUM_BINS * len(total_R))
    return np.abs(gaps).reshape(len(total_R), NUM_BINS).sum(axis=1) / total_R


def aurc(p_K: np.ndarray, rows_RK: Counts, right_RK: Counts) -> np.ndarray:
    """float64 [R]. After n rows with e wrong ones, a tie of m rows of which a share r is wrong adds sum over j = 1 .. m of
    (e + j r) / (n + j), which is m r + (e - n r) (H(n + m) - H(n)), H the harmonic numbers."""
    wrong_RK, upto_RK = rows_RK - right_RK, np.cumsum(rows_RK, axis=1)
    before_RK, errors_RK = upto_RK - rows_RK, np.cumsum(wrong_RK, axis=1) - wrong_RK
    with np.errstate(invalid="ignore"):
        share_RK = np.where(rows_RK > 0, wrong_RK / rows_RK, 0.0)
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, int(upto_RK[:, -1].max()) + 1))])
    spans_RK = harmonic[upto_RK.astype(np.int64)] - harmonic[before_RK.astype(np.int64)]
    return (wrong_RK + (errors_RK - before_RK * share_RK) * spans_RK).sum(axis=1) / upto_RK[:, -1]


def coverage_at_risk(p_K: np.ndarray, rows_RK: Counts, right_RK: Counts) -> np.ndarray:
    """float64 [R]: at most RISK wrong; 0 where no threshold keeps that."""
    upto_RK = np.cumsum(rows_RK, axis=1)
    with np.errstate(invalid="ignore"):
        risk_RK = np.cumsum(rows_RK - right_RK, axis=1) / upto_RK
    good_RK = (rows_RK > 0) & (risk_RK <= RISK)
    return np.where(good_RK, upto_RK, 0.0).max(axis=1) / upto_RK[:, -1]


CurveFigure = Callable[[np.ndarray, Counts, Counts], np.ndarray]
FIGURES: Mapping[str, CurveFigure] = {
    "ece": ece, "adaptive_ece": adaptive_ece, "aurc": aurc, "coverage_at_5_risk": coverage_at_risk,
}  # fmt: skip


def curve_draws(
    p_N: np.ndarray, correct_N: np.ndarray, groups_N: np.ndarray, names: Sequence[str], *, seed: int,
    num_resamples: int = NUM_CURVE_RESAMPLES,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Figure -> float64 [R], all on the same draws. At least one row."""
    curve = Curve(p_N, correct_N, groups_N)
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    at_once = max(1, _CELLS // len(p_N))
    for weights_RG in draw_weights(int(groups_N.max()) + 1, seed, num_resamples, at_once=at_once):
        rows_RK, right_RK = curve.counts(weights_RG)
        for name in names:
            found[name].append(FIGURES[name](curve.p_K, rows_RK, right_RK))
    return {name: np.concatenate(parts) for name, parts in found.items()}
