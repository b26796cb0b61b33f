"""The teacher's stored logits, laid beside the student's supervised positions: aligned once, kept on disk, mapped by every rank.

A trace's logits belong to the token ids that the teacher generated, one row of logits for each, the stop included. They fit a
trace of the dataset when the student is trained on those very ids, at the end of what it is trained on (earlier assistant turns
of a prompt are trained too, and have no logits). The stop may differ: where the student's template ends a turn with another
token, the trace's last position alone has none. Ids are compared, not names of tokenizers: a relabelled answer or another
template makes other ids, and what the teacher said next does not follow from them.

    cache/teacher_targets/KEY.arrow    a row for each trace that fits, in the order of the segments of logits
    cache/teacher_targets/KEY.json     the commit (train/cached_table.py)

Legend: T generated tokens, N supervised positions, R traces of the train split, K kept logits, C temperatures.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from configs.errors import UnusableInput
from data.logits import StoredLogits, read_logits
from data.records import digest
from data.store import RunFolder, read_first_copies, segments
from train.cached_table import CachedTable, read_or_write
from train.objectives.targets import TeacherTargets
from train.rendered import Rendered

log = logging.getLogger(__name__)

TARGETS = pa.schema(
    [
        ("row", pa.int64()),  # of the train split
        ("has_last", pa.bool_()),  # the student is trained on the teacher's own last token too
        ("top_k", pa.int32()),
        ("ids", pa.large_list(pa.int32())),
        ("logits", pa.large_list(pa.float16())),  # as stored: half the bytes of log-probabilities, and nothing is rounded twice
        ("log_z", pa.large_list(pa.float32())),
    ]
)
BATCH_BYTES = 1 << 26
"""Of a record batch: what is in memory while it is written, but for a longer trace."""


class Fit(NamedTuple):
    """row: of the train split. tokens: generated ones. has_last: see TARGETS."""

    row: int
    tokens: int
    has_last: bool


class TargetStore:
    """The teacher's distributions at every supervised position of the train split. Nothing is in memory but what is asked for."""

    def __init__(self, cached: CachedTable, num_trained_R: np.ndarray, temperature: float) -> None:
        """num_trained_R: int64, supervised positions of each trace."""
        self.sha256, self.temperature, self._num_trained_R = cached.sha256, temperature, num_trained_R
        self.top_k = cached.counts["top_k"]
        self._columns = {name: cached.rows[name] for name in ("ids", "logits", "log_z")}
        self._has_last = cached.rows["has_last"].to_numpy()
        self._top_k = cached.rows["top_k"].to_numpy()
        self._place_R = np.full(len(num_trained_R), -1, np.int64)
        self._place_R[cached.rows["row"].to_numpy()] = np.arange(cached.rows.num_rows)

    def of(self, rows: Sequence[int]) -> TeacherTargets:
        """At the N supervised positions of these traces, packed one after the other, as SupervisedLoss takes them."""
        num_trained = [int(self._num_trained_R[row]) for row in rows]
        shape_NK = (sum(num_trained), self.top_k)
        ids_NK, log_probs_NK = np.zeros(shape_NK, np.int64), np.full(shape_NK, -np.inf, np.float32)
        has_N = np.zeros(shape_NK[0], bool)
        end = 0
        for row, count in zip(rows, num_trained, strict=True):
            end += count
            if (place := int(self._place_R[row])) >= 0:
                self._fill(place, end, ids_NK, log_probs_NK, has_N)
        return TeacherTargets(*(torch.from_numpy(column) for column in (ids_NK, log_probs_NK, has_N)))

    def _fill(self, place: int, end: int, ids_NK: np.ndarray, log_probs_NK: np.ndarray, has_N: np.ndarray) -> None:
        """The positions up to `end` that the trace at `place` was generated at."""
        top_k = int(self._top_k[place])
        ids, logits, log_z_T = (column[place].values.to_numpy() for column in self._columns.values())
        part = slice(end - len(log_z_T), end)
        ids_NK[part, :top_k] = ids.reshape(-1, top_k)
        tempered_TK = logits.reshape(-1, top_k).astype(np.float32) / np.float32(self.temperature)
        log_probs_NK[part, :top_k] = tempered_TK - log_z_T[:, None]
        has_N[part] = True
        has_N[end - 1] = self._has_last[place]


def load_teacher_targets(run: RunFolder, train: Rendered, temperature: float, *, is_writer: bool = True) -> TargetStore | None:
    """The store for the train split, aligned into the run's cache by the writer unless that has been done, by anybody, for the
    same examples, logits and temperature. None when no trace fits: the tokenizers differ, and the log says so.

    Raises:
        UnusableInput: the run has no logits of any of these traces, or none with log Z at this temperature.
    """
    identity = {
        "examples": train.sha256(),
        "temperature": repr(float(temperature)),
        "logits": _content(run, "logits"),
        "traces": _content(run, "traces"),
    }
    cached = read_or_write(
        run.cache / "teacher_targets", TARGETS, identity, partial(_align, run=run, train=train, temperature=temperature),
        is_writer=is_writer, what="the teacher's logits are aligned",
    )  # fmt: skip
    _check(run, cached.counts, temperature)
    if is_writer:
        _say(cached.counts)
    return TargetStore(cached, train.trained(), temperature) if cached.counts["fitting"] else None


