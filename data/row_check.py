"""Before a dataset is written: some of its rows in the student's tokens, held to what the student will be served.

Training renders every row and checks it (train/dataset.py); here a template that cannot work is found while the dataset is
being built, and not when GPUs are waiting. Rows are the kept ones of the lowest identities, which are hashes: any others would
do as well, and the same traces give the same rows.

Legend: N traces.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from configs.errors import UnusableInput
from data.judge import Judged
from data.look import completed
from data.relabel import Relabelling, with_relabelled
from data.shards import rows_of, shard_of
from data.store import read_segment

log = logging.getLogger(__name__)

CHECKED_ROWS = 500
"""A row of 2 KB takes 2 to 5 ms to render and check, and to judge and write 0.2: all rows would take ten times the build."""
_HASHES = 1 << 30
COLUMNS = ["trace_id", "messages", "finish_reason", "tools"]

TrainedIds = Callable[[Sequence[Mapping[str, object]], str, str], Sequence[int]]
"""(messages, finish_reason, tools) to the ids that a student is trained on. Raises UnusableInput where they are not as it is
served."""


class RowCheck(NamedTuple):
    """rows: that were checked. taught: of them, those that the teacher's own ids can be compared with; equal: those trained on
    these very ids, at the end of what is trained, so that its logits fit them."""

    rows: int
    taught: int
    equal: int

    def in_words(self) -> str:
        return f"{self.rows} rows checked in the student's tokens, {self.equal} of {self.taught} on the teacher's own ids"


def check_rows(
    found: Judged, kept_N: np.ndarray, codes_N: np.ndarray, relabelling: Relabelling, open_student: Callable[[], TrainedIds]
) -> RowCheck | None:
    """What at most CHECKED_ROWS of the rows are in the student's tokens; None, with a warning, where it has no usable tokenizer
    yet: a dataset can be built for any student.

    kept_N: bool. codes_N: int16, positions in relabelling.grades, or -1.

    Raises:
        UnusableInput: a row would not be trained as it is served, or loses reasoning, answer or stop; trace, turn and token are
            named.
    """
    try:
        trained_ids = open_student()
    except UnusableInput as error:
        log.warning("rows are not checked in the student's tokens: %s", error)
        return None
    chosen = found.per_segment(_chosen(found.trace_ids, kept_N), absent=False)
    codes = found.per_segment(codes_N, absent=-1)
    checked = taught = equal = 0
    for segment, chosen_L, codes_L in zip(found.segments, chosen, codes, strict=True):
        if not chosen_L.any():
            continue
        traces = completed(read_segment(segment)).filter(pa.array(chosen_L))
        rows = with_relabelled(rows_of(traces), codes_L[chosen_L], relabelling).select(COLUMNS)
        for row, turns, code in zip(rows.to_pylist(), traces["turns"], codes_L[chosen_L], strict=True):
            ids = _ids_of(trained_ids, row)
            said = [token for turn in turns.as_py() if turn["origin"] == "generated" for token in turn["token_ids"]]
            checked += 1
            taught += int(code < 0)
            equal += bool(code < 0 and said and list(ids[-len(said) :]) == said)
    return RowCheck(checked, taught, equal)


def _chosen(trace_ids: pa.Array, kept_N: np.ndarray) -> np.ndarray:
    """bool [N]: CHECKED_ROWS of the kept ones."""
    rows = np.flatnonzero(kept_N)
    hashes = shard_of(trace_ids.take(pa.array(rows)), _HASHES)
    chosen_N = np.zeros(len(kept_N), bool)
    chosen_N[rows[np.argsort(hashes, kind="stable")[:CHECKED_ROWS]]] = True
    return chosen_N


def _ids_of(trained_ids: TrainedIds, row: Mapping) -> Sequence[int]:
    messages = [{key: text for key, text in message.items() if text is not None} for message in row["messages"]]
    try:
        return trained_ids(messages, row["finish_reason"], row["tools"])
    except UnusableInput as error:
        raise UnusableInput(f"trace {row['trace_id']}: {error}") from error
