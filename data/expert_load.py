"""How evenly a mixture of experts was used: figures over counts of routed tokens. Pure, numpy in and numpy out.

A count is of assignments: a token counts once at each of its K experts. So a busiest expert stands at most at E / K times
the mean (every token passes it), and even a collapsed router keeps exp(H) / E at K / E.

Legend: E routed experts of a layer, L sparse layers (the l-th router of the model), R expert-parallel ranks, K experts a
token goes to; X stands for any leading dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from configs.schema import ExpertAlarm
from data.engine import ExpertLoad

HOTTEST = 3


class LoadMetrics(NamedTuple):
    """Figures of each row of counts, all of shape [X]; nothing routed is all zeros.

    cv: standard deviation over mean. max_over_mean: the busiest over the mean, 1 is even, E is one for everything.
    effective_share: exp(H) / E in (0, 1], the share in effective use. dead_share: the share without a token.
    """

    cv: np.ndarray
    max_over_mean: np.ndarray
    effective_share: np.ndarray
    dead_share: np.ndarray


@dataclass(frozen=True, slots=True)
class CountedLoad(ExpertLoad):
    """A request's load with what it was made from, counts[layer][expert]. An engine that only hears a summary from its
    server gives the plain ExpertLoad."""

    counts: tuple[tuple[int, ...], ...]


def shares(counts_XE: np.ndarray) -> np.ndarray:
    """[X, E] float64: each row over its sum; zeros where nothing was routed."""
    return counts_XE / np.maximum(counts_XE.sum(-1, keepdims=True), 1)


def entropy_nats(share_XE: np.ndarray) -> np.ndarray:
    return -(share_XE * np.log(share_XE, out=np.zeros_like(share_XE), where=share_XE > 0)).sum(-1)


def load_metrics(counts_XE: np.ndarray) -> LoadMetrics:
    share_XE, num_experts = shares(counts_XE), counts_XE.shape[-1]
    is_used_X = counts_XE.sum(-1) > 0
    return LoadMetrics(
        cv=share_XE.std(-1) * num_experts,
        max_over_mean=share_XE.max(-1) * num_experts,
        effective_share=np.where(is_used_X, np.exp(entropy_nats(share_XE)) / num_experts, 0.0),
        dead_share=np.where(is_used_X, (counts_XE == 0).mean(-1), 0.0),
    )


def rank_loads(counts_XE: np.ndarray, expert_parallel: int) -> np.ndarray:
    """[X, R]: AutoEP gives each expert-parallel rank a contiguous block of experts. Raises ValueError unless R divides E."""
    num_experts = counts_XE.shape[-1]
    if num_experts % expert_parallel:
        raise ValueError(f"expert_parallel {expert_parallel} does not divide {num_experts} experts")
    return counts_XE.reshape(*counts_XE.shape[:-1], expert_parallel, -1).sum(-1)


def top_share(counts_XE: np.ndarray, top: int) -> np.ndarray:
    """[X]: share of the assignments that the `top` busiest experts of a row took. With top = K, even is K / E, collapse 1."""
    return np.sort(shares(counts_XE), axis=-1)[..., -top:].sum(-1)


def hottest(counts_XE: np.ndarray, count: int = HOTTEST) -> np.ndarray:
    """[X, count] experts of each row, busiest first, ties in their own order."""
    return np.argsort(-counts_XE, axis=-1, kind="stable")[..., :count]


def js_divergence(one_XE: np.ndarray, other_XE: np.ndarray) -> np.ndarray:
    """[X]: Jensen-Shannon divergence of two loads, in nats: 0 for equal shares, ln 2 for experts of their own. Both sides
    weigh one half, however many tokens they have. NaN where a side has no tokens. Source: Lin 1991, eq. 4.1."""
    one_XE, other_XE = shares(one_XE), shares(other_XE)
    divergence_X = entropy_nats((one_XE + other_XE) / 2) - (entropy_nats(one_XE) + entropy_nats(other_XE)) / 2
    has_both_X = (one_XE.sum(-1) > 0) & (other_XE.sum(-1) > 0)
    return np.where(has_both_X, np.clip(divergence_X, 0.0, np.log(2)), np.nan)


def js_by_chance(one_total: np.ndarray, other_total: np.ndarray, num_experts: int) -> np.ndarray:
    """Expected js_divergence, in nats, of two samples of so many independent assignments from one and the same load: (E - 1) / 8
    x (1 / n + 1 / m), the leading term of its expansion (experts expected to be drawn a few times each). Tokens of
    one text resemble each other, so real chance is above it."""
    return (num_experts - 1) / 8 * (1 / np.maximum(one_total, 1) + 1 / np.maximum(other_total, 1))


def summarise(counts_LE: np.ndarray) -> CountedLoad:
    """One request's load, averaged over sparse layers."""
    metrics, num_experts = load_metrics(counts_LE), counts_LE.shape[-1]
    busiest = hottest(shares(counts_LE).reshape(-1)).tolist()
    return CountedLoad(
        max_over_mean=float(metrics.max_over_mean.mean()),
        entropy=float(metrics.effective_share.mean()),
        hottest=tuple((index // num_experts, index % num_experts) for index in busiest),
        counts=tuple(map(tuple, counts_LE.tolist())),
    )


# --- collapse ----------------------------------------------------------------------------------------------------


class Collapse(NamedTuple):
    """A layer's figure on the wrong side of the recipe's threshold."""

    layer: int
    figure: str
    value: float
    threshold: float

    def __str__(self) -> str:
        side = "above" if self.value > self.threshold else "below"
        return f"sparse layer {self.layer}: {self.figure} {self.value:.3g}, {side} {self.threshold:g}"


def collapses(counts_LE: np.ndarray, alarm: ExpertAlarm) -> list[Collapse]:
    """What looks like collapse, a layer and figure each; layers with too few assignments to judge are left out."""
    metrics = load_metrics(counts_LE)
    bounds: Sequence[tuple[str, np.ndarray, float, int]] = (
        ("max_over_mean", metrics.max_over_mean, alarm.max_over_mean, 1),
        ("effective_share", metrics.effective_share, alarm.effective_share, -1),
        ("dead_share", metrics.dead_share, alarm.dead_share, 1),
    )
    return [
        Collapse(layer, figure, float(values_L[layer]), threshold)
        for layer in np.flatnonzero(counts_LE.mean(-1) >= alarm.minimum_mean_load).tolist()
        for figure, values_L, threshold, sign in bounds
        if sign * (values_L[layer] - threshold) > 0
    ]
