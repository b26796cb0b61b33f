"""What the page shows, read from a run folder into plain values; report.html.j2 only lays it out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from configs.errors import UnusableInput
from data import plots
from data.depth import DepthFigures
from data.report_dataset import DatasetPart, dataset_part
from data.report_experts import ExpertPart, expert_part
from data.report_items import COMPARED, Comparison, GradeBar, comparisons, failures, grade_bars, item_rows
from data.report_summary import ModelFigures, Summary, percent
from data.report_traces import SampleTrace, length_facts, sample_traces, trace_lengths
from data.report_training import training_facts, training_plot
from data.store import Rollup, RunFolder, read_json, read_rollup


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first thing on the page. tone: good, bad or open."""

    headline: str
    sentence: str
    tone: str


@dataclass(frozen=True, slots=True)
class GateLine:
    metric: str
    value: float | None
    bound: str
    passed: bool


@dataclass(frozen=True, slots=True)
class Measure:
    """One rate before and after, in [0, 1]. interval: the student's 95 % bootstrap interval."""

    title: str
    note: str
    base: float | None
    student: float | None
    teacher: float | None
    interval: tuple[float, float] | None


class HeldOutDepth(NamedTuple):
    """Accuracy by depth of every model on the evaluation items of one task."""

    name: str
    svg: str | None
    models: dict[str, DepthFigures]


@dataclass(frozen=True, slots=True)
class Page:
    """Everything on the page; a part whose stage has not run is None or empty."""

    name: str
    teacher_model: str
    student_model: str
    verdict: Verdict
    gates: tuple[GateLine, ...]
    measures: tuple[Measure, ...]
    figures: dict[str, ModelFigures]
    families: tuple[str, ...]
    known_bars: tuple[GradeBar, ...]
    unknown_bars: tuple[GradeBar, ...]
    num_items: int
    curves_svg: str | None
    train_facts: tuple[tuple[str, str], ...]
    lengths_svg: str | None
    length_facts: tuple[tuple[str, str], ...]
    experts: ExpertPart | None
    depth_svg: str | None
    held_out_depths: tuple[HeldOutDepth, ...]
    dataset: DatasetPart | None
    summary: Summary
    comparisons: tuple[Comparison, ...]
    failures: tuple[Comparison, ...]
    traces: tuple[SampleTrace, ...]
    provenance: tuple[tuple[str, str], ...]
    config: str


def read_page(run: RunFolder, summary: Summary) -> Page:
    recipe = read_recipe(run)
    found: dict[str, ModelFigures] = {name: figures for name in COMPARED if (figures := summary[name]) is not None}
    rows = {name: item_rows(run, name) for name in found}
    gates = read_gates(run)
    lengths = trace_lengths(run)
    return Page(
        name=str(recipe.get("name", run.root.name)),
        teacher_model=_section(recipe, "teacher").get("model", "teacher"),
        student_model=_section(recipe, "student").get("model", "student"),
        verdict=verdict_of(found, gates, gated=bool(_section(recipe, "evaluate").get("gates"))),
        gates=gates,
        measures=measures(run, found),
        figures=found,
        families=tuple(sorted({family for figures in found.values() for family in figures["by_family"]})),
        known_bars=grade_bars(rows, known=True),
        unknown_bars=grade_bars(rows, known=False),
        num_items=max((len(items) for items in rows.values()), default=0),
        curves_svg=training_plot(run),
        train_facts=training_facts(run),
        lengths_svg=plots.length_histogram(lengths) if lengths else None,
        length_facts=length_facts(lengths),
        experts=expert_part(run, summary["experts"]),
        depth_svg=depth_plot(summary["accuracy_by_depth"]),
        held_out_depths=held_out_depths(run, found),
        dataset=dataset_part(run),
        summary=summary,
        comparisons=comparisons(rows),
        failures=failures(rows),
        traces=sample_traces(run),
        provenance=provenance(run),
        config=run.config.read_text() if run.config.is_file() else "",
    )


def held_out_depths(run: RunFolder, models: Iterable[str]) -> tuple[HeldOutDepth, ...]:
    """By task; evaluations of earlier versions have no such figures."""
    tasks: dict[str, dict[str, DepthFigures]] = {}
    for model in models:
        for task, figures in (read_json(run.evaluation / f"{model}.json").get("accuracy_by_depth") or {}).items():
            tasks.setdefault(task, {})[model] = figures
    return tuple(HeldOutDepth(task, depth_plot(figures), figures) for task, figures in sorted(tasks.items()))


def depth_plot(figures: Mapping[str, DepthFigures] | None) -> str | None:
    """A line for each name; None where nothing was judged."""
    curves = {
        task: [
            plots.Point((bucket["low"] + bucket["high"]) / 2, bucket["accuracy"], *bucket["interval"])
            for bucket in found["by_depth"]
            if bucket["accuracy"] is not None and bucket["interval"] is not None
        ]
        for task, found in (figures or {}).items()
        if found["by_depth"]
    }
    return plots.accuracy_by_depth(curves) if curves else None


