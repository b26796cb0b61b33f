"""Which token comes next: greedy, or temperature with top-k, top-p and min-p.

The noise knows only (request seed, output position), so a row's token is a function of its own logits, its own sampling
parameters and its own seed. So a request gets the same text in any batch, at any place in the queue, after a restart, and a
prefix that is continued goes on as it would have. (Logits of one row still differ in the last bit between batch sizes, because
a GEMM blocks its sums differently; in float32 that moves about one token in a million.)

Legend: B rows, V vocabulary, K kept logits, C temperatures.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


class Sampled(NamedTuple):
    """ids_B: int64. logprobs_B: float64 natural logs of the ids under the unmodified distribution: temperature 1, no
    top-p, no banned ids."""

    ids_B: Tensor
    logprobs_B: Tensor


def _splitmix64(state: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) on int64, where multiplication wraps as uint64 does.
    Python's >> on int64 copies the sign bit in, hence the masks."""
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _MIX_1
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _MIX_2
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def uniforms(seeds_B: Tensor, positions_B: Tensor) -> Tensor:
    """float64 in [0, 1), one per (seed, output position), with 53 random bits: a counter-based generator, no state.

    The seed is mixed before the position is added, so that neighbouring seeds do not share shifted streams.
    """
    bits = _splitmix64(_splitmix64(seeds_B) + (positions_B + 1) * _GOLDEN)
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def kept_mask(probabilities_BV: Tensor, top_p_B: Tensor, top_k_B: Tensor, min_p_B: Tensor) -> Tensor:
    """True on the ids that a row may say: the top_k most likely; of those the smallest set whose share of their mass
    reaches top_p; of those the ones at least min_p times as likely as the likeliest, which is always kept. Equal
    probabilities are ranked by id. A row's own 1, 0 and 0 turn these off for it, whatever its neighbours ask."""
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(sorted_BV.shape[-1], device=sorted_BV.device)
    is_top_BV = (ranks_V < top_k_B[:, None]) | (top_k_B == 0)[:, None]
    sorted_BV = sorted_BV * is_top_BV
    running_BV = sorted_BV.cumsum(-1)
    in_nucleus_BV = running_BV - sorted_BV < top_p_B[:, None] * running_BV[:, -1:]
    kept_BV = is_top_BV & (in_nucleus_BV | (top_p_B >= 1)[:, None]) & (sorted_BV >= min_p_B[:, None] * sorted_BV[:, :1])
    kept_BV[:, 0] = True
    return torch.zeros_like(kept_BV).scatter_(-1, order_BV, kept_BV)


def inverse_cdf(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first id whose running sum exceeds uniform * total; weights need not be normalised. float64.

    Ids are walked in id order, not by rank: when two nearly equal probabilities swap ranks between batch sizes, the
    running sums move by their tiny difference instead of by a whole token.
    """
    cumulative_BV = weights_BV.cumsum(-1)
    target_B1 = (uniforms_B * cumulative_BV[:, -1])[:, None]
    picked_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
    last_possible_B = weights_BV.shape[-1] - 1 - (weights_BV.flip(-1) > 0).to(torch.uint8).argmax(-1)
    return torch.minimum(picked_B, last_possible_B)  # rounding may lift the target to the total itself


class Truncation(NamedTuple):
    """What is cut off each row's distribution: float64 top_p and min_p, int64 top_k."""

    top_p_B: Tensor
    top_k_B: Tensor
    min_p_B: Tensor


class Noise(NamedTuple):
    """How each row is sampled. temperatures and uniforms are float64; temperature 0 is greedy. truncation is None when
    every row takes its whole distribution, which saves the sort of the vocabulary."""

    temperatures_B: Tensor
    truncation: Truncation | None
    uniforms_B: Tensor


class Pairs(NamedTuple):
    """(row, id) pairs, int64: ids that may not come next (stops of rows below their min_tokens), or that have to (the end of
    a reasoning block whose budget is spent; one a row)."""

    rows_N: Tensor
    ids_N: Tensor


def sample(
    logits_BV: Tensor,
    noise: Noise | None,
    banned_V: Tensor | None = None,
    forbidden: Pairs | None = None,
    forced: Pairs | None = None,
) -> Sampled:
    """One token per row; greedy for all rows when there is no noise, with ties to the lowest id.

    logits_BV: any float dtype. banned_V: bool, True on ids that are never emitted (rows of the vocabulary above the
    tokenizer's size, padding). A forced id has the log-probability that the model gave it.
    """
    logits_BV = logits_BV.float()
    allowed_BV = logits_BV if banned_V is None else logits_BV.masked_fill(banned_V, float("-inf"))
    if forbidden is not None:
        allowed_BV = allowed_BV.index_put(forbidden, torch.full((), float("-inf"), device=logits_BV.device))
    ids_B = allowed_BV.argmax(-1)
    if noise is not None:
        is_greedy_B = noise.temperatures_B == 0
        scaled_BV = allowed_BV.double() / torch.where(is_greedy_B, 1.0, noise.temperatures_B)[:, None]
        probabilities_BV = scaled_BV.softmax(-1)
        if noise.truncation is not None:
            probabilities_BV = probabilities_BV.masked_fill(~kept_mask(probabilities_BV, *noise.truncation), 0.0)
        ids_B = torch.where(is_greedy_B, ids_B, inverse_cdf(probabilities_BV, noise.uniforms_B))
    if forced is not None:
        ids_B = ids_B.index_put((forced.rows_N,), forced.ids_N)
    return Sampled(ids_B, token_logprobs(logits_BV, ids_B))


def token_logprobs(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    """float64 natural log-probability of each row's id. The sum over the vocabulary is in float32, which is exact to
    1e-6 and half the traffic."""
    chosen_B = logits_BV.gather(-1, ids_B[:, None])[:, 0]
    return (chosen_B - logits_BV.logsumexp(-1)).double()


class Best(NamedTuple):
    """ids_BK: int32; logits_BK: float32, likeliest first; log_z_BC: float64, one column per temperature."""

    ids_BK: Tensor
    logits_BK: Tensor
    log_z_BC: Tensor


def best_logits(logits_BV: Tensor, count: int, temperatures: Sequence[float]) -> Best:
    """The `count` best logits of each row (all of a smaller vocabulary), and log sum exp(logits / temperature) over the
    whole vocabulary: with it the mass outside the top is exact (a uniform tail gave a KL of 0.29 where the truth was
    0.78, at 154,880 ids, 128 kept, temperature 2)."""
    logits_BV = logits_BV.float()
    top = logits_BV.topk(min(count, logits_BV.shape[-1]))
    log_z_BC = torch.stack([(logits_BV / temperature).logsumexp(-1).double() for temperature in temperatures], dim=-1)
    return Best(top.indices.int(), top.values, log_z_BC)
