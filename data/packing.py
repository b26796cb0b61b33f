"""Documents into rows of bounded length: best-fit decreasing over the whole set. Lengths in, indices out; no document is cut.

The longest document comes first, and each goes where it leaves the least space. What is left of a row after the long ones is
filled by the many short ones at the end, so that 10,000 log-normal lengths waste under a thousandth of their rows.

Shape suffixes: N documents, R rows, R1 = R + 1 offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WORD_BITS = 10
"""Spaces are looked up in words of 2^10 bits; of 6, 8, 9, 10 and 12 the best compromise for rows of 8 K to 1 M tokens."""

Seed = int | tuple[int, ...]
"""Not negative."""


@dataclass(frozen=True, slots=True)
class Packing:
    """R rows without an empty one. Row r holds the documents members_N[offsets_R1[r] : offsets_R1[r + 1]].

    tokens_R: sum of their lengths. capacities_R: the first of the capacities that holds it. All int64.
    """

    members_N: np.ndarray
    offsets_R1: np.ndarray
    tokens_R: np.ndarray
    capacities_R: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens_R)

    def row(self, index: int) -> np.ndarray:
        """int64: its documents."""
        return self.members_N[self.offsets_R1[index] : self.offsets_R1[index + 1]]

    @property
    def waste(self) -> float:
        """Share of the rows' capacity that holds no token."""
        return 1.0 - int(self.tokens_R.sum()) / int(self.capacities_R.sum()) if len(self) else 0.0

    def sums(self, values_N: np.ndarray) -> np.ndarray:
        """Each row's sum of its documents' values."""
        return np.add.reduceat(values_N[self.members_N], self.offsets_R1[:-1]) if len(self) else values_N[:0]


def packing_of(rows_N: np.ndarray, documents_N: np.ndarray, lengths_N: np.ndarray, capacities: Sequence[int]) -> Packing:
    """documents_N[i] stands in row rows_N[i]; rows are numbered from 0 without a gap, and keep their documents' order."""
    members_N = documents_N[np.argsort(rows_N, kind="stable")]
    counts_R = np.bincount(rows_N)
    offsets_R1 = np.concatenate(([0], np.cumsum(counts_R)))
    tokens_R = np.bincount(rows_N, weights=lengths_N[documents_N]).astype(np.int64)  # exact below 2^53 tokens a row
    ascending = np.asarray(capacities, dtype=np.int64)
    return Packing(members_N, offsets_R1, tokens_R, ascending[np.searchsorted(ascending, tokens_R)])


def random_keys(count: int, seed: Seed) -> np.ndarray:
    """uint64: to shuffle by sorting. A bit generator's raw stream is the same in every NumPy; permutations of a Generator may
    change with a version (NEP 19), and a resume would see other rows."""
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)


def pack(lengths_N: np.ndarray, capacities: Sequence[int], seed: Seed) -> Packing:
    """Every document once, in rows as few as best-fit decreasing needs, a row's longest document first. Ties between equal
    lengths fall by `seed`, which changes neither the number of rows nor what they hold in tokens.

    lengths_N: int64, each at least 1 and at most the last capacity. capacities: ascending. A document above the first opens
    a row of the first one that holds it; what it leaves there is for shorter ones, as in any other row.
    """
    assert list(capacities) == sorted(set(capacities)), capacities
    lengths_N = np.asarray(lengths_N, dtype=np.int64)
    if not len(lengths_N):
        return Packing(*(np.zeros(size, dtype=np.int64) for size in (0, 1, 0, 0)))
    assert lengths_N.min() >= 1 and lengths_N.max() <= capacities[-1], (lengths_N.min(), lengths_N.max(), capacities)
    documents_N = np.lexsort((random_keys(len(lengths_N), seed), -lengths_N))
    rows_N = _best_fit(lengths_N[documents_N], capacities)
    return packing_of(rows_N, documents_N, lengths_N, capacities)


def _best_fit(descending_N: np.ndarray, capacities: Sequence[int]) -> np.ndarray:
    """The row of each document, rows numbered as they are opened."""
    opens_N = np.asarray(capacities)[np.searchsorted(capacities, descending_N)]
    spaces = Spaces(capacities[-1])
    rows: list[int] = []
    num_rows = 0
    for length, capacity in zip(descending_N.tolist(), opens_N.tolist(), strict=True):
        if (space := spaces.smallest(length)) is None:
            row, space = num_rows, capacity
            num_rows += 1
        else:
            row = spaces.pop(space)
        if space > length:
            spaces.push(space - length, row)
        rows.append(row)
    return np.array(rows, dtype=np.int64)


class Spaces:
    """Open rows by the space that is left in them. A million of them are looked up in under a microsecond each: Python's
    integers are the bit sets, a word of spaces and one of which words are not empty."""

    def __init__(self, largest: int) -> None:
        self.words = [0] * ((largest >> WORD_BITS) + 1)
        self.summary = 0
        self.rows: dict[int, list[int]] = {}

    def smallest(self, length: int) -> int | None:
        """The least space of at least `length`."""
        word = length >> WORD_BITS
        found = self.words[word] >> (length & ((1 << WORD_BITS) - 1))
        if found:
            return length + _lowest(found)
        above = self.summary >> (word + 1)
        if not above:
            return None
        word += 1 + _lowest(above)
        return (word << WORD_BITS) + _lowest(self.words[word])

    def push(self, space: int, row: int) -> None:
        if rows := self.rows.get(space):
            rows.append(row)
            return
        self.rows[space] = [row]
        word = space >> WORD_BITS
        self.words[word] |= 1 << (space & ((1 << WORD_BITS) - 1))
        self.summary |= 1 << word

    def pop(self, space: int) -> int:
        """A row with exactly that space, the last one pushed."""
        rows = self.rows[space]
        row = rows.pop()
        if not rows:
            word = space >> WORD_BITS
            self.words[word] ^= 1 << (space & ((1 << WORD_BITS) - 1))
            if not self.words[word]:
                self.summary ^= 1 << word
        return row


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
