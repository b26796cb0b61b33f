"""A program on all nodes of a job under a watchdog: srun and what it started, told of signals, and ended when it hangs."""

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from configs.errors import UnusableInput
from configs.progress import BEAT_VARIABLE
from slurm import attempts
from slurm.client import SlurmFailed, call, own_address

POLL_S = 0.25
MARGIN_S = 20.0
"""Of a warning: for ending a step that has not stopped by itself, and for the requeue. What Slurm ends at the time limit is not
queued again, and takes the rest of the chain with it."""
END_S = 40.0
"""From the first signal to a hung step until it is killed: a rank that still hears has its drain."""
WARNED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Step:
    """srun and what it started. Signals that this process gets go to it; it is ended when the stage's count stands still."""

    def __init__(
        self, command: Sequence[str], beat: Path, silence_s: float, warning_s: float, loading_s: float = math.inf
    ) -> None:
        self.beat, self.silence_s, self.loading_s = beat, silence_s, max(loading_s, silence_s)
        self.patience_s, self.asked_at = max(warning_s - MARGIN_S, warning_s / 2), math.inf
        self.process = subprocess.Popen(command, env=os.environ | {BEAT_VARIABLE: str(beat)})
        for number in WARNED:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """A second SIGINT makes srun end its tasks at once, so that one becomes the stage's own wish to stop."""
        self.asked_at = min(self.asked_at, time.monotonic())
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR2 if number == signal.SIGINT else number)

    @property
    def was_asked(self) -> bool:
        """To end, by a signal."""
        return self.asked_at < math.inf

    def wait(self) -> tuple[int, str]:
        """The step's exit code (128 + N for a signal), and what the watchdog saw; empty: nothing."""
        last, since = self._age_mark(), time.monotonic()
        while (code := self.process.poll()) is None:
            time.sleep(POLL_S)
            now = time.monotonic()
            if (mark := self._age_mark()) != last:
                last, since = mark, now
            if now - self.asked_at > self.patience_s:
                return self._end(f"not stopped {self.patience_s:g} s after it was asked to{self._where()}", is_asked=True)
            patience_s = self.silence_s if last else self.loading_s
            if now - since > patience_s:
                return self._end(f"nothing has moved for {patience_s:g} s{self._where()}")
        return (128 - code if code < 0 else code), ""

    def _age_mark(self) -> int:
        """Changes whenever the stage's count has. Only differences count: clocks of nodes differ."""
        try:
            return self.beat.stat().st_mtime_ns
        except OSError:
            return 0

    def _where(self) -> str:
        found = next(attempts.lines(self.beat, done=int, total=int, unit=str), None)
        return f", at {found['done']} of {found['total']} {found['unit']}" if found else ", before the first count"

    def _end(self, why: str, *, is_asked: bool = False) -> tuple[int, str]:
        """By SIGTERM, which live ranks answer by committing what they hold; what is still there after END_S by SIGKILL, on every
        node: a stopped process hears nothing else. is_asked: it has had its time."""
        say(f"watchdog: {why}: the step is ended")
        self.process.terminate()
        try:
            self.process.wait(POLL_S if is_asked else END_S)
        except subprocess.TimeoutExpired:
            job = own_address()
            try:
                call("scancel", "--signal=KILL", f"{job}.{_newest_step_of(job)}")
                self.process.wait(END_S)
            except (SlurmFailed, UnusableInput, subprocess.TimeoutExpired):
                self.process.kill()
        return self.process.wait(), why


def _newest_step_of(job: str) -> str:
    steps = [line.split(".")[-1] for line in call("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i").split()]
    numbers = [step for step in steps if step.isdigit()]
    return max(numbers, key=int) if numbers else "0"


def say(line: str) -> None:
    """In the job's log, which may lie on the disk that is full: that is no reason to end."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())  # not through a buffer, which the interpreter would fail over at its end
