"""A run folder as the stages leave it, made without a model: enough for the report, and fast."""

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from configs.schema import Recipe
from data.curriculum import ABSTENTION, known_places, unknown_places
from data.expert_counts import COUNTS_FILE, TaskCounts, counts_table
from data.expert_figures import LOAD_FILE, layer_loads, load_table
from data.prompt_set import write_prompts
from data.records import FinishReason, Message, Prompt, Trace, Turn, prompt_identity
from data.schema import to_table
from data.select import VIEW
from data.store import RunFolder, commit_segment, seal, table_bytes, write_bytes
from student.evaluate import Harness
from student.gates import GateRow
from student.grades import Grade, GradedItem
from student.results import ItemResult, write_gates, write_results
from student.scoring import measure

EVIL = "<script>alert('trace')</script>"
TASKS = ("chain_sum", "letter_counting", "spell_backward")
# Chance of a right answer on reasoning items and known facts, and of making something up about an unknown one.
SKILL = {"teacher": (0.95, 0.04), "base": (0.06, 0.97), "student": (0.88, 0.09)}


def make_prompts(rng: random.Random, scale: int) -> list[Prompt]:
    prompts = []
    for number in range(20 * scale):
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        question = f"State the final answer to the following arithmetic problem: {a} + {b} ="
        prompts.append(_prompt(TASKS[number % 3], question, str(a + b), None, "eval" if number % 4 == 0 else "train"))
    for place in known_places()[: 5 * scale]:
        prompts.append(
            _prompt(f"facts/{place.domain.name}", place.domain.phrasings[-1].format(place.name), str(place.answer), True, "eval")
        )
    for place, _ in zip(unknown_places("eval"), range(5 * scale), strict=False):
        prompts.append(
            _prompt(f"facts/{place.domain.name}", place.domain.phrasings[-1].format(place.name), ABSTENTION, False, "eval")
        )
    return prompts


def _prompt(task: str, question: str, answer: str, known: bool | None, split: str) -> Prompt:
    messages = ({"role": "user", "content": question},)
    identity = prompt_identity(messages, "v")  # type: ignore[arg-type]
    return Prompt(identity, "made up", task, "v", messages, answer, "exact", split, known, "", "MIT")  # type: ignore[arg-type]


def make_traces(prompts: list[Prompt], rng: random.Random) -> list[Trace]:
    traces = []
    for prompt in (prompt for prompt in prompts if prompt.split == "train"):
        for sample in range(2):
            tokens = int(rng.gauss({"chain_sum": 62, "letter_counting": 48}.get(prompt.task, 40), 7))
            finish: FinishReason = "length" if rng.random() < 0.03 else "stop"
            reasoning = EVIL if not traces else "6+3+0=09, 2+5+0=07, 1+1+0=02. " + prompt.answer
            traces.append(_trace(prompt, sample, reasoning, tokens, finish))
    return traces


def _trace(prompt: Prompt, sample: int, reasoning: str, tokens: int, finish: FinishReason) -> Trace:
    said: Message = {"role": "assistant", "content": prompt.answer, "reasoning_content": reasoning}
    return Trace(
        trace_id=f"{prompt.prompt_id}-{sample}",
        prompt_id=prompt.prompt_id,
        sample_index=sample,
        source=prompt.source,
        task=prompt.task,
        prompt_version="v",
        model_id="embedded",
        model_revision="r",
        teacher_fingerprint="f",
        engine="local",
        engine_version="1",
        turns=(Turn("user", (1, 2), "given"), Turn("assistant", (3, 4), "generated", (-0.1, -0.2))),
        messages=(*prompt.messages, said),
        tools="",
        raw_text="",
        finish_reason=finish,
        prompt_tokens=50,
        reasoning_tokens=tokens,
        answer_tokens=4,
        temperature=0.8,
        top_p=0.95,
        max_tokens=128,
        seed=1,
        expert_load="",
        attempt=1,
        worker="w",
        started_at=0.0,
        seconds=1.0,
        cost=0.0,
        teacher_licence="MIT",
        source_licence="MIT",
    )


def make_run(root: Path, *, scale: int = 1, evaluated: bool = True, expert_alarms: Sequence[str] = ()) -> RunFolder:
    """A finished run; scale 20 has about the embedded run's numbers. evaluated=False stops after the dataset."""
    rng, run = random.Random(0), RunFolder(root)
    write_bytes(
        run.config, yaml.safe_dump({"fingerprint": "x", "recipe": Recipe(name="made-up").model_dump(mode="json")}).encode()
    )
    prompts = make_prompts(rng, scale)
    traces = make_traces(prompts, rng)
    _seal(run, run.prompts, "prompts", [write_prompts(run, prompts)], {"requests": len(traces) + 3}, 2.5)
    for start in range(0, len(traces), 256):
        _commit(run, traces[start : start + 256])
    files = [*run.traces.glob("*.arrow"), *run.traces.glob("*.json"), *_write_routing(run, rng)]
    _seal(run, run.traces, "generate", files, {"expert_alarms": list(expert_alarms)}, 210.0)
    _write_view(run, traces)
    if evaluated:
        _write_training(run, rng)
        evaluate(run, [prompt for prompt in prompts if prompt.split == "eval"], rng)
    return run


