"""Progress across processes: a worker leaves its counts in a small file, whoever started it draws them."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 10.0
WRITE_INTERVAL_S = 0.5
BEAT_VARIABLE = "TRACESTILL_BEAT"
"""Names a file that a stage's count is written to when it has changed: whoever watches over the process looks at its age."""


class Count(NamedTuple):
    """How far a stage is. failed: of those done; said on the line, so that a run that fails does not look like one that works.
    unit: what is counted, where that is not what the stage counts. tokens: said so far, in what is not done as well: who waits
    for long answers is not silent."""

    done: int
    total: int
    note: str = ""
    failed: int = 0
    unit: str = ""
    tokens: int = 0

    @property
    def remark(self) -> str:
        """The note, and what failed."""
        return ", ".join(filter(None, [self.note, f"{self.failed} failed" if self.failed else ""]))


Report = Callable[[Count], None]


def file_reporter(path: Path) -> Report:
    """Writes each count to `path` (renamed into place, not fsynced: it is a display, not a record), at most twice a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    last = 0.0

    def report(count: Count) -> None:
        nonlocal last
        now = time.monotonic()
        if count.done < count.total and now - last < WRITE_INTERVAL_S:
            return
        last = now
        _replace(path, json.dumps(count))

    return report


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_counts(paths: list[Path]) -> Count | None:
    """The sum over workers, with the first one's note; None before all have reported."""
    counts = []
    for path in paths:
        try:
            counts.append(Count(*json.loads(path.read_text())))
        except (OSError, ValueError):
            continue
    if len(counts) < len(paths):
        return None
    sums = ((one.done, one.total, one.failed, one.tokens) for one in counts)
    done, total, failed, tokens = (sum(column) for column in zip(*sums, strict=True))
    return Count(done, total, counts[0].note, failed, counts[0].unit, tokens)


class Display:
    """One stage's bar on a terminal, one plain line every ten seconds elsewhere. Use as a context manager."""

    def __init__(self, stage: str, unit: str, console: Console) -> None:
        self.stage, self.unit, self.console = stage, unit, console
        self.started, self.first_done, self.last_line = time.monotonic(), None, 0.0
        self.counted = ""
        self.beat = own_beat()
        self.last_count: Count | None = None
        self.last_beat = 0.0
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"),
                console=console, transient=True,
            )  # fmt: skip

    def __enter__(self) -> "Display":
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.stage, total=None, rate="", note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, count: Count) -> None:
        now = time.monotonic()
        if self.first_done is None or count.unit != self.counted:  # from now on another thing is counted
            self.first_done, self.started, self.counted = count.done, now, count.unit
        rate, unit = (count.done - self.first_done) / max(now - self.started, 1e-9), count.unit or self.unit
        self._live(count, rate, unit, now)
        if self.bar is not None and self.task is not None:
            said = f"{rate:.1f} {unit}/s"
            self.bar.update(self.task, completed=count.done, total=count.total, rate=said, note=count.remark)
        elif now - self.last_line >= PLAIN_INTERVAL_S:
            self.last_line = now
            left = f"{(count.total - count.done) / rate:.0f} s left" if rate > 0 else "starting"
            print(
                f"{self.stage}: {count.done}/{count.total} {unit}, {rate:.1f}/s, {left} {count.remark}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def _live(self, count: Count, rate: float, unit: str, now: float) -> None:
        """A sign of life for whoever watches: only where something has changed since the last one, at most twice a second."""
        if self.beat is None or count == self.last_count or now - self.last_beat < WRITE_INTERVAL_S:
            return
        self.last_count, self.last_beat = count, now
        write_beat(self.beat, self.stage, count._replace(unit=unit), per_s=rate)


def own_beat() -> Path | None:
    """Where whoever watches over this process looks for its sign of life, if anybody does."""
    return Path(os.environ[BEAT_VARIABLE]) if os.environ.get(BEAT_VARIABLE) else None


def expect_loading() -> None:
    """What comes now reads a model: whoever watches waits as long as for a first count."""
    if (path := own_beat()) is not None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def beat_reporter(stage: str) -> Report:
    """Signs of life alone, at most twice a second: for a long pass inside of what a stage counts."""
    path, last = own_beat(), -math.inf

    def report(count: Count) -> None:
        nonlocal last
        if path is not None and (now := time.monotonic()) - last >= WRITE_INTERVAL_S:
            last = now
            write_beat(path, stage, count)

    return report


def write_beat(path: Path, stage: str, count: Count, *, per_s: float = 0.0) -> None:
    """A sign of life; what it says is for `tracestill status`."""
    said = {"stage": stage, "done": count.done, "total": count.total, "unit": count.unit, "per_s": per_s, "note": count.remark}
    with contextlib.suppress(OSError):  # a display; the stage itself finds out that the disk is full
        _replace(path, json.dumps(said))
