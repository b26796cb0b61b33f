"""Accuracy by depth (data/depth.py) of the teacher's traces of a run.

Right and wrong are the verifier's, whatever a filter said (a trace that was cut has no answer, and is wrong).
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from data.columns import words_of
from data.depth import DepthFigures, Outcome, depth_figures, places_of
from data.prompt_set import prompt_file, verify_streaming
from data.store import Rollup, RunFolder, read_rollup, read_table, segments


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
                found[prompt_id] = task, places_of(evidence).depths
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