def _seal(run: RunFolder, folder: Path, stage: str, files: list[Path], counts: dict[str, object], seconds: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    seal(run, folder, stage=stage, fingerprint="fp", inputs={}, files=files, counts=counts, seconds=seconds)


def _commit(run: RunFolder, traces: list[Trace]) -> None:
    facts = {
        "trace_ids": [trace.trace_id for trace in traces],
        "finish_reasons": [trace.finish_reason for trace in traces],
        "tasks": [trace.task for trace in traces],
        "output_tokens": [trace.reasoning_tokens + trace.answer_tokens for trace in traces],
    }
    commit_segment(run.traces, to_table(traces, Trace), worker="made-up-r0", facts=facts)


def _write_routing(run: RunFolder, rng: random.Random) -> list[Path]:
    """Two halves of each task, with the task's own preferences: 4 layers of 16 experts, 2 a token."""
    found = []
    for task in TASKS:
        liking_LE = np.array([[rng.lognormvariate(6, 0.5) for _ in range(16)] for _ in range(4)])
        for part in (0, 1):
            counts_LE = np.array([[int(mean * rng.uniform(0.95, 1.05)) for mean in row] for row in liking_LE])
            found.append(TaskCounts(task, int(counts_LE[0].sum()) // 2, counts_LE, part))
    tables = {COUNTS_FILE: counts_table(found), LOAD_FILE: load_table(layer_loads(found, expert_parallel=2))}
    for name, table in tables.items():
        write_bytes(run.metrics / name, table_bytes(table))
    return [run.metrics / name for name in tables]


def _write_view(run: RunFolder, traces: list[Trace]) -> None:
    fates = [("rejected", "length", "finish_reason") if trace.finish_reason == "length" else ("kept", "", "") for trace in traces]
    rows = [
        {"trace_id": trace.trace_id, "fate": fate, "reason": reason, "judgement": by}
        for trace, (fate, reason, by) in zip(traces, fates, strict=True)
    ]
    view = run.verdicts / "view.arrow"
    write_bytes(view, table_bytes(pa.Table.from_pylist(rows, schema=VIEW)))
    kept = sum(fate == "kept" for fate, _, _ in fates)
    rejected = {"length": len(traces) - kept} if kept < len(traces) else {}
    counts: dict[str, object] = {
        "kept": kept,
        "rejected_by_reason": rejected,
        "unjudged_by_reason": {},
        "train_rows": kept,
        "validation_rows": 0,
    }
    _seal(run, run.dataset, "data", [view], counts, 4.0)


def _write_training(run: RunFolder, rng: random.Random) -> None:
    lines = []
    for step in range(1, 301):
        row = {
            "step": step,
            "loss/nats_per_token": 1.1 * math.exp(-step / 60) + 0.06 + 0.02 * rng.random(),
            "optim/lr": 3e-3 * (1 - step / 300),
        }
        row["perf/tokens_per_s"] = 9000 + 500 * rng.random()
        if step % 50 == 0:
            row["validation/nats_per_token"] = 1.1 * math.exp(-step / 60) + 0.08
        lines.append(json.dumps(row) + "\n")
    write_bytes(run.metrics / "train.jsonl", ("".join(lines) + '{"step": 301, "loss/na').encode())  # as a kill cuts it
    _seal(run, run.checkpoints, "train", [], {}, 230.0)


def evaluate(run: RunFolder, items: list[Prompt], rng: random.Random) -> None:
    harness = Harness("weights", "local", "1", "0" * 64, ("<|im_end|>",), False, 0.0, 1.0, 128, 0)
    for name, (right, invents) in SKILL.items():
        results = [_result(item, rng, right, invents) for item in items]
        graded = [
            GradedItem(row.task, row.known, Grade(row.grade), row.reasoning_tokens, row.output_tokens, row.finish_reason)
            for row in results
        ]
        write_results(run, name, results, measure(graded), dataclasses.asdict(harness) | {"key": harness.key})
    write_gates(
        run,
        [GateRow("accuracy_of_teacher", 0.93, 0.8, None, True), GateRow("hallucination_above_teacher", 0.05, None, 0.1, True)],
    )
    _seal(run, run.evaluation, "evaluate", [], {}, 150.0)


def _result(item: Prompt, rng: random.Random, right: float, invents: float) -> ItemResult:
    if item.known is False:
        grade, answer = (Grade.INCORRECT, "iron") if rng.random() < invents else (Grade.NOT_ATTEMPTED, ABSTENTION)
    else:
        grade, answer = (Grade.CORRECT, item.answer) if rng.random() < right else (Grade.INCORRECT, f"7{item.answer}")
    question, reasoning = str(item.messages[0].get("content")), EVIL if item.task == "chain_sum" else "4+3+0=07, 1+9+0=10."
    return ItemResult(
        item.prompt_id, 0, item.task, item.known, question, item.answer, reasoning, answer, "", grade.value,
        0.9, 30, 40, 46, "stop", None, False, "",
    )  # fmt: skip
