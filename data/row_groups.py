"""Packed rows in groups of equal cost, one row a rank: whoever has a dear row would make all others wait.

Each micro-step is a collective under ZeRO-3, so balance is sought inside it, row by row, and not only over a rank's rows of a
step: sums over several micro-steps can be made more equal still, and the ranks would wait for each other just as long.

Shape suffixes: N documents, R rows, G groups, M micro-steps, W ranks.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.packing import Packing, Seed, packing_of, random_keys


class RowCost(NamedTuple):
    """Arithmetic of training a row: linear layers see its tokens, attention each pair of a document's tokens."""

    flops_per_token: float
    flops_per_pair: float
    """Of length squared: causal attention's half of the square is in it."""

    def of_documents(self, lengths_N: np.ndarray) -> np.ndarray:
        """float64 [N]. A row costs the sum over its documents."""
        lengths_N = lengths_N.astype(np.float64)
        return lengths_N * (self.flops_per_token + self.flops_per_pair * lengths_N)


DENSE_7B = RowCost(flops_per_token=4 * 6.5e9, flops_per_pair=6 * 32 * 4096)
"""A Llama-2-7B under LoRA: 4 flops a frozen weight and token, 6 a pair for each of 32 layers x 4,096 (train/flops.py counts the
same). Only the ratio matters, and 13B's (40 x 5,120 to 12.7e9 weights) is a fifth below: attention costs as much as the rest at
33,000 and 41,000 tokens."""


