"""What training measured: metrics/train.jsonl is the truth, and W&B a mirror of it (train/mirror/mirror.py).

A row is on disk before its step's checkpoint is, so a resumed run finds every row up to its checkpoint. Rows after it
are cut off at resume: the file never has a step twice.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import UnusableInput

if TYPE_CHECKING:
    from train.mirror.mirror import Sample, WandbMirror

logger = logging.getLogger(__name__)

Metrics = dict[str, float]
Report = Callable[[int, int, Metrics], None]

METRICS_FILE = "train.jsonl"


def read_metrics(path: Path) -> list[Metrics]:
    """Complete rows of a metrics file; a last line that was cut by a kill is left out. Raises UnusableInput for another
    that is damaged."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line)
                rows.append({"step": int(row["step"])} | row)
            except (ValueError, KeyError, TypeError) as error:
                raise UnusableInput(
                    f"{path}: line {number} is no row of metrics; restore the file, or move it away: training goes on without "
                    "its rows"
                ) from error
    return rows


class MetricsFile:
    """Appends one JSON object a step, each fsynced before `log` returns (3.5 ms on a disk of 280 fsyncs a second)."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Keeps the rows up to resume_step and drops later ones: those steps are about to be taken again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step] if resume_step else []
        if lost := {*range(1, resume_step + 1)} - {int(row["step"]) for row in kept}:
            logger.warning("%s: %d of the rows up to step %d are missing, the first of step %d; the training itself is whole",
                           path, len(lost), resume_step, min(lost))  # fmt: skip
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = temporary.open("ab")
        os.fsync(self._file.fileno())
        temporary.rename(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write((json.dumps({"step": step, **metrics}) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Tracker:
    """Where rank 0's rows go: the file, which W&B's mirror follows by itself, and the caller's progress display. Other ranks have
    none."""

    def __init__(
        self, file: MetricsFile | None, mirror: "WandbMirror | None", report: Report | None, total_steps: int
    ) -> None:  # fmt: skip
        self.file, self.mirror, self.report, self.total_steps = file, mirror, report, total_steps

    def log(self, step: int, metrics: Metrics) -> None:
        if self.file is not None:
            self.file.log(step, metrics)
        if self.report is not None:
            self.report(step, self.total_steps, metrics)

    def log_samples(self, samples: "Sequence[Sample]") -> None:
        if self.mirror is not None and samples:
            self.mirror.log_samples(samples)

    def log_adapter(self, folder: Path) -> None:
        if self.mirror is not None:
            self.mirror.log_adapter(folder)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.mirror is not None:
            self.mirror.close()
