"""Which trace is trained when and beside which others, and what a row of them is as tensors.

Order: lengths and seeds in, indices out. Each epoch packs its traces anew into rows (data/mixed_rows.py), and its rows into
groups of equal cost (data/row_groups.py). Resuming at any step finds the same, whatever ranks there are by then.

Shape suffixes: T tokens of a packed row, N traces or supervised positions, R rows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from data.chat import IGNORE_INDEX, MASKED, Encoded, Reason
from data.mixed_rows import pack_mixed, rows_needed
from data.packing import pack
from data.row_groups import DENSE_7B, RowCost, RowGroups, group_rows
from train.objectives.targets import TeacherTargets


class Example(NamedTuple):
    """One trace in the student's tokens. dropped: why it is not trained, or ""."""

    trace_id: str
    encoded: Encoded
    dropped: str = ""


@dataclass(frozen=True, slots=True)
class TokenLedger:
    """Where every token of a set of traces went. total == trained + sum of masked + truncated + sum of dropped, always.

    trained: tokens with a loss. masked: tokens of trained traces without one, by data.chat.Reason; every reason is there.
    truncated: 0, because nothing is ever cut. dropped: tokens of traces that are not trained at all, by reason; dropped_traces
    counts the same traces.
    """

    traces: int = 0
    total: int = 0
    trained: int = 0
    masked: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_traces: dict[str, int] = field(default_factory=dict)

    @property
    def balances(self) -> bool:
        return self.total == self.trained + sum(self.masked.values()) + self.truncated + sum(self.dropped.values())

    def sentence(self) -> str:
        """`120 tokens = 40 trained + 80 masked (79 user, 1 first_token) + 0 truncated + 0 dropped`."""
        masked, dropped = (
            f"{sum(by_reason.values()):,} {name}{_in_words(by_reason)}"
            for name, by_reason in (("masked", self.masked), ("dropped", self.dropped))
        )
        return f"{self.total:,} tokens = {self.trained:,} trained + {masked} + {self.truncated:,} truncated + {dropped}"


def _in_words(by_reason: dict[str, int]) -> str:
    said = ", ".join(f"{tokens:,} {reason}" for reason, tokens in by_reason.items() if tokens)
    return f" ({said})" if said else ""


class TokenCounts(NamedTuple):
    """Of N traces. by_reason_NR: int64, tokens under each data.chat.Reason, first tokens under FIRST_TOKEN. dropped_N: str, why
    the trace is not trained whatever its length, or ""."""

    by_reason_NR: np.ndarray
    dropped_N: np.ndarray


class Admitted(NamedTuple):
    rows_R: np.ndarray
    """int64: which of the traces are trained, ascending."""
    ledger: TokenLedger


OVER_LENGTH, OVER_POSITIONS = "over_length", "over_positions"


def num_trained(encoded: Encoded) -> int:
    """Supervised positions of a row: the first token has no prediction, whatever its mask."""
    return sum(encoded.mask[1:])


def admit(counts: TokenCounts, max_tokens: int, max_positions: int | None = None) -> Admitted:
    """The traces of at most `max_tokens` tokens that nothing else speaks against. A longer one is dropped whole and counted as
    `over_length`; cutting it would teach answers that never come, or an end of turn in mid-thought. One that a row holds, but
    not the student's max_positions, is `over_positions`: it would be trained at angles that the base has never seen."""
    lengths_N = counts.by_reason_NR.sum(axis=1)
    why_N = counts.dropped_N
    for limit, reason in ((max_tokens, OVER_LENGTH), (max_positions, OVER_POSITIONS)):
        if limit is not None:
            why_N = np.where((why_N == "") & (lengths_N > limit), reason, why_N)
    kept_R = counts.by_reason_NR[why_N == ""].sum(axis=0)
    dropped = {str(why): lengths_N[why_N == why] for why in np.unique(why_N) if why}
    ledger = TokenLedger(
        traces=len(lengths_N),
        total=int(lengths_N.sum()),
        trained=int(kept_R[Reason.TRAINED]),
        masked={reason.name.lower(): int(kept_R[reason]) for reason in MASKED},
        dropped={why: int(lengths.sum()) for why, lengths in dropped.items()},
        dropped_traces={why: len(lengths) for why, lengths in dropped.items()},
    )
    assert ledger.balances
    return Admitted(np.flatnonzero(why_N == ""), ledger)


