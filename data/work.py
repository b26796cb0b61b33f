"""Who is at what: leases on units of work, held by workers that show they are alive.

A worker is a small file, its *beat*, whose modification time it renews; a lease is a hard link to its holder's beat. So a
claim is one atomic `link` (one of two workers gets EEXIST), one `utime` renews every lease a worker holds, and a folder
listing, whose entries carry the inode, says which leases belong together: one `stat` a worker tells which are stale. A
stale lease is taken over by linking its next *generation*, UNIT.1 after UNIT.0, which again only one worker can do. Ages
are differences of two modification times by the file server's clock; no host's clock and no process id is ever asked.

Leases are advisory. A worker that was stopped for longer than the time to live, or whose claim was just taken over, may
finish what another one finishes too: identity is decided at read (data/store.py).
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.store import RunFolder

log = logging.getLogger(__name__)

BEATS_PER_TTL = 6  # a beat may come five times late before anybody calls its worker dead
SURVEYS_PER_TTL = 4


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """The places of a run's work, by name. All of it is scratch: a sealed run needs none."""

    root: Path

    @classmethod
    def of(cls, run: RunFolder) -> "WorkFolder":
        return cls(run.root / "work")

    @property
    def workers(self) -> Path:
        return self.root / "workers"

    @property
    def leases(self) -> Path:
        return self.root / "leases"

    @property
    def journal(self) -> Path:
        return self.root / "journal"

    @property
    def servers(self) -> Path:
        return self.root / "servers"

    @property
    def identity(self) -> Path:
        return self.root / "identity.json"

    def beat(self, worker: str) -> Path:
        return self.workers / f"{worker}.beat"

    def facts(self, worker: str) -> Path:
        return self.workers / f"{worker}.json"


class Worker:
    """This process as other workers see it: alive while its beat is renewed, which a thread does. Use as a context manager.

    On a clean exit its leases and its beat are gone, so that others take over at once; its facts stay.
    """

    def __init__(self, folder: WorkFolder, name: str, ttl_s: float) -> None:
        self.folder, self.name, self.ttl_s = folder, name, ttl_s
        self.beat = folder.beat(name)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="beat", daemon=True)

    def __enter__(self) -> "Worker":
        for place in (self.folder.workers, self.folder.leases, self.folder.journal):
            place.mkdir(parents=True, exist_ok=True)
        self._file = self.beat.open("x")  # open for as long as we are here: nobody's beat can get its inode
        self._file.write(self.name)
        self._file.flush()
        self.inode = os.fstat(self._file.fileno()).st_ino
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self.beat.unlink(missing_ok=True)

    def renew(self) -> float:
        """The beat is new; returns the file server's idea of now."""
        os.utime(self.beat)
        return self.beat.stat().st_mtime

    def _keep_beating(self) -> None:
        while not self._stopped.wait(self.ttl_s / BEATS_PER_TTL):
            try:
                self.renew()
            except OSError as error:  # a file server's hiccup: others may take over, and duplicates are superseded
                log.warning("heartbeat %s: %s", self.beat, error)

    def tell(self, facts: dict[str, object]) -> None:
        """What `--status` shows of this worker, and when it did so by the file server's clock (seen_at). A display and a budget's
        estimate, not a record: renamed, not fsynced, and left out when the disk refuses it, which whoever writes a record will
        say."""
        path = self.folder.facts(self.name)
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(facts | {"seen_at": self.renew()}))
            temporary.replace(path)
        except OSError as error:
            log.warning("%s: %s", path, error.strerror)


def read_facts(folder: WorkFolder, known: Mapping[str, dict[str, object]] | None = None) -> dict[str, dict[str, object]]:
    """Of every worker there ever was, what it last told. seen_at: when it was last seen alive, by its beat where that still
    stands: a teacher of a terabyte is loaded for a quarter of an hour, in which its worker tells nothing. known: what was
    read before, and is not read again of those that have ended: a run of a week has had thousands."""
    found = {}
    for path in sorted(folder.workers.glob("*.json")) if folder.workers.is_dir() else ():
        if known is not None and known.get(path.stem, {}).get("state") == "ended":
            found[path.stem] = known[path.stem]
            continue
        with contextlib.suppress(OSError, ValueError):
            if not isinstance(facts := json.loads(path.read_text()), dict):
                continue
            found[path.stem] = facts
            with contextlib.suppress(FileNotFoundError):
                facts["seen_at"] = max(facts.get("seen_at", 0.0), folder.beat(path.stem).stat().st_mtime)
    return found


