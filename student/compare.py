"""Models side by side on the run's held-out items, under one harness: what a team reads instead of leaderboards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import UnusableInput
from configs.progress import Display
from data.stage import Context
from data.store import write_bytes, write_json
from student.card import cell, markdown_table
from student.depth import accuracy_by_depth, depth_rows
from student.gates import Evaluated
from student.paired import Paired, difference
from student.results import read_evaluated
from student.scoring import Metrics
from student.stages import OpenTarget, evaluate_models
from student.targets import target_spec

PAIRED = ("accuracy", "hallucination_rate")
PERCENT = (
    ("accuracy", "accuracy, answerable"), ("hallucination_rate", "hallucination rate, closed book"),
    ("abstention_rate", "abstention rate, closed book"), ("unknown_abstention_rate", "abstention on unknown facts"),
    ("over_refusal_rate", "over-refusal, known facts"), ("simpleqa_f", "SimpleQA F"), ("ece", "ECE of the confidence"),
    ("coverage_at_5_risk", "coverage at 5 % risk"), ("truncation_rate", "cut at the token limit"),
    ("twin_gap", "originals above twins"),
)  # fmt: skip
PLAIN = (
    ("omniscience_index", "omniscience index"), ("brier", "Brier score"), ("aurc", "AURC by confidence"),
    ("aurc_by_length", "AURC by length"), ("reasoning_tokens_per_correct", "reasoning tokens per correct answer"),
    ("cost_per_completed_task", "dollars per completed task"),
)  # fmt: skip


class Compared(NamedTuple):
    """text: the table as people read it. path: where it stands as Markdown, its figures beside it as JSON. values: those."""

    text: str
    path: Path
    values: dict[str, Any]


def compare_models(context: Context, names: Sequence[str], open_target: OpenTarget) -> Compared:
    """Every model has answered every item; comparison.md and comparison.json stand in evaluation/. All names are looked up before
    any model is loaded. Raises UnusableInput."""
    if len(names) < 2 or len(set(names)) < len(names):
        raise UnusableInput(f"evaluate --compare {' '.join(names)}: expected two models or more, each once")
    specs = {name: target_spec(context.recipe, context.run, name) for name in names}
    with Display("compare", "items", context.console) as display:
        evaluate_models(context, names, open_target, display.show)
    found = {name: read_evaluated(context.run, spec.file) for name, spec in specs.items()}
    evaluated = {name: one for name, one in found.items() if one is not None}
    first, *others = names
    seed = context.recipe.evaluate.seed
    paired = {
        name: [difference(evaluated[name].items, evaluated[first].items, metric, seed=seed) for metric in PAIRED]
        for name in others
    }
    values = {
        "models": {name: one.metrics.to_json() for name, one in evaluated.items()},
        "accuracy_by_depth": {name: accuracy_by_depth(one.items) for name, one in evaluated.items()},
        "against": first,
        "paired": {name: [one._asdict() for one in tests] for name, tests in paired.items()},
    }
    rows = comparison_rows(evaluated, paired)
    path = context.run.evaluation / "comparison.md"
    write_bytes(path, (markdown_table(rows[0], rows[1:]) + "\n").encode())
    write_json(path.with_suffix(".json"), values)
    return Compared(aligned(rows), path, values)


def comparison_rows(evaluated: Mapping[str, Evaluated], paired: Mapping[str, Sequence[Paired]]) -> list[list[str]]:
    """A column a model, a row a figure; those that nobody has are left out."""
    metrics = {name: one.metrics for name, one in evaluated.items()}
    rows = [["", *(cell(name) for name in metrics)]]

    def add(title: str, texts: Sequence[str]) -> None:
        if any(texts):
            rows.append([title, *(text or "-" for text in texts)])

    for metric, title in PERCENT:
        add(title, [figure_text(one, metric, 100.0, " %") for one in metrics.values()])
    for metric, title in PLAIN:
        add(title, [figure_text(one, metric, 1.0, "") for one in metrics.values()])
    for name in sorted({name for one in metrics.values() for name in one.slices}):
        slices = [one.slices.get(name) for one in metrics.values()]
        add(f"accuracy in {name}", ["" if one is None else figure_text(one, "accuracy", 100.0, " %") for one in slices])
    for row in depth_rows([accuracy_by_depth(one.items) for one in evaluated.values()]):
        add(cell(row.title), row.cells)
    add("output tokens", [f"{one.output_tokens:,}" for one in metrics.values()])
    add("items, attempts", [f"{one.num_items}, {one.num_attempts}" for one in metrics.values()])
    for index, metric in enumerate(PAIRED):
        texts = ["" if name not in paired else paired_text(paired[name][index]) for name in metrics]
        add(f"{metric.replace('_', ' ')} against {next(iter(metrics))}", texts)
    return rows


def figure_text(metrics: Metrics, metric: str, scale: float, unit: str) -> str:
    """`93.8 % (90.6 to 96.1)`; "" where it was not measured."""
    value, interval = getattr(metrics, metric), metrics.intervals.get(metric)
    if value is None:
        return ""
    digits = 1 if scale == 100.0 else 3 if abs(value) < 1 else 1
    ends = "" if interval is None else f" ({scale * interval.low:.{digits}f} to {scale * interval.high:.{digits}f})"
    return f"{scale * value:.{digits}f}{unit}{ends}"


def paired_text(found: Paired) -> str:
    """`+12.5 points (8.1 to 16.9), p 2e-08, exact McNemar`."""
    if found.value is None or found.interval is None or found.p is None:
        return ""
    low, high = found.interval
    return f"{100 * found.value:+.1f} points ({100 * low:.1f} to {100 * high:.1f}), p {found.p:.1g}, {found.test}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
