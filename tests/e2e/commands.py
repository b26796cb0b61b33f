"""The command line as a user has it: a process, its exit code and its words; and a whole pipeline small enough to repeat."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

# The embedded recipe with every number turned down: the same joints, a minute instead of ten.
SMALL = (
    "generate.prompts.0.count=12",
    "generate.prompts.1.count=12",
    "generate.prompts.2.count=12",
    "generate.prompts.3.count=28",
    "generate.segment_traces=8",
    "generate.lease_ttl_s=3",  # what a killed run leaves behind is taken over without half a minute's wait
    "teacher.engine.batch_size=16",
    "evaluate.suites.0.count=6",
    "evaluate.suites.1.count=6",
    "evaluate.suites.2.count=6",
    "evaluate.suites.3.count=14",
    "evaluate.batch_size=8",
    "evaluate.gates={}",
    "train.epochs=3",
    "train.traces_per_step=16",
    "train.checkpoint_steps=5",
    "train.validation_steps=10",
)


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def command(*words: str, small: bool = False) -> list[str]:
    overrides = [word for override in SMALL for word in ("-s", override)] if small else []
    return [sys.executable, "-m", "tracestill", *words, *overrides]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def tracestill(*words: str, cwd: Path, small: bool = False, timeout_s: float = 400.0) -> Ended:
    done = subprocess.run(
        command(*words, small=small), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def kill_when(
    ready: Callable[[], bool], *words: str, cwd: Path, number: signal.Signals = signal.SIGKILL, timeout_s: float = 300.0
) -> int:
    """Starts the small pipeline, sends `number` to its front process as soon as `ready`, and returns its exit code.

    Raises:
        AssertionError: it ended before it was ready to be killed, or never got there.
    """
    process = subprocess.Popen(
        command(*words, small=True), cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"never ready: {process.communicate()[0][-2000:]}")
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode
