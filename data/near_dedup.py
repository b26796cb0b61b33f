"""Near deduplication: of texts that say nearly the same in nearly the same words, the preferred one is kept.

Candidates share a band (locality-sensitive hashing): a few slots of their signatures, all equal. A candidate counts only when
the signatures as a whole agree to the threshold and a standard error more. Traces are taken in order of preference, and one
is a duplicate of the most similar trace that was kept before it. So two things hold, whatever the log's order or the number of
processes:

- every dropped trace names a *kept* one that it resembles to the threshold, and that is preferred to it;
- no two kept traces that share a band resemble each other to the threshold.

Connected components promise neither: of a chain a ~ b ~ c in which every step stands at the threshold they keep one trace,
although a and c may share little. Of a chain of five they keep one, this two or three.

The threshold, 0.8 unless the recipe says otherwise: a changed word costs five shingles on each side, so two texts of 340 words
are near duplicates up to seven scattered changes, 2 %: the same solution with a few synonyms. Higher is hardly more than
exact deduplication, lower begins to find templates. Others' choices on web text: 5-grams at 0.8 (Lee et al. 2022,
arXiv 2107.06499), 5-grams at about 0.75 (FineWeb, arXiv 2406.17557).

Suffixes of arrays: N traces, S slots, R traces that take part in order of preference, M memberships (a trace in a bucket of
two or more), B buckets.
"""

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data import minhash
from data.minhash import NUM_SLOTS, SHINGLE_WORDS, Signatures, similarity

VERSION = 100 * minhash.VERSION + 1
LOWEST_THRESHOLD, HIGHEST_THRESHOLD = 0.6, 0.95
"""Below, bands of three slots make candidates of texts that share a fifth. Above, a text of 340 words may differ in one of them,
and 195 different shingles is as far as they are counted well."""

_CANDIDATE_PROBABILITY = 0.98
_KEY_BYTES = 8
_ERROR_SHARE = 0.85
"""Of the error that 128 independent slots would have: data.minhash's table, at 330 shingles."""
_MOST_COMPARED = 16
"""Kept traces of one bucket that a trace is compared with, the last kept first. A bucket with more of them holds a template, in
which its members agree and which made none of them a duplicate. Without a bound such a corpus takes quadratic time."""


class NearDuplicates(NamedTuple):
    """original_N: int64, the row of the kept trace that this one repeats; -1 where it repeats none or did not take part.
    similarity_N: float32, estimated Jaccard similarity to it, 0 where there is none."""

    original_N: NDArray[np.int64]
    similarity_N: NDArray[np.float32]


class Buckets(NamedTuple):
    """Buckets of two or more, by trace: those of trace r are bucket_M[first_R1[r]:first_R1[r + 1]]. int32; numbered 0 to
    num_buckets - 1."""

    bucket_M: NDArray[np.int32]
    first_R1: NDArray[np.int64]
    num_buckets: int


def least_shingles(threshold: float) -> int:
    """Different shingles that both texts need: from here on one changed word, wherever it is, can be a near duplicate.

    Changed in the middle it costs 5 of n shingles on each side and leaves (n - 5) / (n + 5): at 0.8 that takes n = 45. Below,
    only a change at the very end leaves enough, and that is where a short trace has its answer: "... so the sum is 65" and
    "... so the sum is 66" are two lessons. Shorter texts are exact deduplication's.
    """
    return math.ceil(round(SHINGLE_WORDS * (1 + threshold) / (1 - threshold), 6))


def rows_per_band(threshold: float) -> int:
    """Slots in a band: as many as leave two traces exactly at the threshold a candidate with probability 0.98.

    Seven at 0.8 (0.986 there, 0.99999 at 0.9, 0.13 at 0.5, 2e-6 at 0.1), five at 0.7, four at 0.6, eight from 0.83 on."""
    enough = (rows for rows in range(_KEY_BYTES, 0, -1) if candidate_probability(threshold, rows) >= _CANDIDATE_PROBABILITY)
    return next(enough)


