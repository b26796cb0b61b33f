"""The teacher's traces for the page: their lengths, and a few to read.

Bounded by design: figures over all traces come from sidecars, and text from one segment a worker.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from data.columns import words_of
from data.report_items import shortened
from data.store import RunFolder, read_rollup, read_segment, read_table, segments

TRACES_PER_TASK = 2


@dataclass(frozen=True, slots=True)
class SampleTrace:
    task: str
    question: str
    reasoning: str
    answer: str
    fate: str
    reason: str
    output_tokens: int


def trace_lengths(run: RunFolder) -> dict[str, list[int]]:
    """Output tokens of every trace by task, from the sidecars alone; empty before the first segment."""
    lengths: dict[str, list[int]] = {}
    for segment in segments(run.traces) if run.traces.is_dir() else ():
        for task, tokens in zip(words_of(segment.facts.get("tasks", [])), segment.facts.get("output_tokens", ()), strict=False):
            lengths.setdefault(task, []).append(tokens)
    return lengths


def length_facts(lengths: Mapping[str, Sequence[int]]) -> tuple[tuple[str, str], ...]:
    """Figures beside the histogram. A percentile is the smallest length with that share of traces at or under it."""
    tokens = sorted(value for values in lengths.values() for value in values)
    if not tokens:
        return ()
    median, high = (tokens[max(0, math.ceil(share * len(tokens)) - 1)] for share in (0.50, 0.95))
    return (
        ("traces", f"{len(tokens):,}"),
        ("output tokens", f"{sum(tokens):,}"),
        ("median, 95th percentile", f"{median:,} and {high:,} tokens"),
        ("longest", f"{tokens[-1]:,} tokens"),
    )


def sample_traces(run: RunFolder) -> tuple[SampleTrace, ...]:
    """The first TRACES_PER_TASK traces of each task, and the first rejected one of each reason met on the way."""
    fates = read_fates(run)
    taken: Counter[tuple[str, str]] = Counter()
    samples = []
    for row in _trace_rows(run):
        fate, reason = fates.get(row["trace_id"], ("", ""))
        group = ("kept", row["task"]) if fate in ("", "kept") else (fate, reason)
        if taken[group] < (TRACES_PER_TASK if group[0] == "kept" else 1):
            taken[group] += 1
            samples.append(_sample(row, fate, reason))
    return tuple(sorted(samples, key=lambda sample: (sample.fate not in ("", "kept"), sample.task)))


def _trace_rows(run: RunFolder) -> Iterator[dict]:
    """Rows of the first segment of each worker: workers share the tasks out, so together they have all of them."""
    columns = ["trace_id", "task", "messages", "finish_reason", "reasoning_tokens", "answer_tokens"]
    first: dict[str, Path] = {}
    for segment in segments(run.traces) if run.traces.is_dir() else ():
        worker = segment.path.stem.split("-", 1)[-1].rpartition("-")[0]
        if worker not in first:
            first[worker] = segment.path
            yield from read_segment(segment).select(columns).to_pylist()


def _sample(row: dict, fate: str, reason: str) -> SampleTrace:
    question = next((message["content"] for message in reversed(row["messages"]) if message["role"] == "user"), "")
    said = row["messages"][-1]
    tokens = row["reasoning_tokens"] + row["answer_tokens"]
    return SampleTrace(
        row["task"],
        shortened(question),
        shortened(said.get("reasoning_content")),
        shortened(said["content"]),
        fate,
        reason,
        tokens,
    )


def read_fates(run: RunFolder) -> dict[str, tuple[str, str]]:
    """trace_id -> (kept, rejected or unjudged; reason), verified by the data stage's manifest; empty before it."""
    rollup, path = read_rollup(run.dataset), run.verdicts / "view.arrow"
    sha256 = rollup.files.get(str(path.relative_to(run.root))) if rollup else None
    if sha256 is None or not path.is_file():
        return {}
    view: pa.Table = read_table(path, sha256=sha256)
    return {row["trace_id"]: (row["fate"], row["reason"]) for row in view.to_pylist()}