def _content(run: RunFolder, name: str) -> str:
    folder = {"logits": run.logits, "traces": run.traces}[name]
    return digest([segment.sha256 for segment in segments(folder)] if folder.is_dir() else [])


def _check(run: RunFolder, counts: Mapping[str, int], temperature: float) -> None:
    if not counts["with_logits"]:
        raise UnusableInput(
            f"{run.logits}: no logits of the dataset's {counts['traces']} traces; generate them with generate.logits, or set "
            "train.objective: {type: cross_entropy}"
        )
    if not counts["at_temperature"]:
        raise UnusableInput(
            f"{run.logits}: no log Z at temperature {temperature:g}; expected it among generate.logits.temperatures when the "
            "traces were made; choose one of those as train.objective.temperature"
        )


def _say(counts: Mapping[str, int]) -> None:
    if not counts["fitting"]:
        log.warning(
            "train.objective: the student's tokenizer is not the teacher's: of %d traces with logits none is trained on the "
            "token ids that the teacher generated; trained by cross-entropy",
            counts["at_temperature"],
        )
        return
    log.info(
        "the teacher's logits fit %d of %d traces, %d of %d supervised tokens; the others are trained by cross-entropy "
        "(%d other ids, %d without logits)",
        counts["fitting"], counts["traces"], counts["fitting_tokens"], counts["tokens"],
        counts["at_temperature"] - counts["fitting"], counts["traces"] - counts["at_temperature"],
    )  # fmt: skip


# --- aligning ----------------------------------------------------------------------------------------------------


def _align(writer: pa.RecordBatchFileWriter, *, run: RunFolder, train: Rendered, temperature: float) -> dict[str, int]:
    """Writes the traces that fit, one pass over the traces and one over their logits; counts of what there was."""
    rows = {example.trace_id: row for row, example in enumerate(train.examples())}
    fits = {trace_id: fit for trace_id, ids_T in generated(run) if (fit := _fit(train, rows.get(trace_id), ids_T)) is not None}
    counts = dict.fromkeys(("with_logits", "at_temperature", "fitting", "fitting_tokens"), 0) | {"top_k": 1}
    batch: list[dict[str, object]] = []
    waiting = 0
    for stored in read_logits(run):
        counts["with_logits"] += stored.trace_id in rows
        if stored.trace_id not in rows or temperature not in stored.temperatures:
            continue
        counts["at_temperature"] += 1
        fit = fits.get(stored.trace_id)
        if fit is None or fit.tokens != len(stored.top.ids_TK):
            continue
        batch.append(_row(fit, stored, stored.temperatures.index(temperature)))
        waiting += stored.top.ids_TK.nbytes + stored.top.logits_TK.nbytes
        counts["fitting"] += 1
        counts["fitting_tokens"] += fit.tokens - 1 + fit.has_last
        counts["top_k"] = max(counts["top_k"], stored.top.ids_TK.shape[1])
        if waiting >= BATCH_BYTES:
            writer.write_table(pa.Table.from_pylist(batch, schema=TARGETS))
            batch, waiting = [], 0
    writer.write_table(pa.Table.from_pylist(batch, schema=TARGETS))
    return counts | {"traces": len(train), "tokens": int(train.trained().sum())}


def generated(run: RunFolder) -> Iterator[tuple[str, np.ndarray]]:
    """Of each trace that counts: its name, and int32 [T] what the teacher generated, over all turns."""
    for table in read_first_copies(run.traces):
        for batch in table.select(["trace_id", "turns"]).to_batches():
            turns = batch["turns"]
            origins = pc.call_function("struct_field", [turns.values], pc.StructFieldOptions(["origin"])).to_pylist()
            ids = pc.call_function("struct_field", [turns.values], pc.StructFieldOptions(["token_ids"]))
            offsets = turns.offsets.to_numpy()
            for index, trace_id in enumerate(batch["trace_id"].to_pylist()):
                of_trace = range(offsets[index], offsets[index + 1])
                said = [ids[turn].values.to_numpy() for turn in of_trace if origins[turn] == "generated"]
                yield trace_id, np.concatenate([np.zeros(0, np.int32), *said])


def _fit(train: Rendered, row: int | None, ids_T: np.ndarray) -> Fit | None:
    """None when the student is not trained on these ids. A differing last one is forgiven, unless it is the only one."""
    if row is None or not len(ids_T):
        return None
    encoded = train[row]
    trained_N = np.asarray(encoded.ids)[1:][np.asarray(encoded.mask)[1:]]  # nothing predicts a first token
    if len(trained_N) < len(ids_T):
        return None
    ours_T = trained_N[-len(ids_T) :]
    has_last = bool(ours_T[-1] == ids_T[-1])
    return Fit(row, len(ids_T), has_last) if (ours_T[:-1] == ids_T[:-1]).all() and (has_last or len(ids_T) > 1) else None


def _row(fit: Fit, stored: StoredLogits, temperature: int) -> dict[str, object]:
    return {
        "row": fit.row,
        "has_last": fit.has_last,
        "top_k": stored.top.ids_TK.shape[1],
        "ids": stored.top.ids_TK.ravel(),
        "logits": stored.top.logits_TK.astype(np.float16).ravel(),
        "log_z": np.ascontiguousarray(stored.top.log_z_TC[:, temperature]),
    }
