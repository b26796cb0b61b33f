"""The dataset in the student's own tokens: rendered once, kept on disk, mapped by every rank and every resume.

Here and not in data/, because only training reads it: a dataset is the same for every student, and this is not.

    cache/rendered/KEY.arrow    a row a trace: trace_id, ids (int32), each token's Reason, why the trace is dropped or "";
                                splits one after the other, in the dataset's order
    cache/rendered/KEY.json     the commit (train/cached_table.py); counts: rows by split

The key hashes the dataset's rows, the tokenizer, its template and special tokens, and the version of the code that renders:
whatever changes makes another file.

Shape suffixes: N traces of a split, R reasons, V tokens of a chunk.
"""

import hashlib
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.chat import Encoded, Reason
from train.batches import Example, TokenCounts
from train.cached_table import Identity, read_or_write

log = logging.getLogger(__name__)

RENDERED = pa.schema(
    [("trace_id", pa.string()), ("ids", pa.list_(pa.int32())), ("reasons", pa.list_(pa.uint8())), ("dropped", pa.string())]
)
BATCH_TOKENS = 1 << 20
"""Of a record batch: what is in memory while it is rendered, some 40 MB as Python objects."""

Splits = Mapping[str, Iterable[Example]]


class Rendered(Sequence[Encoded]):
    """N traces of one split. Nothing is in memory but what is asked for: the file is mapped."""

    def __init__(self, rows: pa.Table, rows_N: np.ndarray | None = None) -> None:
        """rows: under RENDERED. rows_N: int64, which of them these are; all when None."""
        self._table, self._rows_N = rows, np.arange(rows.num_rows) if rows_N is None else rows_N
        self._trace_ids, self._ids, self._reasons, self._dropped = (rows[name] for name in RENDERED.names)

    def __len__(self) -> int:
        return len(self._rows_N)

    @overload
    def __getitem__(self, row: int) -> Encoded: ...
    @overload
    def __getitem__(self, row: slice) -> list[Encoded]: ...
    def __getitem__(self, row: int | slice) -> Encoded | list[Encoded]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        place = int(self._rows_N[row])
        ids, reasons = self._ids[place].values, self._reasons[place].values
        return Encoded(ids.to_numpy().tolist(), reasons.to_numpy().tobytes())

    def select(self, rows_R: np.ndarray) -> "Rendered":
        """These traces alone, in this order."""
        return Rendered(self._table, self._rows_N[rows_R])

    def examples(self) -> Iterator[Example]:
        """One after the other, with their names."""
        for row, place in enumerate(self._rows_N.tolist()):
            yield Example(self._trace_ids[place].as_py(), self[row], self._dropped[place].as_py())

    def sha256(self) -> str:
        """Hex identity of what is trained: names, ids and masks in order, hence dataset, tokenizer and template at once. A column
        at a time: as Python objects a billion tokens would take an hour at every start."""
        names, lengths, ids, trained = columns = [hashlib.sha256() for _ in range(4)]
        for batch in self._batches():
            names.update("".join(f"{name}\n" for name in batch["trace_id"].to_pylist()).encode())
            lengths.update(pc.call_function("list_value_length", [batch["ids"]]).to_numpy().astype(np.int64).tobytes())
            ids.update(batch["ids"].flatten().to_numpy().tobytes())
            trained.update((batch["reasons"].flatten().to_numpy() == Reason.TRAINED).tobytes())
        return hashlib.sha256(b"".join(column.digest() for column in columns)).hexdigest()

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """The chosen rows, as they lie in the file."""
        assert (np.diff(self._rows_N) > 0).all(), "rows in another order than the file's"
        start = 0
        for batch in self._table.to_batches():
            first, last = np.searchsorted(self._rows_N, (start, start + batch.num_rows))
            rows_N = self._rows_N[first:last] - start
            start += batch.num_rows
            yield batch if len(rows_N) == batch.num_rows else batch.take(pa.array(rows_N))

    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens."""
        return pc.call_function("list_value_length", [self._ids]).to_numpy().astype(np.int64)[self._rows_N]

    def trained(self) -> np.ndarray:
        """int64 [N]: supervised positions, as train.batches.num_trained counts them."""
        return self.counts().by_reason_NR[:, Reason.TRAINED]

    def counts(self) -> TokenCounts:
        """What becomes of the tokens of each trace, before any is dropped for its length."""
        none = np.zeros((0, len(Reason)), np.int64)
        by_reason_NR = np.concatenate([none, *(_counts(chunk) for chunk in self._reasons.chunks)])
        return TokenCounts(by_reason_NR[self._rows_N], self._dropped.to_numpy().astype(str)[self._rows_N])


def _counts(reasons: pa.ListArray) -> np.ndarray:
    """int64 [N, R]: tokens of each list by reason; its first is FIRST_TOKEN, whatever else it is."""
    offsets = reasons.offsets.to_numpy()
    lengths = np.diff(offsets)
    values_V = reasons.values.to_numpy()[offsets[0] : offsets[-1]].copy()
    values_V[(offsets[:-1] - offsets[0])[lengths > 0]] = Reason.FIRST_TOKEN
    places_V = np.repeat(np.arange(len(reasons)) * len(Reason), lengths) + values_V
    return np.bincount(places_V, minlength=len(reasons) * len(Reason)).reshape(-1, len(Reason))


def read_or_render(folder: Path, identity: Identity, splits: Splits, *, is_writer: bool) -> dict[str, Rendered]:
    """Every split from the folder, whole and verified; rendered into it first where it is not there. splits: in order, gone
    through only then, and by the writer only. identity: of all that decides what is in them.

    Raises:
        UnusableInput: the folder cannot be written; and whatever the splits raise. Nothing is kept then.
    """
    found = read_or_write(
        folder, RENDERED, identity, partial(_write_rows, splits=splits), is_writer=is_writer, what="the dataset is rendered"
    )
    ends = itertools.accumulate(found.counts.values())
    return {
        split: Rendered(found.rows.slice(end - rows, rows)) for (split, rows), end in zip(found.counts.items(), ends, strict=True)
    }


def _write_rows(writer: pa.RecordBatchFileWriter, splits: Splits) -> dict[str, int]:
    """Rows written, by split."""
    started, rows = time.perf_counter(), dict.fromkeys(splits, 0)
    for split, examples in splits.items():
        for batch in _in_batches(examples):
            columns = [
                [one.trace_id for one in batch],
                [np.asarray(one.encoded.ids, np.int32) for one in batch],
                [np.frombuffer(bytes(one.encoded.reasons), np.uint8) for one in batch],
                [one.dropped for one in batch],
            ]
            writer.write_table(pa.table(columns, schema=RENDERED))
            rows[split] += len(batch)
    log.info("rendered %d traces with the student's template in %.1f s", sum(rows.values()), time.perf_counter() - started)
    return rows


def _in_batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Runs of about BATCH_TOKENS tokens, at least one trace each."""
    batch: list[Example] = []
    tokens = 0
    for example in examples:
        batch.append(example)
        tokens += len(example.encoded.ids)
        if tokens >= BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch
