"""Accuracy by where in a long prompt the answer stood: is what lies in the middle lost?

The depth of a place is the share of the prompt's tokens before it, as measured when the prompt was built. Right and wrong are the
verifier's, whatever a filter said (a trace that was cut has no answer, and is wrong); what it did not judge is counted and stands
outside every share. A trace whose prompt has two facts needs both, so it counts in the bucket of each, and as `middle` when
either of them lies there. Intervals treat traces as independent, which samples of one prompt are not quite.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import pyarrow as pa

from data.calibration_metrics import wilson_interval
from data.columns import words_of
from data.prompt_set import prompt_file, verify_streaming
from data.store import Rollup, RunFolder, read_rollup, read_table, segments

NUM_BUCKETS = 10
MIDDLE = range(3, 7)
"""Buckets from depth 0.3 to 0.7. Of the 42 pairs of depths of the documents source 24 have a fact there, and 18 have none."""


class Share(TypedDict):
    """Right ones among judged traces. accuracy and the 95 % Wilson interval are null where there are none."""

    traces: int
    correct: int
    accuracy: float | None
    interval: tuple[float, float] | None


class DepthBucket(Share):
    """Traces with a place at a depth in [low, high)."""

    low: float
    high: float


class DepthFigures(TypedDict):
    """One task of `accuracy_by_depth` in `tracestill report --json`. by_depth: buckets that have traces. ends: no place in [0.3,
    0.7); middle: at least one. lost_in_the_middle: accuracy of ends less that of middle, null unless both were measured;
    its interval is Newcombe's, of 95 %."""

    traces: int
    unjudged: int
    by_depth: list[DepthBucket]
    ends: Share
    middle: Share
    lost_in_the_middle: float | None
    lost_in_the_middle_interval: tuple[float, float] | None


class Outcome(NamedTuple):
    """A trace of a prompt whose places are known. correct: None when nobody judged it."""

    task: str
    depths: tuple[float, ...]
    correct: bool | None


# --- figures -----------------------------------------------------------------------------------------------------


def depth_figures(outcomes: Iterable[Outcome]) -> dict[str, DepthFigures]:
    """By task, in name order."""
    by_task: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome.task, []).append(outcome)
    return {task: _figures_of(by_task[task]) for task in sorted(by_task)}


def _figures_of(outcomes: Sequence[Outcome]) -> DepthFigures:
    judged = [(frozenset(map(bucket_of, outcome.depths)), outcome.correct) for outcome in outcomes if outcome.correct is not None]
    in_bucket = [[correct for buckets, correct in judged if number in buckets] for number in range(NUM_BUCKETS)]
    ends = share_of([correct for buckets, correct in judged if not buckets.intersection(MIDDLE)])
    middle = share_of([correct for buckets, correct in judged if buckets.intersection(MIDDLE)])
    lost = difference(ends, middle)
    return DepthFigures(
        traces=len(judged),
        unjudged=len(outcomes) - len(judged),
        by_depth=[
            DepthBucket(low=number / NUM_BUCKETS, high=(number + 1) / NUM_BUCKETS, **share_of(verdicts))
            for number, verdicts in enumerate(in_bucket)
            if verdicts
        ],
        ends=ends,
        middle=middle,
        lost_in_the_middle=None if lost is None else lost[0],
        lost_in_the_middle_interval=None if lost is None else lost[1:],
    )


def bucket_of(depth: float) -> int:
    """Depths are recorded with four digits: rounded before it is cut, so that 0.7 is not 6.999... tenths."""
    return min(NUM_BUCKETS - 1, int(round(depth * NUM_BUCKETS, 6)))


def share_of(verdicts: Sequence[bool]) -> Share:
    if not verdicts:
        return Share(traces=0, correct=0, accuracy=None, interval=None)
    correct, total = sum(verdicts), len(verdicts)
    return Share(traces=total, correct=correct, accuracy=correct / total, interval=wilson_interval(correct, total))


def difference(first: Share, second: Share) -> tuple[float, float, float] | None:
    """first less second, with its 95 % interval from the two Wilson intervals. Source: Newcombe 1998, method 10."""
    if first["accuracy"] is None or second["accuracy"] is None or first["interval"] is None or second["interval"] is None:
        return None
    (p, (low, high)), (q, (under, over)) = (first["accuracy"], first["interval"]), (second["accuracy"], second["interval"])
    return p - q, p - q - math.hypot(p - low, over - q), p - q + math.hypot(high - p, q - under)


# --- reading -----------------------------------------------------------------------------------------------------


def accuracy_by_depth(run: RunFolder) -> dict[str, DepthFigures] | None:
    """The figures of a run folder; None before a dataset is built, and when no judged trace has places. Raises UnusableInput
    for a file that is not what was committed."""
    prompts, dataset = read_rollup(run.prompts), read_rollup(run.dataset)
    if prompts is None or dataset is None:
        return None
    places = read_places(run, prompts)
    verdicts = _read_verdicts(run, dataset) if places else {}
    outcomes = [
        Outcome(*places[prompt_id], verdicts[trace_id])
        for trace_id, prompt_id in (_answered(run, {task for task, _ in places.values()}) if verdicts else ())
        if prompt_id in places and trace_id in verdicts
    ]
    return depth_figures(outcomes) if outcomes else None


def read_places(run: RunFolder, rollup: Rollup) -> dict[str, tuple[str, tuple[float, ...]]]:
    """prompt_id -> task and depths of the places that the answer needs, for prompts that have some. Of the prompt file three
    columns are decompressed, not the long texts."""
    path = prompt_file(run)
    verify_streaming(path, rollup.files.get(str(path.relative_to(run.root)), ""))
    found = {}
    for batch in _columns(path, "prompt_id", "task", "evidence"):
        for prompt_id, task, evidence in zip(*(batch[name].to_pylist() for name in batch.schema.names), strict=True):
            if evidence:
                found[prompt_id] = task, tuple(place["depth"] for place in json.loads(evidence)["places"])
    return found


def _read_verdicts(run: RunFolder, rollup: Rollup) -> dict[str, bool | None]:
    """trace_id -> right, wrong, or None where the verifier came to no verdict."""
    judged: dict[str, bool | None] = {"pass": True, "fail": False}
    found: dict[str, bool | None] = {}
    for name, sha256 in sorted(rollup.files.items()):
        if name.startswith("verdicts/verifier-"):
            table = read_table(run.root / name, sha256=sha256)
            words = zip(table["trace_id"].to_pylist(), table["verdict"].to_pylist(), strict=True)
            found |= {trace_id: judged.get(verdict) for trace_id, verdict in words}
    return found


def _answered(run: RunFolder, tasks: set[str]) -> Iterator[tuple[str, str]]:
    """(trace_id, prompt_id), each once, of the segments that hold traces of these tasks."""
    seen: set[str] = set()
    for segment in segments(run.traces):
        if "tasks" in segment.facts and tasks.isdisjoint(words_of(segment.facts["tasks"])):
            continue
        verify_streaming(segment.path, segment.sha256)
        for batch in _columns(segment.path, "trace_id", "prompt_id"):
            for pair in zip(batch["trace_id"].to_pylist(), batch["prompt_id"].to_pylist(), strict=True):
                if pair[0] not in seen:
                    seen.add(pair[0])
                    yield pair


def _columns(path: Path, *names: str) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow file with these columns alone; no other is decompressed."""
    with pa.OSFile(str(path), "rb") as source:
        schema = pa.ipc.open_file(source).schema
        wanted = [schema.get_field_index(name) for name in names]
        reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False))
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
