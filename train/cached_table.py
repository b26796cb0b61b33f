"""One Arrow file made once, kept on disk, mapped by every rank and every resume.

    FOLDER/KEY.arrow    the rows
    FOLDER/KEY.json     the commit: sha256 of the former, counts, and what the key is made of

Rank 0 alone writes; the others wait for its commit. Whoever is killed leaves a temporary file, which the next writer removes.
What is damaged is made again: it costs time only.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from configs.errors import UnusableInput
from data.checksum import checked_json, parse_checked
from data.records import digest
from data.schema import schema_hash
from data.store import fsync_folder, sha256_file, write_bytes

log = logging.getLogger(__name__)

KEPT = 2
"""Files in the folder: the newest, and the one before it for whoever changes their mind."""
POLL_S = 0.2

Identity = Mapping[str, str]
Write = Callable[[pa.RecordBatchFileWriter], Mapping[str, int]]


class CachedTable(NamedTuple):
    """rows: mapped, not in memory. counts: what `write` said of them. sha256: of the file."""

    rows: pa.Table
    counts: dict[str, int]
    sha256: str


def read_or_write(
    folder: Path, schema: pa.Schema, identity: Identity, write: Write, *, is_writer: bool, what: str
) -> CachedTable:
    """The file from the folder, whole and verified; written into it first where it is not there. write: called only then, and by
    the writer only. identity: of all that decides what it writes. what: named where a damaged one is made again.

    Raises:
        UnusableInput: the folder cannot be written; and whatever `write` raises. Nothing is kept then.
    """
    key = digest(schema_hash(schema), dict(identity))
    found = _read(folder, key, what if is_writer else None)
    if found is None and is_writer:
        _write(folder, key, schema, identity, write)
        found = _read(folder, key, what)
        if found is None:
            raise UnusableInput(f"{folder / key}.arrow: not what was just written there; check the disk")
    while found is None:
        time.sleep(POLL_S)
        found = _read(folder, key, None)
    return found


def _read(folder: Path, key: str, what: str | None) -> CachedTable | None:
    """None where there is none or it is damaged, which is said when `what` is."""
    sidecar, data = folder / f"{key}.json", folder / f"{key}.arrow"
    if not sidecar.is_file():
        return None
    try:
        said = parse_checked(sidecar, sidecar.read_bytes())
        if (found := sha256_file(data)) != said["sha256"]:
            raise UnusableInput(f"{data}: sha256 {found[:12]}, expected {said['sha256'][:12]}")
    except (UnusableInput, OSError) as damage:
        if what is not None:
            log.warning("%s; %s again", damage, what)
        return None
    return CachedTable(pa.ipc.open_file(pa.memory_map(str(data))).read_all(), said["counts"], said["sha256"])


def _write(folder: Path, key: str, schema: pa.Schema, identity: Identity, write: Write) -> None:
    """KEY.arrow and then KEY.json are durable; older files but the newest are gone. One writer at a time."""
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
        with temporary.open("wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                counts = dict(write(writer))
            file.flush()
            os.fsync(file.fileno())
        sha256 = sha256_file(temporary)
        temporary.replace(data)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(folder)
    commit = {"key": key, "sha256": sha256, "counts": counts, "identity": dict(identity)}
    write_bytes(folder / f"{key}.json", checked_json(commit, indent=1))
    _remove_stale(folder, key)


def _remove_stale(folder: Path, key: str) -> None:
    """This file and the newest of the others stay, KEPT in all; of any other the commit goes first."""
    newest_first = sorted(folder.glob("*.json"), key=lambda path: (path.stem != key, -path.stat().st_mtime_ns))
    for sidecar in newest_first[KEPT:]:
        sidecar.unlink()
    kept = {sidecar.stem for sidecar in newest_first[:KEPT]}
    for data in folder.glob("*.arrow"):
        if data.stem not in kept:
            data.unlink()
