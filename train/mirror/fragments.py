"""The offline files of W&B, read and cut, so that stitched together they have every step once.

A resumed run writes a fragment of its own, and `wandb sync` appends fragments of one id to each other as they are (wandb 0.31: of
steps 1 to 7, killed, and 6 to 9, resumed, the server shows 6 and 7 twice). So what a killed attempt logged after the
checkpoint is cut off its fragment before the next one is begun; what has been sent already can't be, and is not sent again.

Runs in the mirror's process: reading a record takes wandb's own classes.
"""

import json
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HEADER_BYTES, BLOCK_BYTES, CHUNK_HEADER_BYTES = 7, 32 * 1024, 7
WHOLE, LAST = 1, 4
STEP_KEY = "train/step"


class Chunk(NamedTuple):
    """A piece of a record: LevelDB's log format cuts records at blocks of 32 KiB."""

    start: int
    end: int
    kind: int
    payload: bytes


class Logged(NamedTuple):
    """A record and where it begins in the file. step: of a history row, None of any other record."""

    start: int
    step: int | None


class Fragment(NamedTuple):
    """path: of the .wandb file. is_sent: a server has its rows, or may have."""

    path: Path
    is_sent: bool


def fragments_of(folder: Path, run_id: str) -> list[Fragment]:
    """Fragments of a run under folder/wandb, oldest first. Those written online count as sent: nobody can say how far."""
    paths = folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    ordered = sorted(paths, key=lambda path: path.parent.name.removeprefix("offline-"))
    return [Fragment(path, not path.parent.name.startswith("offline-") or _marker(path).exists()) for path in ordered]


def mend(path: Path, step: int = sys.maxsize) -> bool:
    """The fragment ends at its last whole record, and before the first row after `step`. False: nothing was in it, and it has
    gone (wandb 0.31 stops at such a file and sends none of the run's other fragments either)."""
    cut_after(path, step)
    if path.stat().st_size > HEADER_BYTES:
        return True
    shutil.rmtree(path.parent)
    return False


def mark_sent(path: Path) -> None:
    """`wandb sync` passes over the fragment from now on."""
    _marker(path).touch()


def last_step(path: Path) -> int | None:
    """The highest step in a fragment; None when it has no row."""
    return max((logged.step for logged in read_fragment(path) if logged.step is not None), default=None)


def cut_after(path: Path, step: int) -> None:
    """The fragment ends before its first row after `step`, and before what a kill left half-written."""
    end = HEADER_BYTES
    for chunk_end, logged in _records(path):
        if logged.step is not None and logged.step > step:
            break
        end = chunk_end
    if path.stat().st_size > end:
        with path.open("r+b") as file:
            file.truncate(end)


def read_fragment(path: Path) -> Iterator[Logged]:
    """Whole records, in order; nothing of what follows the first damaged byte."""
    return (logged for _, logged in _records(path))


def _records(path: Path) -> Iterator[tuple[int, Logged]]:
    """(where the record ends, the record)."""
    from wandb.proto import wandb_internal_pb2

    start, parts = HEADER_BYTES, b""
    for chunk in _chunks(path.read_bytes()):
        start = start if parts else chunk.start
        parts += chunk.payload
        if chunk.kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(parts)
            parts = b""
            yield chunk.end, Logged(start, _step(record))


def _chunks(content: bytes) -> Iterator[Chunk]:
    position = HEADER_BYTES
    while position + CHUNK_HEADER_BYTES <= len(content):
        left_in_block = BLOCK_BYTES - position % BLOCK_BYTES
        if left_in_block < CHUNK_HEADER_BYTES:
            position += left_in_block
            continue
        checksum = int.from_bytes(content[position : position + 4], "little")
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        end = position + CHUNK_HEADER_BYTES + length
        payload = content[position + CHUNK_HEADER_BYTES : end]
        if len(payload) < length or zlib.crc32(payload, zlib.crc32(bytes([kind]))) != checksum:
            return
        yield Chunk(position, end, kind, payload)
        position = end


def _step(record: Any) -> int | None:
    if not record.HasField("history"):
        return None
    values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
    return int(json.loads(values[STEP_KEY])) if STEP_KEY in values else None


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.synced")
