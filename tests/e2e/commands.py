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
STAGES = ("prompts", "headroom", "generate", "data", "train", "evaluate", "export", "report")

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
    "evaluate.suites.4.count=6",
    "evaluate.batch_size=8",
    "evaluate.gates={}",
    "train.epochs=3",
    "train.max_tokens_per_row=768",
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


def start(*words: str, cwd: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*words), cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(ready: Callable[[], bool], *processes: "subprocess.Popen[str]", timeout_s: float = 60.0) -> None:
    """Raises AssertionError when one of the processes ends, or time is up, before it is so."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        for process in processes:
            assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline, "never ready"
        time.sleep(0.02)


def end_of(process: "subprocess.Popen[str]", number: signal.Signals | None = None) -> tuple[Ended, float]:
    """How it ended, and how many seconds after the signal, if one is to be sent."""
    sent = time.monotonic()
    if number is not None:
        process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return Ended(process.returncode, out, err), time.monotonic() - sent


def error_line(ended: Ended) -> str:
    """The one line that says why; it is the last, and nothing but progress and log records stands before it."""
    assert "Traceback" not in ended.err, ended.err[-3000:]
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and ended.err.splitlines()[-1] == errors[0], ended.err[-3000:]
    return errors[0]
