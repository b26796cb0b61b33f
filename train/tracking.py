"""What training measured: metrics/train.jsonl is the truth, W&B a mirror that may lag, fail or be missing.

A row is on disk before its step's checkpoint is, so a resumed run finds every row up to its checkpoint. Rows after it
are cut off at resume: the file never has a step twice.
"""

import contextlib
import json
import logging
import os
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from configs.wandb_privacy import PRIVATE

logger = logging.getLogger(__name__)

Metrics = dict[str, float]
Report = Callable[[int, int, Metrics], None]

METRICS_FILE = "train.jsonl"
WANDB_TIMEOUT_S = 20.0
WANDB_QUEUE_ROWS = 10_000


def read_metrics(path: Path) -> list[Metrics]:
    """Complete rows of a metrics file; a last line that was cut by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            rows.append(json.loads(line))
    return rows


class MetricsFile:
    """Appends one JSON object a step, each fsynced before `log` returns (3.5 ms on a disk of 280 fsyncs a second)."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Keeps the rows up to resume_step and drops later ones: those steps are about to be taken again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step] if resume_step else []
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
    """Where rank 0's rows go: the file first, then the mirror and the caller's progress display. Other ranks have none."""

    def __init__(self, file: MetricsFile | None, mirror: "WandbMirror | None", report: Report | None, total_steps: int) -> None:
        self.file, self.mirror, self.report, self.total_steps = file, mirror, report, total_steps

    def log(self, step: int, metrics: Metrics) -> None:
        if self.file is not None:
            self.file.log(step, metrics)
        if self.mirror is not None:
            self.mirror.log(step, metrics)
        if self.report is not None:
            self.report(step, self.total_steps, metrics)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.mirror is not None:
            self.mirror.close()


class WandbMirror:
    """Sends rows to W&B from a thread of its own. Nothing that W&B or the network does can slow or stop a step.

    Privacy: no argument vector, host facts, package list, code, git state or console output leaves the process; what is
    logged is the metrics and the `config` given here.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: Literal["offline", "online", "disabled"],
        project: str,
        name: str,
        config: Mapping[str, object],
    ) -> None:
        self._rows: queue.Queue[tuple[int, Metrics] | None] = queue.Queue(WANDB_QUEUE_ROWS)
        self._thread = threading.Thread(target=self._run, args=(folder, mode, project, name, config), daemon=True)
        if mode != "disabled":
            self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._rows.put_nowait((step, metrics))

    def close(self) -> None:
        """Waits for the rows to be written, at most WANDB_TIMEOUT_S."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._rows.put_nowait(None)
            self._thread.join(WANDB_TIMEOUT_S)
            if self._thread.is_alive():
                logger.warning(
                    "W&B did not finish in %.0f s and was left behind; metrics/%s is complete", WANDB_TIMEOUT_S, METRICS_FILE
                )

    def _run(
        self, folder: Path, mode: Literal["offline", "online"], project: str, name: str, config: Mapping[str, object]
    ) -> None:
        try:
            self._mirror(folder, mode, project, name, config)
        except Exception as error:  # best effort by contract: whatever W&B raises, training goes on
            logger.warning("W&B stopped: %s; metrics/%s is complete", error, METRICS_FILE)

    def _mirror(
        self, folder: Path, mode: Literal["offline", "online"], project: str, name: str, config: Mapping[str, object]
    ) -> None:
        # By default the offline file is flushed every 15 s, and SIGKILL loses what is not in it.
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        import wandb  # 1 s, and only where it is wanted

        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(init_timeout=WANDB_TIMEOUT_S, **PRIVATE)  # type: ignore[arg-type]
        run = wandb.init(
            project=project,
            name=name,
            id=run_id(folder),
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=dict(config),
            settings=settings,
        )
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")
        while (row := self._rows.get()) is not None:
            run.log({"train/step": row[0], **row[1]})
        run.finish()


def run_id(folder: Path) -> str:
    """The W&B id of this run folder, drawn once: a resumed run continues the same curve (as a new fragment, offline)."""
    path = folder / "wandb-run-id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()
