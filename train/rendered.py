"""The dataset in the student's own tokens: rendered once, kept on disk, mapped by every rank and every resume.

Here and not in data/, because only training reads it: a dataset is the same for every student, and this is not.

    cache/rendered/KEY.arrow    a row a trace: trace_id, ids (int32), mask; splits one after the other, in the dataset's order
    cache/rendered/KEY.json     the commit: sha256 of the former, rows by split, and what the key is made of

The key hashes the dataset's rows, the tokenizer, its template and special tokens, and the version of the code that renders:
whatever changes makes another file. Rank 0 alone writes; the others wait for its commit. Whoever is killed leaves a temporary
file, which the next writer removes. What is damaged is rendered again: it costs time only.
"""

import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import UnusableInput
from data.chat import Encoded
from data.checksum import checked_json, parse_checked
from data.records import digest
from data.schema import schema_hash
from data.store import fsync_folder, sha256_file, write_bytes
from train.batches import Example

log = logging.getLogger(__name__)

RENDERED = pa.schema([("trace_id", pa.string()), ("ids", pa.list_(pa.int32())), ("mask", pa.list_(pa.bool_()))])
BATCH_TOKENS = 1 << 20
"""Of a record batch: what is in memory while it is rendered, some 40 MB as Python objects."""
KEPT = 2
"""Renderings in the folder: the newest, and the one before it for whoever changes their mind."""
POLL_S = 0.2

Identity = Mapping[str, str]


class Rendered(Sequence[Encoded]):
    """N traces of one split. Nothing is in memory but what is asked for: the file is mapped."""

    def __init__(self, rows: pa.Table, rows_N: np.ndarray | None = None) -> None:
        """rows: under RENDERED. rows_N: int64, which of them these are; all when None."""
        self._table, self._rows_N = rows, np.arange(rows.num_rows) if rows_N is None else rows_N
        self._trace_ids, self._ids, self._masks = (rows[name] for name in RENDERED.names)

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
        ids, mask = self._ids[place].values, self._masks[place].values
        return Encoded(ids.to_numpy().tolist(), mask.to_numpy(zero_copy_only=False).tolist())

    def select(self, rows_R: np.ndarray) -> "Rendered":
        """These traces alone, in this order."""
        return Rendered(self._table, self._rows_N[rows_R])

    def examples(self) -> Iterator[Example]:
        """One after the other, with their names."""
        for row, place in enumerate(self._rows_N.tolist()):
            yield Example(self._trace_ids[place].as_py(), self[row])

    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens."""
        return pc.call_function("list_value_length", [self._ids]).to_numpy().astype(np.int64)[self._rows_N]

    def trained(self) -> np.ndarray:
        """int64 [N]: supervised positions, as train.batches.num_trained counts them."""
        counts = [_trained(chunk) for chunk in self._masks.chunks]
        return np.concatenate([np.zeros(0, np.int64), *counts])[self._rows_N]


def _trained(masks: pa.ListArray) -> np.ndarray:
    """True values of each list but its first."""
    values, offsets = masks.values.to_numpy(zero_copy_only=False), masks.offsets.to_numpy()
    sums = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    return sums[offsets[1:]] - sums[offsets[:-1] + 1]


def read_or_render(
    folder: Path, identity: Identity, splits: Mapping[str, Iterable[Example]], *, is_writer: bool
) -> dict[str, Rendered]:
    """Every split from the folder, whole and verified; rendered into it first where it is not there. splits: in order, gone
    through only then, and by the writer only. identity: of all that decides what is in them.

    Raises:
        UnusableInput: the folder cannot be written; and whatever the splits raise. Nothing is kept then.
    """
    key = digest(schema_hash(RENDERED), dict(identity))
    found = _read(folder, key, warn=is_writer)
    if found is None and is_writer:
        _write(folder, key, identity, splits)
        found = _read(folder, key, warn=True)
        if found is None:
            raise UnusableInput(f"{folder / key}.arrow: not what was just written there; check the disk")
    while found is None:
        time.sleep(POLL_S)
        found = _read(folder, key, warn=False)
    return found


def _read(folder: Path, key: str, *, warn: bool) -> dict[str, Rendered] | None:
    """None where there is none or it is damaged."""
    sidecar, data = folder / f"{key}.json", folder / f"{key}.arrow"
    if not sidecar.is_file():
        return None
    try:
        said = parse_checked(sidecar, sidecar.read_bytes())
        if (found := sha256_file(data)) != said["sha256"]:
            raise UnusableInput(f"{data}: sha256 {found[:12]}, expected {said['sha256'][:12]}")
    except (UnusableInput, OSError) as damage:
        if warn:
            log.warning("%s; the dataset is rendered again", damage)
        return None
    table = pa.ipc.open_file(pa.memory_map(str(data))).read_all()
    starts = np.cumsum([0, *said["rows"].values()]).tolist()
    return {split: Rendered(table.slice(start, rows)) for start, (split, rows) in zip(starts, said["rows"].items(), strict=False)}


# --- writing -----------------------------------------------------------------------------------------------------


def _write(folder: Path, key: str, identity: Identity, splits: Mapping[str, Iterable[Example]]) -> None:
    """KEY.arrow and then KEY.json are durable; older renderings but the newest are gone. One writer at a time."""
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnusableInput(
            f"{folder}: cannot be written ({error.strerror}); choose another run directory with --run-dir"
        ) from error
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    data, temporary = folder / f"{key}.arrow", folder / f".{key}.{uuid.uuid4().hex}.tmp"
    try:
        rows = _write_rows(temporary, splits)
        sha256 = sha256_file(temporary)
        temporary.replace(data)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(folder)
    write_bytes(
        folder / f"{key}.json", checked_json({"key": key, "sha256": sha256, "rows": rows, "identity": dict(identity)}, indent=1)
    )
    _remove_stale(folder, key)
    log.info("rendered %d traces with the student's template in %.1f s", sum(rows.values()), time.perf_counter() - started)


def _write_rows(path: Path, splits: Mapping[str, Iterable[Example]]) -> dict[str, int]:
    """Rows written, by split; every byte of them on disk."""
    rows = dict.fromkeys(splits, 0)
    with path.open("wb") as file:
        with pa.ipc.new_file(file, RENDERED) as writer:
            for split, examples in splits.items():
                for batch in _in_batches(examples):
                    columns = zip(*((one.trace_id, one.encoded.ids, one.encoded.mask) for one in batch), strict=True)
                    writer.write_table(pa.table([list(column) for column in columns], schema=RENDERED))
                    rows[split] += len(batch)
        file.flush()
        os.fsync(file.fileno())
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


def _remove_stale(folder: Path, key: str) -> None:
    """This rendering and the newest of the others stay, KEPT in all; of any other the commit goes first."""
    newest_first = sorted(folder.glob("*.json"), key=lambda path: (path.stem != key, -path.stat().st_mtime_ns))
    for sidecar in newest_first[KEPT:]:
        sidecar.unlink()
    kept = {sidecar.stem for sidecar in newest_first[:KEPT]}
    for data in folder.glob("*.arrow"):
        if data.stem not in kept:
            data.unlink()
