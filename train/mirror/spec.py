"""What the training and W&B's process share: the names of their files in metrics/, and what the one tells the other at its start.

Nothing heavy is imported here: the process begins in the time that wandb itself takes.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SPEC_FILE, SAMPLES_FILE, ID_FILE = "wandb-mirror.json", "wandb-samples.json", "wandb-run-id"


@dataclass(frozen=True, slots=True)
class MirrorSpec:
    """All that the process is told at its start; it runs in the folder of the metrics file. cut_step: rows that an
    earlier attempt logged after it have been taken again; 0 for a training that starts. The process deletes the file of this once
    W&B has begun."""

    metrics_file: str
    mode: Literal["offline", "online"]
    project: str
    name: str
    config: Mapping[str, object]
    lineage: Mapping[str, object]
    cut_step: int
    timeout_s: float


def run_id(folder: Path, *, is_new: bool = False) -> str:
    """The W&B id of this run folder, drawn once: a resumed run continues the same curve. is_new: another one is drawn."""
    path = folder / ID_FILE
    if is_new or not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()
