"""From judgements to a view: every completed trace is kept, rejected or unjudged, and exactly one reason says why.

Judgements stand in a fixed order, and the first one that does not pass decides; so the reasons add up to the traces,
whatever else may be wrong with each of them. A judgement is a column over all traces, and deciding touches columns only:
a million traces take a second and 20 MB a judgement.

N completed traces, in one order for all columns.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.records import VerdictName
from data.schema import VERDICT

Fate = Literal["kept", "rejected", "unjudged"]

VERDICTS: tuple[VerdictName, ...] = ("pass", "fail", "unjudged")
FATES: tuple[Fate, ...] = ("kept", "rejected", "unjudged")
PASS, FAIL, UNJUDGED = range(3)
KEPT, REJECTED, UNDECIDED = range(3)

VIEW_FILE = "view.arrow"
VIEW = pa.schema([("trace_id", pa.string()), ("fate", pa.string()), ("reason", pa.string()), ("judgement", pa.string())])


class Judgement(NamedTuple):
    """One column of verdicts. name: who was asked. decides: False for one that is on record only."""

    name: str
    verdicts_N: np.ndarray
    """uint8: PASS, FAIL or UNJUDGED."""
    reasons_N: np.ndarray
    """int32 positions in `words`; 0 where it passed."""
    words: tuple[str, ...]
    scores_N: np.ndarray
    """float64."""
    decides: bool = True
    detail: pa.Array | None = None
    """N strings, what there is to say beyond the reason (data.details); None where that is nothing of any trace."""


def judgement(name: str, reasons: pa.Array | Sequence[str], *, decides: bool = True, detail: pa.Array | None = None) -> Judgement:
    """A judgement that knows no doubt: "" passes with score 1.0, any other reason fails with 0.0."""
    reasons_N, words = coded(reasons)
    failed_N = reasons_N > 0
    return Judgement(name, failed_N.astype(np.uint8), reasons_N, words, 1.0 - failed_N, decides, detail)


def coded(column: pa.Array | pa.ChunkedArray | Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """int32 positions in the words of a column, and those words: "" first, then sorted."""
    encoded = _array(column).dictionary_encode()
    found = encoded.dictionary.to_pylist()
    words = ("", *sorted(word for word in found if word))
    place = {word: number for number, word in enumerate(words)}
    code_of = np.array([place[word or ""] for word in found], np.int32)
    return code_of[encoded.indices.to_numpy(zero_copy_only=False)], words


def _array(column: Any) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        return column.combine_chunks()
    return column if isinstance(column, pa.Array) else pa.array(column, pa.string())


def order_of(identities: pa.Array) -> np.ndarray:
    """int64 [N]: the rows in the order of their identities."""
    return pc.call_function("array_sort_indices", [identities]).to_numpy().astype(np.int64)


class Decisions(NamedTuple):
    """What became of each trace."""

    fates_N: np.ndarray
    """uint8: KEPT, REJECTED or UNDECIDED (which reads `unjudged`)."""
    reasons_N: np.ndarray
    """int32 positions in `words`; 0 for kept ones."""
    words: tuple[str, ...]
    judges_N: np.ndarray
    """int32 positions in `judges`: who decided; 0 for kept ones."""
    judges: tuple[str, ...]

    @property
    def kept_N(self) -> np.ndarray:
        """bool."""
        return self.fates_N == KEPT


def select(judgements: Sequence[Judgement], num_traces: int) -> Decisions:
    """The first deciding judgement that did not pass is the reason."""
    words = {"": 0}
    fates_N = np.zeros(num_traces, np.uint8)
    reasons_N = np.zeros(num_traces, np.int32)
    judges_N = np.zeros(num_traces, np.int32)
    for number, said in enumerate(judgements, start=1):
        if not said.decides:
            continue
        rows = np.flatnonzero((fates_N == KEPT) & (said.verdicts_N != PASS))
        fates_N[rows] = said.verdicts_N[rows]  # FAIL rejects, UNJUDGED leaves undecided: the codes are the same
        reasons_N[rows] = np.array([words.setdefault(word, len(words)) for word in said.words], np.int32)[said.reasons_N[rows]]
        judges_N[rows] = number
    return Decisions(fates_N, reasons_N, tuple(words), judges_N, ("", *(said.name for said in judgements)))


def reasons(decisions: Decisions, fate: Fate) -> dict[str, int]:
    """Count by reason of the traces with this fate, most frequent first."""
    codes, numbers = np.unique(decisions.reasons_N[decisions.fates_N == FATES.index(fate)], return_counts=True)
    counted = Counter({decisions.words[code]: number for code, number in zip(codes.tolist(), numbers.tolist(), strict=True)})
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


class Decision(NamedTuple):
    """A row of the view: what became of one trace. reason and judgement (who decided) are "" for a kept one."""

    trace_id: str
    fate: Fate
    reason: str = ""
    judgement: str = ""


# --- as tables ---------------------------------------------------------------------------------------------------


def view_table(trace_ids: pa.Array, decisions: Decisions, order_N: np.ndarray) -> pa.Table:
    """One row a trace, in the order given (that of their identities, for files)."""
    return pa.table(
        [
            trace_ids.take(pa.array(order_N)),
            _spelled(FATES, decisions.fates_N[order_N]),
            _spelled(decisions.words, decisions.reasons_N[order_N]),
            _spelled(decisions.judges, decisions.judges_N[order_N]),
        ],
        schema=VIEW,
    )


def verdict_table(trace_ids: pa.Array, said: Judgement, order_N: np.ndarray) -> pa.Table:
    """The verdicts of one judge on the traces that `order_N` names, in that order."""
    return pa.table(
        [
            trace_ids.take(pa.array(order_N)),
            _spelled(VERDICTS, said.verdicts_N[order_N]),
            _spelled(said.words, said.reasons_N[order_N]),
            pa.array(said.scores_N[order_N], pa.float64()),
            pa.repeat("", len(order_N)) if said.detail is None else said.detail.take(pa.array(order_N)),
        ],
        schema=VERDICT,
    )


def _spelled(words: Sequence[str], codes: np.ndarray) -> pa.Array:
    return pa.array(words, pa.string()).take(pa.array(codes))
