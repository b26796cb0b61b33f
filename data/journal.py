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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from data.store import fsync_folder

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
        self._unneeded: list[Path] = []
        """Files whose traces are whole elsewhere, once that is on the disk."""
        self._descriptor = -1
        self._lock = threading.Lock()
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
        """The trace is committed, or written whole: files that are of no use to anybody else go with the next sync."""
        for number, held in list(self._open.items()):
            held.discard(trace_id)
            if not held and number != self._number:
                with self._lock:
                    self._unneeded.append(self._path(number))
                del self._open[number]
                self._dirty.set()

    def sync(self) -> None:
        """What was appended is on the disk, and then what it makes unneeded is gone: never the other way round."""
        self._dirty.clear()
        with self._lock:
            unneeded, self._unneeded = self._unneeded, []
        try:
            os.fsync(self._descriptor)
        except OSError:
            with self._lock:
                self._unneeded += unneeded
            raise
        for path in unneeded:
            path.unlink(missing_ok=True)

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
        fsync_folder(self.folder)
        if before >= 0:
            os.fsync(before)  # while it is still what `sync` knows: else that could call on the disk what is not
        self._open[self._number], self._size, self._descriptor = set(), 0, descriptor
        if before >= 0:
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
    """(offset, record) up to the first frame that is torn, where a killed worker or a lost machine ended it. A frame that does
    not have its checksum is left out; where its length is what is damaged, those behind it are too."""
    with path.open("rb") as file:
        while True:
            offset = file.tell()
            head = file.read(FRAME.size)
            if len(head) < FRAME.size:
                return
            length, crc = FRAME.unpack(head)
            payload = file.read(length)
            if len(payload) < length or not length:  # no length: a page that the file system never wrote
                log.info("journal %s: ends with a torn record at byte %d", path.name, offset)
                return
            if zlib.crc32(payload) != crc:  # a flipped bit, and not in the length: what follows may be whole
                log.warning("journal %s: the record at byte %d is damaged and left out", path.name, offset)
                continue
            yield offset, _unpack(payload)


class Salvage(NamedTuple):
    """What was left of a trace. ending: its finished record. token_ids: the longest output that was written down. arrays:
    whole, over all those tokens: `logprobs`, and `top_ids`, `top_logits`, `log_z` where logits were kept. reply: the last
    that a server gave; only its reader can tell whether it is all of the answer, or as far as another worker got, or
    less."""

    ending: Entry | None
    token_ids: tuple[int, ...]
    arrays: Mapping[str, np.ndarray]
    reply: Entry | None = None


class _Tokens(NamedTuple):
    """Records that make up one output, in one file."""

    num_tokens: int
    is_final: bool
    path: Path
    offsets: tuple[int, ...]

    @property
    def worth(self) -> tuple[int, ...]:
        return self.is_final, self.num_tokens


NOTHING = _Tokens(0, False, Path(), ())


class _Reply(NamedTuple):
    """A record of a reply and of those before it."""

    num_replies: int
    path: Path
    offset: int

    @property
    def worth(self) -> tuple[int, ...]:
        return (self.num_replies,)


Of = TypeVar("Of", _Tokens, _Reply)


class Estate:
    """What workers that are gone left behind, by trace. Holds places in files, not contents. Several may have had the same
    trace, one after the other: a reply that one of them kept and the tokens that the next one added are both of use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, int] = {}
        """File -> its size when it was read: a worker that was only stopped may have gone on."""
        self._tokens: dict[str, _Tokens] = {}
        self._replies: dict[str, _Reply] = {}

    def __contains__(self, trace_id: str) -> bool:
        return trace_id in self._tokens or trace_id in self._replies

    @property
    def trace_ids(self) -> list[str]:
        return list(self._tokens | self._replies)

    def forget(self, trace_id: str) -> None:
        self._tokens.pop(trace_id, None)
        self._replies.pop(trace_id, None)

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
        tokens, replies = dict[str, _Tokens](), dict[str, _Reply]()
        for offset, entry in read_journal(path):
            if entry.kind == "reply":
                sizes = entry.header["sizes"]
                assert isinstance(sizes, list)
                replies[entry.trace_id] = _Reply(len(sizes), path, offset)
                tokens.pop(entry.trace_id, None)  # a stream's, which the reply holds again
            elif (place := _extended(tokens.get(entry.trace_id, NOTHING), path, offset, entry)).num_tokens:
                tokens[entry.trace_id] = place
        _keep_better(self._tokens, tokens)
        _keep_better(self._replies, replies)

    def take(self, trace_id: str) -> Salvage | None:
        """What is left of a trace, or None; the journal stays where it is."""
        tokens, reply = self._tokens.pop(trace_id, None), self._replies.pop(trace_id, None)
        entries = [] if tokens is None else _read_all(tokens.path, tokens.offsets)
        found = [] if reply is None else _read_all(reply.path, (reply.offset,))
        if not entries and not found:
            return None
        last = entries[-1] if entries else None
        names = dict.fromkeys(name for entry in entries for name in entry.arrays)
        arrays = {name: np.concatenate([entry.arrays[name] for entry in entries if name in entry.arrays]) for name in names}
        ids = tuple(arrays.pop("ids").tolist()) if entries else ()
        is_finished = tokens is not None and tokens.is_final
        return Salvage(last if is_finished else None, ids, arrays, found[0] if found else None)


def _keep_better(known: dict[str, Of], new: Mapping[str, Of]) -> None:
    for trace_id, place in new.items():
        if trace_id not in known or place.worth > known[trace_id].worth:
            known[trace_id] = place


def _extended(place: _Tokens, path: Path, offset: int, entry: Entry) -> _Tokens:
    """The place with one more record, or as it was: of a record that does not fit to what stands before it. A finished output
    that is an abort will be asked again, and what had been said of it before is still a beginning."""
    start, num_new = entry.header["start"], len(entry.arrays["ids"])
    assert isinstance(start, int)
    is_final = entry.kind == "finished" and entry.header["finish_reason"] != "abort"
    if start == 0 and (is_final or entry.kind == "partial" or num_new > place.num_tokens):
        return _Tokens(num_new, is_final, path, (offset,))
    if start == 0 or place.num_tokens != start or place.is_final:
        return place
    return _Tokens(start + num_new, is_final, path, (*place.offsets, offset))


def _read_all(path: Path, offsets: Iterable[int]) -> list[Entry]:
    """Nothing from a file that has gone: its traces were committed meanwhile."""
    try:
        return [_read_at(path, offset) for offset in offsets]
    except FileNotFoundError:
        return []


def _read_at(path: Path, offset: int) -> Entry:
    with path.open("rb") as file:
        file.seek(offset)
        length, _ = FRAME.unpack(file.read(FRAME.size))
        return _unpack(file.read(length))
