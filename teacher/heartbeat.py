"""Which rank is late: every rank says about once a second where it is, so that those who wait for one can name it.

A rank that dies or stops inside a collective leaves the others in it, and what they see is `Connection closed by peer`
(gloo, at once), a time-out (gloo, when the process was stopped) or nothing at all: DeepSpeed's own process groups keep
torch's default of 30 minutes whatever time-out the job was given, and a GPU's queue does not answer Python. So a thread
beside the decode loop publishes this rank's beat to the launch's key-value store, reads the others', and ends the
process with one line when a rank has been silent, or this rank has been in one step, for longer than the time-out.

The store is the one torchrun's agent serves, not a rank: it outlives every rank of its node, rank 0 included. One small
message a second and rank; the decode loop itself only assigns two fields a step.
"""

import atexit
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, NoReturn, Protocol

import torch.distributed as dist

from configs.errors import Interrupted, Stopped, TracestillError
from configs.launch import rank_error_line

log = logging.getLogger(__name__)

BEAT_S = 1.0
SILENT_BEATS = 3.5  # a thread that shares two cores with four ranks has been seen 2 beats late
FRESH_BEATS = 2.0  # after a failure: a beat read sooner may have been sent before its rank died
GRACE_BEATS = 15.0  # for the main thread to notice by itself, with the better message, that another rank has ended
DONE = "done"


class Store(Protocol):
    """What of torch's key-value stores is used here."""

    def set(self, key: str, value: str, /) -> None: ...

    def check(self, keys: list[str], /) -> bool: ...

    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


class RankLost(TracestillError):
    """A collective did not end: the message names this rank, its step, and the rank it waited for."""


class Beat(NamedTuple):
    """Where a rank is. number: rises with every beat. step: forward passes begun. doing: what it is in, for a reader.
    ended: why it left, empty while it lives."""

    number: int
    step: int
    doing: str
    ended: str = ""

    def encode(self) -> str:
        return "\t".join((str(self.number), str(self.step), self.doing, self.ended))

    @classmethod
    def decode(cls, text: str) -> "Beat":
        number, step, doing, ended = text.split("\t")
        return cls(int(number), int(step), doing, ended)


class Seen(NamedTuple):
    """Another rank's newest beat, and when it was first read by this rank's own clock: clocks of nodes differ."""

    beat: Beat
    at: float


def culprit(step: int, others: Mapping[int, Seen], now: float, silent_s: float) -> str:
    """Who keeps the others waiting, as words; empty when all are alive and level with `step`. First ranks that fell
    silent without a word, then those that said why they ended, then those that are steps behind."""
    behind = {rank: seen for rank, seen in others.items() if not seen.beat.ended and seen.beat.step < step}
    silent = {rank: seen for rank, seen in others.items() if not seen.beat.ended and now - seen.at > silent_s}
    ended = {rank: seen for rank, seen in others.items() if seen.beat.ended}
    if silent:
        return "; ".join(
            f"rank {rank} has been silent for {now - seen.at:.0f} s, last in step {seen.beat.step} ({seen.beat.doing})"
            for rank, seen in silent.items()
        )
    if ended:
        first = min(ended, key=lambda rank: ended[rank].at)
        return f"rank {first} ended in step {ended[first].beat.step}: {ended[first].beat.ended}"
    return "; ".join(f"rank {rank} is still in step {seen.beat.step} ({seen.beat.doing})" for rank, seen in behind.items())


# What gloo, NCCL and torch's store say when the other side is gone. gloo raises plain RuntimeErrors.
_SOURCE_LINE = re.compile(r"^\[\S+:\d+\] ")
_COLLECTIVE = re.compile(r"gloo|NCCL|TCPStore|Connection (?:closed|reset|refused)|Broken pipe|[Tt]imed out waiting")


_REQUESTS = (Interrupted, Stopped, KeyboardInterrupt)