def candidate_probability(jaccard: float, rows: int) -> float:
    """That two traces of this similarity agree in all `rows` slots of at least one band."""
    return 1 - (1 - jaccard**rows) ** (NUM_SLOTS // rows)


def near_duplicates(
    found: Signatures,
    eligible_N: NDArray[np.bool_],
    preference: Sequence[NDArray[np.generic]],
    trace_keys_N2: NDArray[np.uint64],
    threshold: float = 0.8,
) -> NearDuplicates:
    """Which trace each near duplicate repeats. Rows are those of `found`, in any order.

    eligible_N: False for a trace that another judgement turned down; it is neither original nor duplicate. preference: columns,
    the first decides, smaller is better (NaN last), what ties goes by the next and in the end by trace_keys_N2
    (data.copies.keys_of): the result is a function of the traces, not of their order.

    Memory beside the arguments: 60 bytes a trace, and 12 for every bucket that a trace shares with another (at 0.8 there are 18
    bands, of which a trace with a copy at 0.9 shares 9). found.slots_NS may be memory-mapped.
    Raises ValueError for a threshold outside [0.6, 0.95].
    """
    if not LOWEST_THRESHOLD <= threshold <= HIGHEST_THRESHOLD:
        raise ValueError(f"near-duplicate threshold {threshold}; expected {LOWEST_THRESHOLD} to {HIGHEST_THRESHOLD}")
    takes_part_N = eligible_N & (found.shingles_N >= least_shingles(threshold))
    rows_R = _preferred_first(np.flatnonzero(takes_part_N), preference, trace_keys_N2)
    buckets = find_buckets(found.slots_NS, rows_R, rows_per_band(threshold))
    original_N, agreeing_N = np.full(len(eligible_N), -1, np.int64), np.zeros(len(eligible_N), np.int64)
    for rank, original, agreeing in _repeats(found.slots_NS, rows_R, buckets, least_agreeing(threshold)):
        original_N[rows_R[rank]] = rows_R[original]
        agreeing_N[rows_R[rank]] = agreeing
    return NearDuplicates(original_N, np.where(original_N < 0, 0, similarity(agreeing_N)).astype(np.float32))


def _preferred_first(
    rows: NDArray[np.int64], preference: Sequence[NDArray[np.generic]], trace_keys_N2: NDArray[np.uint64]
) -> NDArray[np.int64]:
    columns = [*preference, trace_keys_N2[:, 0], trace_keys_N2[:, 1]]
    return rows[np.lexsort([column[rows] for column in reversed(columns)])]


def least_agreeing(threshold: float) -> int:
    """Slots of 128 in which two traces must agree: 107 at 0.8. An estimate one standard error above the threshold (0.03 at 0.8).

    In doubt a trace stays: dropping one that is no copy loses what was paid for, keeping both of a pair at 0.8 loses next to
    nothing. On the benchmark's texts 0.1 % of what is dropped is below the threshold, and 1.3 % were without this."""
    margin = _ERROR_SHARE * math.sqrt(threshold * (1 - threshold) / NUM_SLOTS)
    return int(np.flatnonzero(similarity(np.arange(NUM_SLOTS + 1)) >= threshold + margin)[0])


# --- candidates --------------------------------------------------------------------------------------------------


def find_buckets(slots_NS: NDArray[np.uint8], rows_R: NDArray[np.int64], rows: int) -> Buckets:
    """Traces that agree in all slots of a band share its bucket. Eight slots are 64 bits: a key holds them as they are, so
    nothing collides."""
    shared = [_shared(_band_keys(slots_NS, rows_R, first, rows)) for first in range(0, NUM_SLOTS - rows + 1, rows)]
    first_R1 = np.zeros(len(rows_R) + 1, np.int64)
    for rank_M, _ in shared:  # a trace is in one bucket of a band at most, so these sums and places meet none twice
        first_R1[rank_M + 1] += 1
    np.cumsum(first_R1, out=first_R1)
    bucket_M, place_R, num_buckets = np.empty(first_R1[-1], np.int32), first_R1[:-1].copy(), 0
    for rank_M, number_M in shared:
        bucket_M[place_R[rank_M]] = number_M + np.int32(num_buckets)
        place_R[rank_M] += 1
        num_buckets += int(number_M[-1]) + 1 if len(number_M) else 0
    return Buckets(bucket_M, first_R1, num_buckets)


def _band_keys(slots_NS: NDArray[np.uint8], rows_R: NDArray[np.int64], first: int, rows: int) -> NDArray[np.uint64]:
    keys_R8 = np.zeros((len(rows_R), _KEY_BYTES), np.uint8)
    keys_R8[:, :rows] = slots_NS[rows_R, first : first + rows]
    return keys_R8.view("<u8")[:, 0]


def _shared(keys_R: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Ranks whose key is not theirs alone, and the number of their bucket, counted from 0 and ascending."""
    order = np.argsort(keys_R)
    ascending = keys_R[order]
    same = ascending[1:] == ascending[:-1]
    shared = np.zeros(len(order), np.bool_)
    shared[1:] |= same
    shared[:-1] |= same
    opens = np.ones(len(order), np.bool_)
    opens[1:] = ~same
    return order[shared].astype(np.int32), np.cumsum(opens[shared], dtype=np.int32) - np.int32(1)


# --- decisions ---------------------------------------------------------------------------------------------------


class _Repeat(NamedTuple):
    rank: int
    original: int
    agreeing: int


def _repeats(slots_NS: NDArray[np.uint8], rows_R: NDArray[np.int64], buckets: Buckets, least: int) -> Iterator[_Repeat]:
    """One of each trace, best first, that agrees with a trace kept before it in `least` slots or more.

    Only traces that share a bucket are looked at, each once: on a busy core some 25 us for one with a few copies, 130 us where
    20 templates make up a corpus of 200,000. Every bucket is a list of those kept so far, linked through their memberships, so
    that no Python object stands for a bucket.
    """
    kept = _Kept(buckets)
    for rank in np.flatnonzero(np.diff(buckets.first_R1)).tolist():
        candidates = kept.beside(rank)
        if candidates:
            agrees = slots_NS[rows_R[candidates]] == slots_NS[rows_R[rank]]
            agreeing = np.add.reduce(agrees.view(np.uint8), axis=1, dtype=np.uint8)  # 128 at most
            best = int(np.argmax(agreeing))  # the first of equals, and candidates ascend: the preferred one
            if agreeing[best] >= least:
                yield _Repeat(rank, candidates[best], int(agreeing[best]))
                continue
        kept.add(rank)


class _Kept:
    """The kept traces of every bucket, the last kept first."""

    def __init__(self, buckets: Buckets) -> None:
        self._bucket_M = buckets.bucket_M.data
        self._first_R1 = buckets.first_R1.data
        self._rank_M = array("i", bytes(4 * len(buckets.bucket_M)))
        self._earlier_M = array("i", bytes(4 * len(buckets.bucket_M)))
        self._last_B = array("i", [-1]) * buckets.num_buckets

    def _memberships(self, rank: int) -> range:
        return range(self._first_R1[rank], self._first_R1[rank + 1])

    def beside(self, rank: int) -> list[int]:
        """Ranks, ascending, of at most _MOST_COMPARED kept traces from each bucket of this one."""
        found = set()
        for membership in self._memberships(rank):
            link = self._last_B[self._bucket_M[membership]]
            for _ in range(_MOST_COMPARED):
                if link < 0:
                    break
                found.add(self._rank_M[link])
                link = self._earlier_M[link]
        return sorted(found)

    def add(self, rank: int) -> None:
        for membership in self._memberships(rank):
            bucket = self._bucket_M[membership]
            self._rank_M[membership] = rank
            self._earlier_M[membership] = self._last_B[bucket]
            self._last_B[bucket] = membership
