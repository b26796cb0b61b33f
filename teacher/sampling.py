"""Which token comes next: greedy, temperature and top-p, from noise that knows only (request seed, output position).

A row's token is a function of its own logits, its own sampling parameters and its own seed. So a request gets the same
text in any batch, at any place in the queue, after a restart, and a prefix that is continued goes on as it would have.
(Logits of one row still differ in the last bit between batch sizes, because a GEMM blocks its sums differently; in
float32 that moves about one token in a million.)

Legend: B rows, V vocabulary.
"""

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


def nucleus_mask(probabilities_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """True on the smallest set of most likely ids whose mass reaches top_p; the most likely id is always in it.
    Equal probabilities are ranked by id."""
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    mass_before_BV = sorted_BV.cumsum(-1) - sorted_BV
    kept_BV = mass_before_BV < top_p_B[:, None]
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


class Noise(NamedTuple):
    """How each row is sampled, float64. temperature 0 is greedy. top_p_B is None when every row takes the whole
    distribution, which saves the sort of the vocabulary."""

    temperatures_B: Tensor
    top_p_B: Tensor | None
    uniforms_B: Tensor


def sample(logits_BV: Tensor, noise: Noise | None, banned_V: Tensor | None = None) -> Sampled:
    """One token per row; greedy for all rows when there is no noise, with ties to the lowest id.

    logits_BV: any float dtype. banned_V: bool, True on ids that are never emitted (rows of the vocabulary above the
    tokenizer's size).
    """
    logits_BV = logits_BV.float()
    allowed_BV = logits_BV if banned_V is None else logits_BV.masked_fill(banned_V, float("-inf"))
    ids_B = allowed_BV.argmax(-1)
    if noise is not None:
        is_greedy_B = noise.temperatures_B == 0
        scaled_BV = allowed_BV.double() / torch.where(is_greedy_B, 1.0, noise.temperatures_B)[:, None]
        probabilities_BV = scaled_BV.softmax(-1)
        if noise.top_p_B is not None:
            probabilities_BV = probabilities_BV.masked_fill(~nucleus_mask(probabilities_BV, noise.top_p_B), 0.0)
        ids_B = torch.where(is_greedy_B, ids_B, inverse_cdf(probabilities_BV, noise.uniforms_B))
    return Sampled(ids_B, token_logprobs(logits_BV, ids_B))


def token_logprobs(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    """float64 natural log-probability of each row's id. The sum over the vocabulary is in float32, which is exact to
    1e-6 and half the traffic."""
    chosen_B = logits_BV.gather(-1, ids_B[:, None])[:, 0]
    return (chosen_B - logits_BV.logsumexp(-1)).double()