def ages(folder: WorkFolder, now: float | None = None) -> dict[str, float]:
    """Seconds since the last beat of each worker that has not ended. now: by the file server, as Worker.renew gives it."""
    beats = list(folder.workers.glob("*.beat")) if folder.workers.is_dir() else []
    if beats and now is None:
        now = server_now(folder)
    found = {}
    for path in beats:
        with contextlib.suppress(FileNotFoundError):
            found[path.stem] = (now or 0.0) - path.stat().st_mtime
    return found


def server_now(folder: WorkFolder) -> float:
    """By the file server's clock; by this host's for whoever may only read."""
    try:
        (folder.workers / ".now").touch()
        return (folder.workers / ".now").stat().st_mtime
    except OSError:
        return time.time()


def clear(folder: WorkFolder, ttl_s: float) -> None:
    """What workers that are gone left is gone too: what they had in hand is committed. The folders stay, for whoever comes
    late and finds nothing to do."""
    living = {name for name, age in ages(folder).items() if age <= ttl_s}
    kept = {folder.beat(name).stat().st_ino for name in living if folder.beat(name).exists()}
    for path in folder.journal.glob("*.log"):
        if path.name.rsplit(".", 2)[0] not in living:
            path.unlink(missing_ok=True)
    for path in [*folder.leases.glob("*.*"), *folder.workers.glob("*.beat")]:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino not in kept:
                path.unlink()


class Held(NamedTuple):
    """The newest lease on a unit, by somebody else."""

    generation: int
    is_stale: bool


@dataclass
class Leases:
    """The units this worker holds, and what it knows of the others'."""

    worker: Worker
    mine: dict[int, int] = field(default_factory=dict)
    """Unit -> generation."""
    others: dict[int, Held] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stale_inodes: set[int] = set()
        self._surveyed = -float("inf")

    def look(self) -> None:
        """Lists the leases. Which holders are dead is asked a few times in a time to live, not at every look."""
        newest, path_of = dict[int, tuple[int, int]](), dict[int, str]()
        for unit, generation, inode, path in _leases(self.worker.folder.leases):
            if generation >= newest.get(unit, (-1, 0))[0]:
                newest[unit] = generation, inode
            path_of[inode] = path
        if time.monotonic() - self._surveyed >= self.worker.ttl_s / SURVEYS_PER_TTL:
            self._survey(path_of)
        self.others = {
            unit: Held(generation, inode in self._stale_inodes)
            for unit, (generation, inode) in newest.items()
            if unit not in self.mine
        }

    def _survey(self, path_of: dict[int, str]) -> None:
        now = self.worker.renew()
        self._stale_inodes, self._surveyed = set(), time.monotonic()
        for inode, path in path_of.items():
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(path)  # noqa: PTH116  (a string from scandir)
                if found.st_ino == inode and now - found.st_mtime > self.worker.ttl_s:
                    self._stale_inodes.add(inode)

    def is_free(self, unit: int) -> bool:
        """As of the last look."""
        return unit not in self.mine and ((held := self.others.get(unit)) is None or held.is_stale)

    def claim(self, unit: int) -> bool:
        """Whether the unit is ours now. What was done of it meanwhile has to be read again after the claim."""
        if not self.is_free(unit):
            return False
        held = self.others.get(unit)
        generation = 0 if held is None else held.generation + 1
        lease = self._path(unit, generation)
        try:
            os.link(self.worker.beat, lease)
        except FileExistsError:
            # Over NFS a retransmitted link can say EEXIST of the link it has just made.
            if _inode_of(lease) != self.worker.inode:
                return False
        self.mine[unit] = generation
        self.others.pop(unit, None)
        return True

    def release(self, unit: int) -> None:
        """Only after everything that was done of the unit is committed, or will be asked again. Older generations stand until
        now: whoever has not looked for a while would else claim a unit that is held. A lease that is not ours any more (we
        stood still, and others came and went) is left to whom it belongs."""
        last = self.mine.pop(unit)
        if _inode_of(self._path(unit, last)) == self.worker.inode:
            for generation in range(last, -1, -1):
                self._path(unit, generation).unlink(missing_ok=True)

    def release_all(self) -> None:
        for unit in list(self.mine):
            self.release(unit)

    def _path(self, unit: int, generation: int) -> Path:
        return self.worker.folder.leases / f"{unit:07d}.{generation}"


def _leases(folder: Path) -> Iterator[tuple[int, int, int, str]]:
    """(unit, generation, inode, path) of every lease there is."""
    with os.scandir(folder) as entries:
        for entry in entries:
            unit, _, generation = entry.name.partition(".")
            if unit.isdigit() and generation.isdigit():
                yield int(unit), int(generation), entry.inode(), entry.path


def _inode_of(path: Path) -> int:
    """0 of a file that is not there."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_ino
    return 0
