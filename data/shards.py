"""Many segments in log order become a few files in the order of identities, without ever holding more than a shard.

Each kept row's shard is a function of its trace_id alone, and shards are ranges of it: sorted within, they are sorted
altogether. Workers first spill the kept rows of some segments into a file for every shard, then take shards, sort what was
spilled for them and write the final file. How many workers there were, and how the log was cut into segments, shows
nowhere in the bytes.
"""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.look import completed
from data.relabel import Relabelling, with_relabelled
from data.schema import TRACE
from data.store import Segment, read_segment, sha256_file

ROW = pa.schema(
    [
        TRACE.field(name)
        for name in (
            "trace_id", "prompt_id", "task", "messages", "tools", "finish_reason", "prompt_tokens", "reasoning_tokens",
            "answer_tokens", "teacher_licence", "source_licence",
        )
    ]
    + [("provenance", pa.string())]
)  # fmt: skip
"""One row a kept trace. messages: the whole conversation, the assistant last, its reasoning in reasoning_content. tools: JSON
text of the schemas that it was prompted with, or "". provenance: "" for the trace as it came, else JSON text that says what was
made of it and why."""

SHARD_BYTES = 32 << 20
LARGEST_SHARD_BYTES = 1 << 30
SHARDS_AIM = 128
BATCH_ROWS = 1000
"""Rows of a record batch on disk: what `datasets` itself writes, and what it reads at once."""
_HEAD_DIGITS = 8
_NIBBLES = np.zeros(256, np.uint8)
_NIBBLES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_WEIGHTS = 16 ** np.arange(_HEAD_DIGITS - 1, -1, -1, dtype=np.int64)


def num_shards(text_bytes: int) -> int:
    """Files for so many bytes of text: as few as fit into memory while they are sorted. 32 MB each up to 4 GB, then larger ones
    up to 1 GB, because a spill keeps a file open for each."""
    largest = min(LARGEST_SHARD_BYTES, max(SHARD_BYTES, text_bytes // SHARDS_AIM))
    return max(1, -(-text_bytes // largest))


def shard_of(trace_ids: pa.Array | pa.ChunkedArray, shards: int) -> np.ndarray:
    """int64, one a trace, in [0, shards): which range of identities (32 hex digits each, evenly spread) it falls into."""
    heads = "".join(trace_id[:_HEAD_DIGITS].rjust(_HEAD_DIGITS, "0") for trace_id in trace_ids.to_pylist())
    values = np.frombuffer(heads.encode("ascii", "replace"), np.uint8).reshape(-1, _HEAD_DIGITS)
    return (_NIBBLES[values].astype(np.int64) @ _WEIGHTS) * shards >> (4 * _HEAD_DIGITS)


# --- out of the log ----------------------------------------------------------------------------------------------


class Spill(NamedTuple):
    """A run of segments and what becomes of their completed rows. places: for each segment, int8 a row in its order: -1 is
    not in the dataset, otherwise the position in `splits`. relabels: likewise int16, -1 or a position in relabelling.grades."""

    number: int
    segments: tuple[Segment, ...]
    places: tuple[np.ndarray, ...]
    relabels: tuple[np.ndarray, ...]
    relabelling: Relabelling
    splits: tuple[str, ...]
    shards: tuple[int, ...]
    folder: Path


def spill(task: Spill) -> int:
    """The rows that are in the dataset lie in one file a (split, shard) of this task. Returns their number. Raises UnusableInput
    for a damaged segment."""
    writers: dict[tuple[int, int], pa.RecordBatchStreamWriter] = {}
    written = 0
    with contextlib.ExitStack() as open_files:
        for segment, places_L, codes_L in zip(task.segments, task.places, task.relabels, strict=True):
            if (places_L < 0).all():
                continue
            rows = with_relabelled(rows_of(completed(read_segment(segment))), codes_L, task.relabelling)
            for split, shards in enumerate(task.shards):
                wanted = np.flatnonzero(places_L == split)
                mine = rows.take(pa.array(wanted))
                shards_R = shard_of(mine["trace_id"], shards)
                for shard in np.unique(shards_R).tolist():
                    if (split, shard) not in writers:
                        path = spill_file(task.folder, task.splits[split], shard, task.number)
                        writers[split, shard] = open_files.enter_context(pa.ipc.new_stream(str(path), ROW))
                    writers[split, shard].write_table(mine.filter(pa.array(shards_R == shard)))
                written += len(wanted)
    return written


def rows_of(traces: pa.Table) -> pa.Table:
    """Under ROW, in the order of the traces."""
    columns = [traces[name] for name in ROW.names if name != "provenance"]
    return pa.table([*columns, pa.array([""] * len(traces), pa.string())], schema=ROW)


def spill_file(folder: Path, split: str, shard: int, task: int | str) -> Path:
    return folder / f"{split}-{shard:05d}-{task if isinstance(task, str) else f'{task:05d}'}.arrow"


# --- into the dataset --------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """One file of the dataset to be: what was spilled for it, and where it goes. parquet: the same rows once more, or None."""

    split: str
    number: int
    of: int
    spilled: Path
    arrow: Path
    parquet: Path | None


class Written(NamedTuple):
    shard: Shard
    rows: int
    num_bytes: int
    sha256: str


def assemble(shard: Shard) -> Written:
    """The shard's file is on disk, its rows sorted by trace_id; what was spilled for it is gone."""
    sources = sorted(shard.spilled.glob(spill_file(shard.spilled, shard.split, shard.number, "*").name))
    tables = [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in sources]
    rows = pa.concat_tables([ROW.empty_table(), *tables]).sort_by("trace_id").combine_chunks()
    batches = rows.to_batches(max_chunksize=BATCH_ROWS)
    with pa.OSFile(str(shard.arrow), "wb") as file, pa.ipc.new_stream(file, ROW) as writer:
        for batch in batches:
            writer.write_batch(batch)
    fsync_file(shard.arrow)
    if shard.parquet is not None and rows.num_rows:  # `datasets` 5.2 cannot read a Parquet file without rows
        # Page checksums, because a reader of Parquet alone has no manifest: of 200 flipped bits 43 go unseen without them.
        pq.write_table(rows, shard.parquet, compression="zstd", write_page_checksum=True)
        fsync_file(shard.parquet)
    for path in sources:
        path.unlink()
    return Written(shard, rows.num_rows, shard.arrow.stat().st_size, sha256_file(shard.arrow))


def fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
