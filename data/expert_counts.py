"""Expert telemetry as Arrow: raw counts are the truth, every figure is derived from them.

    metrics/expert_counts/TIME-WORKER.arrow   what one segment of traces routed; the segment's sidecar names the file and
                                              its hash, so that both are committed at once, and a reader who follows the
                                              sidecars adds every trace up exactly once, however many launches died
    metrics/expert_counts.arrow               the whole run: (part, task, layer, tokens, counts)
    metrics/expert_load.arrow                 figures of each (task or whole run, layer): data/expert_figures.py

Copies of a trace that two workers both finished count twice: their tokens were routed twice.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from configs.errors import UnusableInput
from data.schema import schema_hash
from data.store import RunFolder, read_rollup, read_table, segments

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
COUNTS_FILE = "expert_counts.arrow"
COUNTS_FOLDER = "expert_counts"
SEGMENT_FACT = "expert_counts"
"""Key in a trace segment's facts: {"file": path relative to the run, "sha256": of it}."""
ALARMS_COUNT = "expert_alarms"
"""Key in the counts of the generate stage's manifest: a line for each layer's figure beyond the recipe's thresholds."""

SCHEMA_METADATA = {"tracestill.expert_schema": str(SCHEMA_VERSION)}
COUNTS = pa.schema(
    [
        ("part", pa.int32()),
        ("task", pa.string()),
        ("layer", pa.int32()),
        ("tokens", pa.int64()),
        ("counts", pa.list_(pa.int64())),
    ],
    metadata=SCHEMA_METADATA,
)


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """Assignments of one task's tokens, [L, E] int64. tokens: that were fed, prompts and outputs. part: 0 for the first half
    of the task's tokens in the order of their commits, 1 for the second; 0 within a segment."""

    task: str
    tokens: int
    counts_LE: np.ndarray
    part: int = 0


# --- Arrow -------------------------------------------------------------------------------------------------------


def counts_table(found: Iterable[TaskCounts]) -> pa.Table:
    """A row for each part, task and layer."""
    rows = [
        {"part": one.part, "task": one.task, "layer": layer, "tokens": one.tokens, "counts": counts_E}
        for one in found
        for layer, counts_E in enumerate(one.counts_LE)
    ]
    return pa.Table.from_pylist(rows, schema=COUNTS)


def from_counts_table(table: pa.Table) -> list[TaskCounts]:
    """Raises UnusableInput when its schema is not the current one."""
    check_schema(table, COUNTS)
    parts, tasks, tokens = (table[name].to_pylist() for name in ("part", "task", "tokens"))
    counts = table["counts"].combine_chunks().values.to_numpy()  # one list, every row's experts
    counts_XE = counts.reshape(table.num_rows, -1) if table.num_rows else counts.reshape(0, 0)
    found = []
    for (part, task), rows in itertools.groupby(range(table.num_rows), key=lambda row: (parts[row], tasks[row])):
        span = list(rows)
        found.append(TaskCounts(task, tokens[span[0]], counts_XE[span], part))
    return found


def check_schema(table: pa.Table, expected: pa.Schema) -> None:
    """Raises UnusableInput when the table's columns are not the expected ones."""
    if schema_hash(table.schema) != schema_hash(expected):
        raise UnusableInput(
            f"expert telemetry: schema {schema_hash(table.schema)}, expected {schema_hash(expected)} "
            f"(version {SCHEMA_VERSION}); use the release that wrote it"
        )


# --- reading a run -----------------------------------------------------------------------------------------------


def committed_counts(run: RunFolder) -> Iterator[list[TaskCounts]]:
    """What each committed segment routed, in the order of the commits. A damaged count file is left out with a warning:
    telemetry never stops a run whose traces are whole."""
    for segment in segments(run.traces) if run.traces.is_dir() else ():
        named = segment.facts.get(SEGMENT_FACT)
        if named is None:  # no router in this teacher, or a server's
            continue
        try:
            yield from_counts_table(read_table(run.root / named["file"], sha256=named["sha256"]))
        except (UnusableInput, KeyError, TypeError, pa.ArrowInvalid) as error:
            log.warning("expert telemetry of segment %s is left out: %s", segment.path.stem, error)


def read_counts(run: RunFolder) -> list[TaskCounts]:
    """The whole run's counts as the generate stage sealed them; empty before it has, and for a teacher without routers."""
    table = read_sealed(run, COUNTS_FILE)
    return [] if table is None else from_counts_table(table)


def read_sealed(run: RunFolder, name: str) -> pa.Table | None:
    """A table of metrics/ that the generate stage's manifest names, verified; None when it names none."""
    rollup, path = read_rollup(run.traces), run.metrics / name
    sha256 = rollup.files.get(str(path.relative_to(run.root))) if rollup else None
    return None if sha256 is None else read_table(path, sha256=sha256)


# --- adding up ---------------------------------------------------------------------------------------------------


def add_up(segment_counts: Iterable[Sequence[TaskCounts]]) -> list[TaskCounts]:
    """Each task's counts in two parts: segments whose middle lies in the first half of the task's tokens, and the others.
    In the order of task and part; a part without tokens is left out."""
    groups: dict[str, list[TaskCounts]] = {}
    for one in itertools.chain.from_iterable(segment_counts):
        groups.setdefault(one.task, []).append(one)
    return [half for task in sorted(groups) for half in _halves(groups[task])]


def _halves(records: Sequence[TaskCounts]) -> Iterator[TaskCounts]:
    tokens = np.array([one.tokens for one in records])
    parts = (2 * (tokens.cumsum() - tokens / 2) > tokens.sum()).astype(int)
    for part in (0, 1):
        members = [one for one, its_part in zip(records, parts, strict=True) if its_part == part]
        if members:
            counts_LE = np.sum([one.counts_LE for one in members], axis=0)
            yield TaskCounts(records[0].task, sum(one.tokens for one in members), counts_LE, part)


def whole_run(found: Iterable[TaskCounts]) -> np.ndarray:
    """[L, E] over all tasks and parts."""
    return np.sum([one.counts_LE for one in found], axis=0)
