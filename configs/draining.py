"""Being asked to stop: the first signal asks for an orderly end, which has to come within a stated time."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from configs.errors import Interrupted, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)  # not SIGUSR1: NCCL catches it

SAME_WISH_S = 5.0
"""Slurm signals every process of a step, and torchrun passes on what it is told: a rank hears one wish twice."""


@dataclass
class Drain:
    """requested: the name of the signal that asked, "" while nobody has. given_up: why it is not waited for any longer. limit:
    the seconds in words. left, kept: what there is to go on with, when it was given up and when all was saved."""

    seconds: float
    limit: str = ""
    left: str = "what the journal holds is continued by the next start"
    kept: str = "finished traces are committed, unfinished ones journalled: the same command continues"
    requested: str = ""
    asked_at: float = 0.0
    given_up: str = ""

    def ask(self, number: int, _: FrameType | None = None) -> None:
        if self.requested and time.monotonic() - self.asked_at < SAME_WISH_S:
            return
        name = signal.Signals(number).name
        if self.requested:
            self.given_up = f"stopped by {name} again"
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.give_up(number, None)
        self.requested, self.asked_at = name, time.monotonic()
        self.given_up = f"stopped by {name}, and not drained within {self.limit or f'generate.drain_seconds {self.seconds:g}'}"
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def give_up(self, number: int, _: FrameType | None) -> None:
        raise Stopped(f"{self.given_up}; {self.left}")

    def join(self) -> None:
        """Another rank was asked, and all of them have stopped."""
        self.requested = self.requested or "a signal to another rank"

    def end(self) -> None:
        """Raises Interrupted when somebody has asked: everything that was to be saved is."""
        if self.requested:
            raise Interrupted(f"stopped by {self.requested}; {self.kept}")


@contextmanager
def draining(seconds: float, **words: str) -> Iterator[Drain]:
    """Signals ask for a drain while this lasts. Outside the main thread, which alone hears signals, nobody can ask. words: of
    Drain, where something else than generation drains."""
    drain = Drain(seconds, **words)  # type: ignore
    if threading.current_thread() is not threading.main_thread():
        yield drain
        return
    before = {number: signal.signal(number, drain.ask) for number in SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, drain.give_up)
    try:
        yield drain
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
