"""Expert telemetry of the generation stage: counted with each segment, added up when the ranks have ended, and looked at.

A segment's counts are durable before the segment is, and its sidecar names them: the commit of the traces is the commit of
their counts. A killed launch leaves at most a file that nobody names.
"""

import logging
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.schema import Teacher
from data.engine import Completion, Request
from data.expert_counts import (
    COUNTS_FILE,
    COUNTS_FOLDER,
    SEGMENT_FACT,
    TaskCounts,
    add_up,
    committed_counts,
    counts_table,
    whole_run,
)
from data.expert_figures import LOAD_FILE, LayerLoad, layer_loads, load_table
from data.expert_load import Collapse, CountedLoad, collapses
from data.store import RunFolder, sha256_file, table_bytes, write_bytes

log = logging.getLogger(__name__)

NAMED_COLLAPSES = 3


class ExpertTally:
    """What the traces of the next segment routed, task by task."""

    def __init__(self) -> None:
        self.tasks: dict[str, TaskCounts] = {}

    def add(self, request: Request, completion: Completion) -> None:
        """Counts a completion whose engine counted its tokens; the last output token was never fed back."""
        if not isinstance(completion.expert_load, CountedLoad):
            return
        counts_LE = np.array(completion.expert_load.counts, dtype=np.int64)
        tokens = len(request.prompt_ids) + len(completion.token_ids) - 1
        if (so_far := self.tasks.get(request.task)) is not None:
            counts_LE, tokens = counts_LE + so_far.counts_LE, tokens + so_far.tokens
        self.tasks[request.task] = TaskCounts(request.task, tokens, counts_LE)

    def save(self, run: RunFolder, worker: str) -> dict[str, object]:
        """The counts are durable, and the tally is empty. Returns the facts by which a segment's sidecar names them."""
        if not self.tasks:
            return {}
        path = run.metrics / COUNTS_FOLDER / f"{time.time_ns():020d}-{worker}-{uuid.uuid4().hex[:8]}.arrow"
        write_bytes(path, table_bytes(counts_table(self.tasks.values())), replace=False)
        self.tasks = {}
        return {SEGMENT_FACT: {"file": str(path.relative_to(run.root)), "sha256": sha256_file(path)}}


class Written(NamedTuple):
    """All empty for a teacher that nobody counted."""

    files: list[Path]
    rows: list[LayerLoad]
    alarms: list[Collapse]


def write_expert_load(run: RunFolder, teacher: Teacher) -> Written:
    """metrics/expert_counts.arrow and expert_load.arrow speak of every committed trace; layers that look collapsed are one
    warning."""
    found = add_up(committed_counts(run))
    if not found:
        return Written([], [], [])
    counts_LE = whole_run(found)
    rows = layer_loads(found, _expert_parallel(teacher, counts_LE))
    tables = {run.metrics / COUNTS_FILE: counts_table(found), run.metrics / LOAD_FILE: load_table(rows)}
    for path, table in tables.items():
        write_bytes(path, table_bytes(table))
    if alarms := collapses(counts_LE, teacher.experts):
        log.warning("%s", warning(alarms))
    return Written(list(tables), rows, alarms)


def _expert_parallel(teacher: Teacher, counts_LE: np.ndarray) -> int:
    """Ranks that the layout spreads the experts over; the local engine's layout is never checked against its model."""
    return teacher.expert_parallel if counts_LE.shape[-1] % teacher.expert_parallel == 0 else 1


def warning(alarms: Sequence[Collapse]) -> str:
    """One line about all of them."""
    more = f"; and {len(alarms) - NAMED_COLLAPSES} more" if len(alarms) > NAMED_COLLAPSES else ""
    named = "; ".join(map(str, alarms[:NAMED_COLLAPSES]))
    return f"expert load looks collapsed: {named}{more} (thresholds: teacher.experts)"
