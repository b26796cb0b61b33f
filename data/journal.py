"""What a worker has in hand, before it is a trace: replies as they came, and unfinished outputs token by token.

A journal is an append-only file of framed records by one process, which never opens another's: a torn tail belongs to a
dead worker, ends its file, and nothing is ever appended behind it. Records are handed to the kernel at once (a killed
process loses none) and fsynced in groups (a lost machine loses at most `sync_seconds` of them). What a journal holds of
a trace that is not committed, its next holder goes on with: a finished output is committed without being asked again, an
unfinished one is continued. Every file stands alone, so that it can go once all its traces are committed.
"""

import contextlib
import errno
import json
import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

log = logging.getLogger(__name__)

FRAME = struct.Struct("<II")  # length and crc32 of the payload
ROTATE_BYTES = 64 << 20
SYNC_SECONDS = 0.5

Kind = Literal["partial", "finished", "reply"]
"""partial: more tokens of an output. finished: its last tokens and how it ended. reply: a server's bytes, unparsed."""


class Entry(NamedTuple):
    """One record. header: JSON values. arrays: by name."""

    kind: Kind
    trace_id: str
    header: dict[str, object]
    arrays: dict[str, np.ndarray]
    raw: bytes = b""


class Journal:
    """This worker's own records, written one after the other into WORKER.000000.log, WORKER.000001.log, ..."""

    def __init__(
        self, folder: Path, worker: str, *, rotate_bytes: int = ROTATE_BYTES, sync_seconds: float = SYNC_SECONDS
    ) -> None:
        self.folder, self.worker = folder, worker
        self.rotate_bytes, self.sync_seconds = rotate_bytes, sync_seconds
        self._number, self._size = -1, 0
        self._open: dict[int, set[str]] = {}
        """File number -> traces that only it holds all of."""
        self._descriptor = -1
        self._dirty, self._stopped = threading.Event(), threading.Event()
        self._next_file()
        self._thread = threading.Thread(target=self._keep_syncing, name="journal", daemon=True)
        self._thread.start()

    def append(self, entry: Entry, *, is_whole: bool) -> None:
        """The record has left this process. is_whole: with it, the newest file alone holds all there is of the trace."""
        if self._size >= self.rotate_bytes and is_whole:
            self._next_file()
        self._write(pack(entry))
        if is_whole:
            self.forget(entry.trace_id)
        self._open[self._number].add(entry.trace_id)

    def _write(self, frame: bytes) -> None:
        """Raises OSError when the disk is full; the file then ends with the last whole record."""
        if (written := os.write(self._descriptor, frame)) < len(frame):
            os.ftruncate(self._descriptor, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path(self._number)))
        self._size += written
        self._dirty.set()

    @property
    def wants_whole(self) -> bool:
        """The file is full: the next record of each trace should be whole, so that the older files can go."""
        return self._size >= self.rotate_bytes

    def holds(self, trace_id: str) -> bool:
        """Whether the newest file holds all there is of the trace."""
        return trace_id in self._open[self._number]

    def forget(self, trace_id: str) -> None:
        """The trace is committed, or about to be written whole: files that are of no use to anybody else go."""
        for number, held in list(self._open.items()):
            held.discard(trace_id)
            if not held and number != self._number:
                self._path(number).unlink(missing_ok=True)
                del self._open[number]

    def sync(self) -> None:
        self._dirty.clear()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """The newest file goes too, unless it holds something that others need."""
        self._stopped.set()
        self._dirty.set()
        self._thread.join()
        self.sync()
        os.close(self._descriptor)
        if not self._open[self._number]:
            self._path(self._number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.worker}.{number:06d}.log"

    def _next_file(self) -> None:
        before, self._number = self._descriptor, self._number + 1
        descriptor = os.open(self._path(self._number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._open[self._number], self._size, self._descriptor = set(), 0, descriptor
        if before >= 0:
            os.fsync(before)
            os.close(before)
            self.forget("")

    def _keep_syncing(self) -> None:
        while not self._stopped.is_set():
            self._dirty.wait()
            try:
                self.sync()
            except OSError as error:  # closed for the next file meanwhile, which syncs it; or a disk that append will name
                log.debug("journal %s: %s", self.worker, error)
            self._stopped.wait(self.sync_seconds)


def pack(entry: Entry) -> bytes:
    """Frame, one JSON line, then the arrays and the raw bytes as they are."""
    arrays = {name: np.ascontiguousarray(array) for name, array in entry.arrays.items()}
    shapes = {name: [array.dtype.str, *array.shape] for name, array in arrays.items()}
    header = {"kind": entry.kind, "trace_id": entry.trace_id, "header": entry.header, "arrays": shapes}
    payload = b"".join([json.dumps(header).encode(), b"\n", *(array.tobytes() for array in arrays.values()), entry.raw])
    return FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _unpack(payload: bytes) -> Entry:
    line, _, rest = payload.partition(b"\n")
    header, arrays, start = json.loads(line), {}, 0
    for name, (dtype, *shape) in header["arrays"].items():
        array = np.frombuffer(rest, np.dtype(dtype), count=int(np.prod(shape)), offset=start).reshape(shape)
        arrays[name], start = array, start + array.nbytes
    return Entry(header["kind"], header["trace_id"], header["header"], arrays, rest[start:])


def read_journal(path: Path) -> Iterator[tuple[int, Entry]]:
    """(offset, record) up to the first frame that is torn or damaged, where a killed worker or a lost machine ended it."""
    with path.open("rb") as file:
        while True:
            offset = file.tell()
            head = file.read(FRAME.size)
            if len(head) < FRAME.size:
                return
            length, crc = FRAME.unpack(head)
            payload = file.read(length)
            if len(payload) < length or zlib.crc32(payload) != crc:
                log.info("journal %s: ends with a torn record at byte %d", path.name, offset)
                return
            yield offset, _unpack(payload)


class Salvage(NamedTuple):
    """What was left of a trace: its finished record or its reply, or the tokens it had."""

    ending: Entry | None
    token_ids: tuple[int, ...]
    arrays: Mapping[str, np.ndarray]
    """Whole, over all tokens: `logprobs`, and `top_ids`, `top_logits`, `log_z` where logits were kept."""
    reply: Entry | None = None
    """A server's last reply, which the ending may be, or which more tokens may have followed."""


class _Place(NamedTuple):
    num_tokens: int
    is_final: bool
    path: Path
    offsets: tuple[int, ...]
    reply: int | None = None
    """Offset of the last reply; without offsets it is all there is."""


class Estate:
    """What workers that are gone left behind, by trace. Holds places in files, not contents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, int] = {}
        """File -> its size when it was read: a worker that was only stopped may have gone on."""
        self._places: dict[str, _Place] = {}

    def __contains__(self, trace_id: str) -> bool:
        return trace_id in self._places

    @property
    def trace_ids(self) -> list[str]:
        return list(self._places)

    def forget(self, trace_id: str) -> None:
        self._places.pop(trace_id, None)

    def look(self, living: set[str]) -> None:
        """Reads the journals that are new and whose workers are not among the living."""
        for name in sorted(os.listdir(self.folder)):  # noqa: PTH208
            worker = name.rsplit(".", 2)[0]
            if name.endswith(".log") and worker not in living:
                with contextlib.suppress(FileNotFoundError):  # its last trace was committed a moment ago
                    size = (self.folder / name).stat().st_size
                    if self._read.get(name) != size:
                        self._read[name] = size
                        self._index(self.folder / name)

    def _index(self, path: Path) -> None:
        places: dict[str, _Place] = {}
        for offset, entry in read_journal(path):
            if (place := _extended(places.get(entry.trace_id), path, offset, entry)) is not None:
                places[entry.trace_id] = place
        for trace_id, place in places.items():
            known = self._places.get(trace_id)
            if known is None or (place.is_final, place.num_tokens) > (known.is_final, known.num_tokens):
                self._places[trace_id] = place

    def take(self, trace_id: str) -> Salvage | None:
        """What is left of a trace, or None; the journal stays where it is."""
        place = self._places.pop(trace_id, None)
        if place is None:
            return None
        try:
            entries = [_read_at(place.path, offset) for offset in place.offsets]
            reply = None if place.reply is None else _read_at(place.path, place.reply)
        except FileNotFoundError:
            return None
        if not entries:
            return Salvage(reply, (), {}, reply)
        last = entries[-1]
        names = dict.fromkeys(name for entry in entries for name in entry.arrays)
        arrays = {name: np.concatenate([entry.arrays[name] for entry in entries if name in entry.arrays]) for name in names}
        ids = tuple(arrays.pop("ids").tolist())
        return Salvage(last if last.kind == "finished" else None, ids, arrays, reply)


def _extended(place: _Place | None, path: Path, offset: int, entry: Entry) -> _Place | None:
    """The place with one more record; None for a record that does not fit to what stands before it. Tokens that were said
    after a reply go on from it, so they count, and the reply is kept beside them."""
    if entry.kind == "reply":
        return _Place(0, True, path, (), offset)
    start, num_new, reply = entry.header["start"], len(entry.arrays["ids"]), None if place is None else place.reply
    assert isinstance(start, int)
    if start == 0:
        return _Place(num_new, entry.kind == "finished", path, (offset,), reply)
    if place is None or place.num_tokens != start or place.is_final:
        return None
    return _Place(start + num_new, entry.kind == "finished", path, (*place.offsets, offset), reply)


def _read_at(path: Path, offset: int) -> Entry:
    with path.open("rb") as file:
        file.seek(offset)
        length, _ = FRAME.unpack(file.read(FRAME.size))
        return _unpack(file.read(length))
