"""Rows about as few as best-fit decreasing needs, each with documents of all lengths.

Best-fit decreasing fills rows with documents of one length after another. Length goes with the task, so a step would see a
single kind: the embedded student ended at 0.111 nats of validation loss that way (four epochs, two rows of 2,048 tokens a
step), with the rows made here at 0.087, and with as many traces drawn at random, unpacked, at 0.090. So best-fit decreasing
says how many rows are needed, documents are dealt out to that many like cards, longest first and to the emptiest row, and only
the last DEALT_LAST of the tokens, in short documents, are placed by best fit, to fill what is left.

Shape suffixes: N documents, R rows.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np

from data.packing import Packing, Seed, Spaces, pack, packing_of, random_keys

DEALT_LAST = (0.1, 0.3)
"""Shares of the tokens that best fit places, tried in turn: the more, the likelier all fits, and the less is mixed."""
ALLOWED_WASTE = 0.0008
"""A million documents can be packed far tighter than this, and have the rows to be dealt out easily."""
MOST_MORE = 0.02
"""Share of rows that may be added to those of best-fit decreasing, where documents are too large for what little is to spare.
Rows are not padded: one that is not full costs no arithmetic, only a turn."""
PROBES = 3
"""Deals that have to work out with so many rows before it is said that they do."""
JITTER = 0.2
"""Lengths are taken for up to so much more than they are while documents are dealt: the same would meet in every epoch."""


def pack_mixed(
    lengths_N: np.ndarray, capacities: Sequence[int], seed: Seed, opened_R: np.ndarray | None = None
) -> Packing:  # fmt: skip
    """Every document once, none cut, no row above its capacity. The number of rows follows from the lengths alone. Other seeds
    put other documents together. Where no deal is found, rows are pack()'s, some of them split. opened_R: rows_needed() of the
    same lengths and capacities, for whoever packs them again and again."""
    lengths_N = np.asarray(lengths_N, dtype=np.int64)
    if opened_R is None:
        opened_R = rows_needed(lengths_N, capacities)
    if len(opened_R) < 2:
        return pack(lengths_N, capacities, seed)
    documents_N = _shuffled(lengths_N, capacities, (*seed, 3) if isinstance(seed, tuple) else (seed, 3))
    if (rows_N := _dealt(documents_N, lengths_N, opened_R)) is None:
        return _split(pack(lengths_N, capacities, seed), len(opened_R), lengths_N, capacities)
    return packing_of(rows_N[documents_N], documents_N, lengths_N, capacities)


def rows_needed(lengths_N: np.ndarray, capacities: Sequence[int]) -> np.ndarray:
    """int64: capacities of the rows, those of best-fit decreasing and as few more of the commonest one as deals need."""
    fewest = pack(lengths_N, capacities, 0)
    if len(fewest) < 2:
        return fewest.capacities_R
    longest_R = lengths_N[fewest.members_N[fewest.offsets_R1[:-1]]]
    opened_R = np.asarray(capacities)[np.searchsorted(capacities, longest_R)]
    commonest = capacities[int(np.bincount(np.searchsorted(capacities, longest_R)).argmax())]
    spare = int(fewest.tokens_R.sum()) / (1.0 - ALLOWED_WASTE) - int(opened_R.sum())
    most = min(math.ceil(MOST_MORE * len(fewest)), len(lengths_N) - len(fewest))
    decks = [_shuffled(lengths_N, capacities, (probe,)) for probe in range(PROBES)]
    for more in range(min(most, max(0, math.floor(spare / commonest))), most + 1, max(1, len(fewest) // 500)):
        rows_R = np.concatenate((opened_R, np.full(more, commonest)))
        if all(_dealt(deck, lengths_N, rows_R) is not None for deck in decks):
            return rows_R
    return opened_R


def _shuffled(lengths_N: np.ndarray, capacities: Sequence[int], seed: Seed) -> np.ndarray:
    """int64: the documents, longest first but for JITTER; before all others those that need a longer row."""
    about_N = lengths_N * (1.0 + JITTER * random_keys(len(lengths_N), seed) / 2.0**64)
    return np.lexsort((-about_N, -np.searchsorted(capacities, lengths_N)))


def _dealt(documents_N: np.ndarray, lengths_N: np.ndarray, opened_R: np.ndarray) -> np.ndarray | None:
    """int64 [N]: the row of each document; None when no share of DEALT_LAST works out."""
    sums_N = np.cumsum(lengths_N[documents_N])
    for share in DEALT_LAST:
        rows_N = _deal(documents_N, int(np.searchsorted(sums_N, (1.0 - share) * sums_N[-1])), lengths_N, opened_R)
        if rows_N is not None:
            return rows_N
    return None


def _deal(documents_N: np.ndarray, dealt: int, lengths_N: np.ndarray, opened_R: np.ndarray) -> np.ndarray | None:
    """int64 [N]: the row of each document, `dealt` of them to the emptiest; None when one is left that no row holds."""
    free = opened_R.tolist()
    emptiest: dict[int, list[tuple[float, int]]] = {}
    for row, capacity in enumerate(free):
        emptiest.setdefault(capacity, []).append((0.0, row))
    rows_N, left = np.full(len(lengths_N), -1), documents_N[dealt:].tolist()
    for document, length in zip(documents_N[:dealt].tolist(), lengths_N[documents_N[:dealt]].tolist(), strict=True):
        tops = [(heap[0], capacity) for capacity, heap in emptiest.items() if free[heap[0][1]] >= length]
        if not tops:
            left.append(document)
            continue
        (_, row), capacity = min(tops)
        free[row] -= length
        heapq.heapreplace(emptiest[capacity], (1.0 - free[row] / capacity, row))
        rows_N[document] = row
    left_N = np.array(left, dtype=np.int64)
    return rows_N if _fill(rows_N, left_N[np.argsort(-lengths_N[left_N], kind="stable")], lengths_N, free) else None


def _fill(rows_N: np.ndarray, left_N: np.ndarray, lengths_N: np.ndarray, free: Sequence[int]) -> bool:
    """Gives the rest, longest first, the rows where they leave least; False when that cannot be, or a row stays without any."""
    spaces = Spaces(max([*free, *lengths_N[left_N[:1]].tolist()]))
    for row, space in enumerate(free):
        if space:
            spaces.push(space, row)
    for document, length in zip(left_N.tolist(), lengths_N[left_N].tolist(), strict=True):
        if (space := spaces.smallest(length)) is None:
            return False
        rows_N[document] = row = spaces.pop(space)
        if space > length:
            spaces.push(space - length, row)
    return len(np.unique(rows_N)) == len(free)


def _split(packing: Packing, num_rows: int, lengths_N: np.ndarray, capacities: Sequence[int]) -> Packing:
    """The same rows with as many of them cut in two, those of most documents first, as make `num_rows`."""
    rows = [packing.row(row) for row in range(len(packing))]
    by_count = [(-len(row), index) for index, row in enumerate(rows)]
    heapq.heapify(by_count)
    while len(rows) < num_rows:
        index = by_count[0][1]
        rows.append(rows[index][1::2])
        rows[index] = rows[index][::2]
        heapq.heapreplace(by_count, (-len(rows[index]), index))
        heapq.heappush(by_count, (-len(rows[-1]), len(rows) - 1))
    rows_N = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return packing_of(rows_N, np.concatenate(rows), lengths_N, capacities)