def is_of_others(error: BaseException) -> bool:
    """Whether the cause may lie with another rank: a failed collective, or torchrun's request to end, which follows a
    rank's death as it follows a user's wish."""
    if isinstance(error, (*_REQUESTS, dist.DistError)):
        return True
    return isinstance(error, RuntimeError) and _COLLECTIVE.search(str(error)) is not None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Requests to end are not heard meanwhile: torchrun's comes right behind the death of a rank, and would stop the
    explanation of it. Signals belong to the main thread; in any other this does nothing."""
    numbers = (signal.SIGTERM, signal.SIGUSR2) if threading.current_thread() is threading.main_thread() else ()
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def end_process(error: RankLost) -> NoReturn:
    """From the watching thread, while the main one sits in a collective that no exception reaches."""
    print(rank_error_line(error), file=sys.stderr, flush=True)
    os._exit(error.exit_code)


class Heartbeat:
    """This rank's beat and its view of the others'. `enter` and `leave` belong to the rank's main thread.

    store: a connection of its own, because a client of torch's store waits for its answers one at a time. timeout_s: of
    a rank's silence, and of one step of this rank. give_up: called in the watching thread.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        timeout_s: float,
        *,
        beat_s: float = BEAT_S,
        give_up: Callable[[RankLost], object] = end_process,
    ) -> None:
        self.store, self.rank, self.others = store, rank, [other for other in range(world) if other != rank]
        self.timeout_s, self.beat_s, self.give_up = timeout_s, beat_s, give_up
        self.step, self.doing = 0, "loading"
        self.entered: float | None = None  # None: outside any step, where this rank may take its time
        self.seen: dict[int, Seen] = {}
        self._number, self._ended, self._is_explaining = 0, "", False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()
        atexit.register(self._leave_a_word)

    def enter(self, doing: str, *, step: int | None = None) -> None:
        """This rank is in `doing` from now on, of a new step if one is given."""
        self.step = self.step if step is None else step
        self.doing, self.entered = doing, time.monotonic()

    def leave(self) -> None:
        self.doing, self.entered = "between steps", None

    def end(self, why: str) -> None:
        """Publishes the last beat. why: what others are told that wait for this rank."""
        self._ended = " ".join(why.split()) or DONE
        self._stop.set()
        self._thread.join(timeout=2 * self.beat_s)
        atexit.unregister(self._leave_a_word)

    def _leave_a_word(self) -> None:
        """At the exit of a process whose caller failed between steps: without it, that looks like being killed."""
        error = getattr(sys, "last_value", None)
        self.end("its caller failed; see its own message" if error is None else f"{type(error).__name__}: {error}")

    @contextmanager
    def answerable(self) -> Iterator[None]:
        """An exception that leaves this block says whose fault it is: RankLost when a collective failed, or this rank was
        asked to end, because of another rank; any other as it is. Either way the other ranks are told."""
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException as error:
            with undisturbed():
                lost = self.explain(error) if is_of_others(error) else None
                self.end(str(lost or f"{type(error).__name__}: {error}"))
            if lost is None:
                raise
            raise lost from error

    def explain(self, error: BaseException) -> RankLost | None:
        """What `error`, raised in a step, says of other ranks; None when they are all well, so that it is this rank's own.
        Waits until every other rank has beaten again or is known to be silent, some seconds at most."""
        self._is_explaining = True
        asked = time.monotonic()
        fresh_from, deadline = asked + FRESH_BEATS * self.beat_s, asked + (SILENT_BEATS + 1.5) * self.beat_s
        while time.monotonic() < deadline and not all(self._is_accounted_for(other, fresh_from) for other in self.others):
            time.sleep(self.beat_s / 10)
        seen = self.seen
        if isinstance(error, _REQUESTS):  # a user's wish reaches all ranks: that another has gone is no news
            seen = {other: last for other, last in seen.items() if not last.beat.ended}
        found = culprit(0, seen, time.monotonic(), SILENT_BEATS * self.beat_s)
        said = _SOURCE_LINE.sub("", str(error) or type(error).__name__).split(". ")[0].splitlines()[0]
        return self._lost(said, found) if found else None

    def _is_accounted_for(self, other: int, fresh_from: float) -> bool:
        seen = self.seen.get(other)
        return seen is not None and (seen.at > fresh_from or bool(seen.beat.ended))

    def _lost(self, what: str, found: str) -> RankLost:
        return RankLost(f"rank {self.rank}, step {self.step} ({self.doing}): {what}; {found or 'no rank is known to be late'}")

    # --- the thread ---

    def _run(self) -> None:
        store_lost_at: float | None = None
        while True:
            stopping = self._stop.is_set()
            try:
                self._beat()
                store_lost_at = None
            except Exception as error:  # torch has no common class for a store that is gone
                store_lost_at = store_lost_at or time.monotonic()
                if not stopping and time.monotonic() - store_lost_at > self.timeout_s:
                    self.give_up(self._lost(f"the launcher's store does not answer ({str(error).splitlines()[0]})", ""))
                    return
            if stopping:
                return
            if not self._is_explaining and (lost := self._verdict(time.monotonic())) is not None:
                self.give_up(lost)
                return
            self._stop.wait(self.beat_s)

    def _beat(self) -> None:
        self._number += 1
        self.store.set(str(self.rank), Beat(self._number, self.step, self.doing, self._ended).encode())
        known = [other for other in self.others if other in self.seen or self.store.check([str(other)])]
        now = time.monotonic()
        for other, value in zip(known, self.store.multi_get([str(other) for other in known]) if known else [], strict=True):
            beat = Beat.decode(value.decode())
            if other not in self.seen or self.seen[other].beat.number != beat.number:
                self.seen[other] = Seen(beat, now)

    def _verdict(self, now: float) -> RankLost | None:
        """Who ends this rank's waiting, if anybody does. Only silence counts outside a step: loading takes its time."""
        silent = {rank: seen for rank, seen in self.seen.items() if not seen.beat.ended and now - seen.at > self.timeout_s}
        if silent:
            return self._lost(f"waited {self.timeout_s:g} s", culprit(0, silent, now, self.timeout_s))
        if (entered := self.entered) is None:
            return None
        patience_s = GRACE_BEATS * self.beat_s
        if any(seen.beat.ended not in ("", DONE) and now - seen.at > patience_s for seen in self.seen.values()):
            return self._lost("waited in vain", culprit(self.step, self.seen, now, self.timeout_s))
        if now - entered > self.timeout_s:
            found = culprit(self.step, self.seen, now, SILENT_BEATS * self.beat_s)
            return self._lost(f"not done after {self.timeout_s:g} s", found)
        return None


def launch_store(timeout_s: float) -> Store:
    """A connection of our own to the store of this launch, under a prefix of its own."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=min(timeout_s, 60.0))
    store = dist.TCPStore(address, port, is_master=False, timeout=patience)  # type: ignore[attr-defined]
    return dist.PrefixStore("tracestill/heartbeat", store)  # type: ignore[attr-defined]