# --- a packed row ------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """One packed row, the micro-batch of one rank; int64 all three.

    targets_1T: ALREADY SHIFTED: what position t must predict, the next token of its own document; IGNORE_INDEX where nothing is
    trained, and at each document's last token. position_ids_1T: from 0 in each document, and nothing else marks where one ends.
    teacher: of the positions with a target, in order.
    """

    ids_1T: torch.Tensor
    targets_1T: torch.Tensor
    position_ids_1T: torch.Tensor
    teacher: TeacherTargets | None = None


def to_batch(documents: Sequence[Encoded], teacher: TeacherTargets | None = None, *, pad_id: int = 0) -> Batch:
    """The documents one after the other. Without any: one pad_id without a target, because a rank that has nothing to do takes
    part in the collectives of the others all the same."""
    lengths = [len(document.ids) for document in documents] or [1]
    ids_T = torch.tensor([token for document in documents for token in document.ids] or [pad_id])
    mask_T = torch.tensor([trained for document in documents for trained in document.mask] or [False])
    targets_T = torch.full_like(ids_T, IGNORE_INDEX)
    targets_T[:-1] = torch.where(mask_T[1:], ids_T[1:], IGNORE_INDEX)
    targets_T[torch.tensor(lengths).cumsum(0) - 1] = IGNORE_INDEX
    position_ids_T = torch.cat([torch.arange(length) for length in lengths])
    supervised = int((targets_T != IGNORE_INDEX).sum())
    assert teacher is None or len(teacher.has_N) == supervised, f"teacher's rows {len(teacher.has_N)}, positions {supervised}"
    return Batch(ids_T[None], targets_T[None], position_ids_T[None], teacher)


def excerpt(document: Encoded, *, before: int, tokens: int) -> slice:
    """Where to cut a document that is only tried, never trained: at most `tokens`, of which at most `before` stand ahead of its
    first supervised one. A trace of 65,536 tokens would take hours on a CPU, and two of them in a row may not fit a GPU."""
    start = max(0, document.mask.index(True, 1) - before)
    return slice(start, start + tokens)


def split_for_sequence_parallel(batch: Batch, sp_rank: int, sp_size: int) -> Batch:
    """The slice of the row that rank `sp_rank` of `sp_size` works on, with the teacher's rows of the positions in it.

    The row is padded to a multiple of sp_size by tokens without targets that are a document of their own.
    """
    padding = -batch.ids_1T.shape[1] % sp_size
    ids_1T = torch.nn.functional.pad(batch.ids_1T, (0, padding))
    targets_1T = torch.nn.functional.pad(batch.targets_1T, (0, padding), value=IGNORE_INDEX)
    position_ids_1T = torch.cat((batch.position_ids_1T, torch.arange(padding)[None]), dim=1)
    share = ids_1T.shape[1] // sp_size
    own = slice(sp_rank * share, (sp_rank + 1) * share)
    before, inside = (int((targets_1T[:, part] != IGNORE_INDEX).sum()) for part in (slice(own.start), own))
    teacher = None if batch.teacher is None else batch.teacher.part(slice(before, before + inside))
    return Batch(ids_1T[:, own], targets_1T[:, own], position_ids_1T[:, own], teacher)


# --- the order of rows -------------------------------------------------------------------------------------------

MicroStep = list[list[int]]
"""The documents of each data-parallel rank's row; an empty list is a rank without work."""


class TrainingOrder:
    """The rows of every optimizer step of a run: a pure function of its arguments, and of an epoch's only when it is asked for.

    Steps never span epochs: the last one of each may be short. It is trained, not dropped: its gradient is normalised by its
    own tokens. A fractional number of epochs cuts the last one to a share of its steps; there is one step at least.

    group: data-parallel ranks of the first start. Rows are grouped for those ever after, so that a step holds the same rows
    on any number of `ranks`, which only says to how many a micro-step deals them out.
    """

    def __init__(
        self, lengths_N: np.ndarray, capacities: Sequence[int], *, rows_per_step: int, epochs: float, seed: int,
        group: int, ranks: int, cost: RowCost = DENSE_7B,
    ) -> None:  # fmt: skip
        assert len(lengths_N) and rows_per_step % group == 0, (len(lengths_N), rows_per_step, group)
        self.lengths_N, self.capacities, self.seed, self.cost = lengths_N, tuple(capacities), seed, cost
        self.rows_per_step, self.group, self.ranks = rows_per_step, group, ranks
        self._opened_R = rows_needed(lengths_N, self.capacities)
        self._epoch = functools.lru_cache(maxsize=2)(self._pack_epoch)
        self.steps_per_epoch = self._epoch(0).num_steps(rows_per_step)  # of every epoch: rows are as many whatever the seed
        self.num_steps = max(1, round(self.steps_per_epoch * epochs))

    def step(self, index: int) -> list[MicroStep]:
        """Micro-steps of global step `index`, each with the documents of every rank's row."""
        groups, rows_R = self._rows(index)
        return [
            [groups.rows.row(row).tolist() if row >= 0 else [] for row in places]
            for places in groups.deal(rows_R, self.ranks).tolist()
        ]

    def capacity_of(self, index: int) -> int:
        """Tokens that the rows of the step could hold."""
        groups, rows_R = self._rows(index)
        return int(groups.rows.capacities_R[rows_R].sum())

    def balance(self) -> "Balance":
        """Of the first epoch, dealt out to the ranks as they are now."""
        groups = self._epoch(0)
        steps = [groups.rows_of_step(step, self.rows_per_step) for step in range(self.steps_per_epoch)]
        skews = [groups.skew(rows_R, self.ranks) for rows_R in steps]
        return Balance(len(groups.rows), groups.rows.waste, float(np.mean(skews)))

    def _rows(self, index: int) -> tuple[RowGroups, np.ndarray]:
        assert 0 <= index < self.num_steps, (index, self.num_steps)
        epoch, step = divmod(index, self.steps_per_epoch)
        groups = self._epoch(epoch)
        return groups, groups.rows_of_step(step, self.rows_per_step)

    def _pack_epoch(self, epoch: int) -> RowGroups:
        packing = pack_mixed(self.lengths_N, self.capacities, (self.seed, epoch), self._opened_R)
        return group_rows(packing, self.lengths_N, self.capacities, self.cost, self.group, (self.seed, epoch))


class Balance(NamedTuple):
    """waste: share of the rows' capacity without a token, rows that were spread over more ranks included. skew: mean over steps
    of the dearest rank's cost over the mean rank's, by the model of RowCost."""

    rows: int
    waste: float
    skew: float


def deal_out(lengths_N: np.ndarray, capacities: Sequence[int], *, ranks: int) -> list[MicroStep]:
    """All documents once, as micro-steps of `ranks` rows of similar cost, for whoever only measures."""
    groups = group_rows(pack(lengths_N, capacities, 0), lengths_N, capacities, DENSE_7B, ranks, 0)
    places = groups.deal(np.arange(len(groups.rows)), ranks).tolist()
    return [[groups.rows.row(row).tolist() if row >= 0 else [] for row in micro_step] for micro_step in places]
