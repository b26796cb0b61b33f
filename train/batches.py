"""Which trace is trained when, where and beside which others. Pure: lengths and seeds in, indices and counts out.

No packing: rows are right-padded, and a step's rows are sorted by length before they are cut into micro-batches, which
keeps padding to a few per cent. Isolation of traces is then a matter of separate rows.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data.chat import Encoded


class Example(NamedTuple):
    """One trace in the student's tokens."""

    trace_id: str
    encoded: Encoded


@dataclass(frozen=True, slots=True)
class TokenLedger:
    """Where every token of a set of traces went. total == trained + masked + sum of dropped, always.

    trained: tokens with a loss. masked: prompt and template tokens, and a first token that nothing predicts.
    dropped: tokens of traces that are not trained at all, by reason; dropped_traces counts the same traces.
    """

    traces: int = 0
    total: int = 0
    trained: int = 0
    masked: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_traces: dict[str, int] = field(default_factory=dict)

    @property
    def balances(self) -> bool:
        return self.total == self.trained + self.masked + sum(self.dropped.values())


class Admitted(NamedTuple):
    rows_R: np.ndarray
    """int64: which of the traces are trained, ascending."""
    ledger: TokenLedger


def num_trained(encoded: Encoded) -> int:
    """Supervised positions of a row: the first token has no prediction, whatever its mask."""
    return sum(encoded.mask[1:])


def admit(lengths_N: np.ndarray, trained_N: np.ndarray, max_tokens: int) -> Admitted:
    """The traces of at most `max_tokens` tokens. A longer one is dropped whole and counted as `over_length`; cutting it
    would teach answers that never come, or an end of turn in mid-thought.

    lengths_N, trained_N: tokens and supervised positions (num_trained) of N traces.
    """
    fits_N = lengths_N <= max_tokens
    total, kept, trained = int(lengths_N.sum()), int(lengths_N[fits_N].sum()), int(trained_N[fits_N].sum())
    over = int((~fits_N).sum())
    dropped, counted = ({"over_length": total - kept}, {"over_length": over}) if over else ({}, {})
    ledger = TokenLedger(len(lengths_N), total, trained, kept - trained, dropped, counted)
    assert ledger.balances
    return Admitted(np.flatnonzero(fits_N), ledger)


def visiting_order(num_traces: int, epochs: float, seed: int) -> list[int]:
    """Indices of traces in the order they are trained: one full permutation after another, the last one cut for a
    fractional number of epochs. Epoch e's permutation depends on (seed, e) alone."""
    visits = max(1, round(num_traces * epochs))
    order: list[int] = []
    for epoch in range(math.ceil(visits / num_traces)):
        permutation = list(range(num_traces))
        random.Random(f"order {seed} {epoch}").shuffle(permutation)
        order += permutation
    return order[:visits]


def step_members(order: Sequence[int], traces_per_step: int) -> list[Sequence[int]]:
    """The traces of each optimizer step.

    A step may span the border of two epochs, so only the last step of the whole run can be short. It is trained, not
    dropped: its gradient is normalised by its own tokens, and the learning rate is next to zero there.
    """
    return [order[start : start + traces_per_step] for start in range(0, len(order), traces_per_step)]


def plan_micro_batches(lengths: Sequence[int], world_size: int, tokens_per_micro_batch: int) -> list[list[list[int]]]:
    """Positions of `lengths` for each rank and micro-batch: plan[rank][micro_batch] is a list of positions.

    Every position occurs once. Padded tokens (rows times longest row) of a micro-batch stay within
    tokens_per_micro_batch, which no single row may exceed. All ranks get equally many micro-batches, because each one is
    a collective under ZeRO; some may be empty when rows are few. Among such plans this takes the fewest micro-batches,
    then the smallest cost of the dearest one, so that ranks finish together.
    """
    assert lengths and max(lengths) <= tokens_per_micro_batch
    by_length = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    num_bins = world_size
    while len(bins := _fill(by_length, lengths, tokens_per_micro_batch)) > num_bins:
        num_bins += world_size
    low, high = max(lengths) - 1, tokens_per_micro_batch  # _fill fits into num_bins at high, never at low
    while high - low > 1:
        middle = (low + high) // 2
        if len(candidate := _fill(by_length, lengths, middle)) <= num_bins:
            high, bins = middle, candidate
        else:
            low = middle
    bins += [[] for _ in range(num_bins - len(bins))]
    return [bins[rank::world_size] for rank in range(world_size)]


def _fill(by_length: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive runs of `by_length` (longest first) whose padded tokens stay within `limit`."""
    bins: list[list[int]] = []
    for position in by_length:
        if bins and (len(bins[-1]) + 1) * lengths[bins[-1][0]] <= limit:
            bins[-1].append(position)
        else:
            bins.append([position])
    return bins