@dataclass(frozen=True, slots=True)
class RowGroups:
    """An epoch's rows: dearest first, then those that were spread. Each `width` consecutive ones are a group;
    order_G: in which order groups are trained."""

    rows: Packing
    cost_R: np.ndarray
    order_G: np.ndarray
    width: int

    def num_steps(self, rows_per_step: int) -> int:
        return -(-len(self.order_G) // (rows_per_step // self.width))

    def rows_of_step(self, step: int, rows_per_step: int) -> np.ndarray:
        """int64: at most rows_per_step rows; fewer in the last step."""
        groups_per_step = rows_per_step // self.width
        groups = self.order_G[step * groups_per_step : (step + 1) * groups_per_step]
        rows_R = (groups[:, None] * self.width + np.arange(self.width)).ravel()
        return rows_R[rows_R < len(self.rows)]

    def deal(self, rows_R: np.ndarray, ranks: int) -> np.ndarray:
        """int64 [M, W]: the row of each micro-step and rank, -1 for none, and that in the last micro-step only.

        Rows of similar cost share a micro-step; in each the rank that has had the least so far gets the dearest.
        """
        rows_R = rows_R[np.argsort(-self.cost_R[rows_R], kind="stable")]
        places_MW = np.full((-(-len(rows_R) // ranks), ranks), -1)
        load_W = np.zeros(ranks)
        for micro_step, places_W in enumerate(places_MW):
            dealt = rows_R[micro_step * ranks : (micro_step + 1) * ranks]
            takers = np.argsort(load_W, kind="stable")[: len(dealt)]
            places_W[takers] = dealt
            load_W[takers] += self.cost_R[dealt]
        return places_MW

    def skew(self, rows_R: np.ndarray, ranks: int) -> float:
        """Cost of the dearest rank over the mean rank's, the rows dealt out; 1 is perfect."""
        places_MW = self.deal(rows_R, ranks)
        load_W = np.where(places_MW >= 0, self.cost_R[places_MW], 0.0).sum(0)
        return float(load_W.max() / load_W.mean())


class Documents(NamedTuple):
    """What is known of all documents: lengths in tokens (int64) and costs (float64); and the rows' capacities, ascending."""

    lengths_N: np.ndarray
    cost_N: np.ndarray
    capacities: Sequence[int]


def group_rows(
    packing: Packing, lengths_N: np.ndarray, capacities: Sequence[int], cost: RowCost, width: int, seed: Seed
) -> RowGroups:
    """Rows sorted by cost and cut into groups of `width`, shuffled by the seed. Rows that `width` does not divide are mended:
    the cheapest ones, a group and what is left, have their documents spread over two groups, or over one where there is no
    other. The last is short only where documents are fewer than ranks.

    Spreading what is left alone gives a few rows' documents to many ranks, and one long one among them keeps all waiting: 300
    log-normal traces in rows of 131,072 tokens, 8 ranks: the dearest rows cost 1.35 x the mean ones, and so 1.07 x.
    """
    documents = Documents(lengths_N, cost.of_documents(lengths_N), capacities)
    cost_R = packing.sums(documents.cost_N)
    dearest_first = np.lexsort((random_keys(len(packing), _for(seed, 1)), -cost_R))
    whole = len(packing) if len(packing) % width == 0 else max(0, (len(packing) // width - 1) * width)
    kept = [packing.row(row) for row in dearest_first[:whole]]
    left = [packing.row(row) for row in dearest_first[whole:]]
    rows = _as_packing([*kept, *spread(left, documents, -(-len(left) // width) * width)], documents)
    order_G = np.argsort(random_keys(-(-len(rows) // width), _for(seed, 2)), kind="stable")
    return RowGroups(rows, rows.sums(documents.cost_N), order_G, width)


def _for(seed: Seed, purpose: int) -> Seed:
    """The packer's seed with something of its own for each shuffle."""
    return (*seed, purpose) if isinstance(seed, tuple) else (seed, purpose)


def _as_packing(rows: Sequence[np.ndarray], documents: Documents) -> Packing:
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return packing_of(row_of, np.concatenate(rows) if rows else row_of, documents.lengths_N, documents.capacities)


# --- rows too few for a group ------------------------------------------------------------------------------------


def spread(rows: Sequence[np.ndarray], documents: Documents, width: int) -> list[np.ndarray]:
    """The same documents in `width` rows (no fewer than there are) of costs as equal as whole documents allow, dearest first; in
    one row each where they are fewer. None above its capacity."""
    if not rows:
        return []
    members = np.concatenate(rows)
    width = min(width, len(members))
    found = _dearest_document_first(members, documents, width) or _halved(rows, documents, width)
    return sorted(found, key=lambda row: -documents.cost_N[row].sum())


def _dearest_document_first(members: np.ndarray, documents: Documents, width: int) -> list[np.ndarray] | None:
    """Each into the cheapest row that holds it (longest processing time first: Graham 1969; its largest cost is at most 4/3 of
    the least possible where no capacity is in the way). None when a document is left that no row holds."""
    cheapest = [(0.0, row) for row in range(width)]
    filled: list[list[int]] = [[] for _ in range(width)]
    spaces = [documents.capacities[-1]] * width
    for document in members[np.argsort(-documents.cost_N[members], kind="stable")].tolist():
        length, too_full = int(documents.lengths_N[document]), []
        while cheapest and spaces[cheapest[0][1]] < length:
            too_full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        cost, row = cheapest[0]
        heapq.heapreplace(cheapest, (cost + float(documents.cost_N[document]), row))
        for one in too_full:
            heapq.heappush(cheapest, one)
        if not filled[row]:
            spaces[row] = documents.capacities[bisect_left(documents.capacities, length)]
        spaces[row] -= length
        filled[row].append(document)
    return [np.array(row, dtype=np.int64) for row in filled]


def _halved(rows: Sequence[np.ndarray], documents: Documents, width: int) -> list[np.ndarray]:
    """The dearest row of several documents is cut in half until there are `width`: less even, but there is always a next cut."""
    halves = list(rows)
    while len(halves) < width:
        dearest = max(range(len(halves)), key=lambda index: (len(halves[index]) > 1, documents.cost_N[halves[index]].sum()))
        pair = _dearest_document_first(halves.pop(dearest), documents, 2)
        assert pair is not None  # what one row holds goes into two
        halves += pair
    return halves