def read_recipe(run: RunFolder) -> dict[str, object]:
    """The recipe in config.yaml, as plain values; empty when there is none."""
    if not run.config.is_file():
        return {}
    return (yaml.safe_load(run.config.read_text()) or {}).get("recipe") or {}


def _section(recipe: Mapping[str, object], name: str) -> dict[str, str]:
    section = recipe.get(name)
    return section if isinstance(section, dict) else {}


# --- the verdict -------------------------------------------------------------------------------------------------


def verdict_of(found: Mapping[str, ModelFigures], gates: Sequence[GateLine], *, gated: bool) -> Verdict:
    """What the figures say, in one line and one sentence."""
    if not {"base", "student"} <= found.keys():
        return Verdict("Not evaluated yet", "No figures of base and student in this run folder; run: tracestill evaluate", "open")
    sentence = _sentence(found)
    if gates and all(gate.passed for gate in gates):
        return Verdict("The student learnt it", f"{sentence} Every gate passed.", "good")
    if gates:
        failed = ", ".join(gate.metric for gate in gates if not gate.passed)
        return Verdict("Refused by its gates", f"{sentence} Not passed: {failed}.", "bad")
    return Verdict("Ungated", f"{sentence} {'The gates have not been judged.' if gated else 'The recipe sets no gate.'}", "open")


def _sentence(found: Mapping[str, ModelFigures]) -> str:
    base, student, teacher = found["base"]["accuracy"], found["student"]["accuracy"], found.get("teacher", {}).get("accuracy")
    if base is None or student is None:
        return "No answerable item was evaluated."
    sentence = f"From {percent(base)} to {percent(student)} of the answerable held-out items right"
    if isinstance(teacher, float) and teacher > 0:
        sentence += f": {student / teacher:.0%} of what its teacher gets right"
    before, after = found["base"]["hallucination_rate"], found["student"]["hallucination_rate"]
    if before is not None and after is not None:
        sentence += f". Of the closed-book questions it does not get right, it makes up an answer to {percent(after)}"
        sentence += f"; its base, to {percent(before)}"
    return sentence + "."


def read_gates(run: RunFolder) -> tuple[GateLine, ...]:
    path = run.evaluation / "gates.json"
    if not path.is_file():
        return ()
    try:
        rows = read_json(path)["gates"]
        return tuple(GateLine(row["metric"], row["value"], _bound(row["min"], row["max"]), row["passed"]) for row in rows)
    except (KeyError, TypeError) as error:
        raise UnusableInput(f"{path}: damaged ({error} is missing); delete it and run: tracestill evaluate") from error


def _bound(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return f"at least {low:g}" if low is not None else f"at most {high:g}"


def measures(run: RunFolder, found: Mapping[str, ModelFigures]) -> tuple[Measure, ...]:
    if not found:
        return ()
    intervals = student_intervals(run)

    def measure(title: str, note: str, figure: str) -> Measure:
        values = {name: found[name].get(figure) if name in found else None for name in COMPARED}
        base, student, teacher = (value if isinstance(value, float) else None for value in values.values())
        return Measure(title, note, base, student, teacher, intervals.get(figure))

    return (
        measure("Accuracy", "answerable items; higher is better", "accuracy"),
        measure("Hallucination rate", "closed-book items; lower is better", "hallucination_rate"),
    )


def student_intervals(run: RunFolder) -> dict[str, tuple[float, float]]:
    path = run.evaluation / "student.json"
    if not path.is_file():
        return {}
    metrics = read_json(path)["metrics"]
    return {name: (float(low), float(high)) for name, (low, high) in metrics.get("intervals", {}).items()}


# --- where it comes from -----------------------------------------------------------------------------------------


def provenance(run: RunFolder) -> tuple[tuple[str, str], ...]:
    rollups = [found for folder in _stage_folders(run) if (found := read_rollup(folder)) is not None]
    lines = [(f"{rollup.stage} manifest", _manifest_line(rollup)) for rollup in rollups]
    if rollups:
        lines.append(("versions", ", ".join(f"{name} {version}" for name, version in rollups[-1].versions.items())))
    path = run.evaluation / "student.json"
    if path.is_file():
        harness = read_json(path)["harness"]
        lines.append(
            ("evaluation harness", ", ".join(f"{key} {value}" for key, value in harness.items() if not isinstance(value, list)))
        )
    return tuple(lines)


def _stage_folders(run: RunFolder) -> tuple[Path, ...]:
    return (run.prompts, run.headroom, run.traces, run.dataset, run.checkpoints, run.evaluation, run.export)


def _manifest_line(rollup: Rollup) -> str:
    size = sum(rollup.sizes.values())
    return f"fingerprint {rollup.fingerprint}, {len(rollup.files)} files, {size:,} bytes, code {rollup.code_revision[:12]}"
