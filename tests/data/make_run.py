"""Small run folders written through the real store: prompts, committed trace segments, and the stage sealed by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.schema import Data
from data.build import Built, build
from data.checksum import checked_json
from data.prompt_set import write_prompts
from data.records import FinishReason, Message, Prompt, Split, Trace, Turn, prompt_identity, trace_identity
from data.schema import to_table
from data.store import Rollup, RunFolder, commit_segment, seal


def make_prompt(
    question: str, answer: str = "4", *, verifier: str = "exact", split: Split = "train", task: str = "sums", details: str = ""
) -> Prompt:
    messages: tuple[Message, ...] = ({"role": "user", "content": question},)
    return Prompt(
        prompt_identity(messages, "v1"), "test", task, "v1", messages, answer, verifier, split, None, details, "CC0-1.0"
    )  # fmt: skip


def make_trace(
    prompt: Prompt,
    answer: str = "4",
    *,
    sample: int = 0,
    reasoning: str = "2+2=4.",
    finish: FinishReason = "stop",
    raw: str | None = None,
) -> Trace:
    """A trace of a teacher whose prompt opens the think block, with token counts 7 / 5 / 2."""
    raw_text = f"{reasoning}</think>{answer}" if raw is None else raw
    said: Message = {"role": "assistant", "content": answer, "reasoning_content": reasoning}
    return Trace(
        trace_id=trace_identity(prompt.prompt_id, sample, "teacher", "sampling"),
        prompt_id=prompt.prompt_id,
        sample_index=sample,
        source=prompt.source,
        task=prompt.task,
        prompt_version=prompt.prompt_version,
        model_id="tiny",
        model_revision="r",
        teacher_fingerprint="teacher",
        engine="local",
        engine_version="1",
        turns=(Turn("user", (1, 2, 3), "given"), Turn("assistant", (4, 5), "generated", (-0.5, -0.25))),
        messages=(*prompt.messages, said),
        tools="",
        raw_text=raw_text,
        finish_reason=finish,
        prompt_tokens=7,
        reasoning_tokens=5,
        answer_tokens=2,
        temperature=0.8,
        top_p=0.95,
        max_tokens=64,
        seed=2**62 + 1,
        expert_load="",
        attempt=1,
        worker="w",
        started_at=1.0,
        seconds=0.5,
        cost=0.0,
        teacher_licence="MIT",
        source_licence=prompt.licence,
    )


def commit_traces(run: RunFolder, traces: Sequence[Trace], worker: str = "w0") -> Path:
    facts: Mapping[str, object] = {
        "trace_ids": [trace.trace_id for trace in traces],
        "finish_reasons": [trace.finish_reason for trace in traces],
    }
    return commit_segment(run.traces, to_table(traces, Trace), worker=worker, facts=facts).path


def seal_prompts(run: RunFolder, prompts: Sequence[Prompt], requests: int) -> Rollup:
    path = write_prompts(run, list(prompts))
    return seal(
        run, run.prompts, stage="prompts", fingerprint="f", inputs={}, files=[path], counts={"requests": requests}, seconds=0.0
    )


def make_run(
    root: Path, prompts: Sequence[Prompt], segments: Sequence[Sequence[Trace]], *, requests: int | None = None
) -> RunFolder:
    """requests: what the ledger should believe was asked for; the number of different traces when None."""
    run = RunFolder(root)
    different = {trace.trace_id for traces in segments for trace in traces}
    seal_prompts(run, prompts, len(different) if requests is None else requests)
    for traces in segments:
        commit_traces(run, traces)
    return run


def build_and_seal(run: RunFolder, settings: Data | None = None) -> Built:
    built = build(settings or Data(), run)
    seal(run, run.dataset, stage="data", fingerprint="f", inputs={}, files=built.files, counts=dict(built.counts), seconds=0.0)
    return built


def rewrite(manifest: Path, **changes: object) -> None:
    """The manifest says something else, and its checksum holds: a lie and not damage. None removes a key."""
    said = json.loads(manifest.read_bytes()) | changes
    said.pop("checksum")
    manifest.write_bytes(checked_json({key: value for key, value in said.items() if value is not None}))


def snapshot(run: RunFolder) -> dict[str, bytes]:
    """Every file that the data stage makes, by its path in the run folder."""
    files = [path for folder in (run.verdicts, run.dataset) for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(run.root)): path.read_bytes() for path in sorted(files)}
