"""Figures as people read them: a column a model, a row a figure, each with its 95 % interval. For the comparison and the card."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from student.scoring import Metrics

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


def figure_rows(metrics: Mapping[str, Metrics]) -> list[list[str]]:
    """A header, then a row a figure; those that no model has are left out. Accuracy and hallucination rate stand by slice too,
    as gates judge them; ends and middle by task, without the ungraded, are student/depth.py's."""
    rows = [["", *(cell(name) for name in metrics)]]

    def add(title: str, found: Sequence[Metrics | None], metric: str, scale: float, unit: str) -> None:
        texts = ["" if one is None else figure_text(one, metric, scale, unit) for one in found]
        if any(texts):
            rows.append([title, *(text or "-" for text in texts)])

    for metric, title in PERCENT:
        add(title, list(metrics.values()), metric, 100.0, " %")
    for metric, title in PLAIN:
        add(title, list(metrics.values()), metric, 1.0, "")
    for name in sorted({name for one in metrics.values() for name in one.slices}):
        slices = [one.slices.get(name) for one in metrics.values()]
        add(f"accuracy in {cell(name)}", slices, "accuracy", 100.0, " %")
        add(f"hallucination rate in {cell(name)}", slices, "hallucination_rate", 100.0, " %")
    if any(one.grades.get("ungraded") for one in metrics.values()):
        rows.append(["ungraded attempts", *(str(one.grades.get("ungraded", 0)) for one in metrics.values())])
    rows.append(["output tokens", *(f"{one.output_tokens:,}" for one in metrics.values())])
    rows.append(["items, attempts", *(f"{one.num_items}, {one.num_attempts}" for one in metrics.values())])
    return rows


def figure_text(metrics: Metrics, metric: str, scale: float, unit: str) -> str:
    """`93.8 % (90.6 to 96.1)`; "" where it was not measured."""
    value, interval = getattr(metrics, metric), metrics.intervals.get(metric)
    if value is None:
        return ""
    if metric == "cost_per_completed_task" and 0 < abs(value) < 1:  # most are thousandths of a dollar
        shown = f"{value:.3g}"
        return shown if interval is None else f"{shown} ({interval.low:.3g} to {interval.high:.3g})"
    digits = 1 if scale == 100.0 else 3 if abs(value) < 1 else 1
    ends = "" if interval is None else f" ({scale * interval.low:.{digits}f} to {scale * interval.high:.{digits}f})"
    return f"{scale * value:.{digits}f}{unit}{ends}"


def lm_eval_rows(suites: Mapping[str, Mapping[str, Any] | None]) -> list[list[str]]:
    """A header, then a row for each metric of each task of lm-eval's suites; none where no model has any. A task that stands in
    several suites is named with its suite's path. suites: by model, as student.results.read_lm_eval gives them."""
    of_models = {name: found["suites"] for name, found in suites.items() if found}
    counts = [Counter(task for suite in found for task in suite["tasks"]) for found in of_models.values()]
    several = {task for found in counts for task, n in found.items() if n > 1}
    cells: dict[tuple[int, str], dict[str, str]] = {}  # by the suite's place too: the same task may have another limit there
    for name, found in of_models.items():
        for place, suite in enumerate(found):
            for task, figures in suite["tasks"].items():
                label = f"{suite['path']}: {task}" if task in several else task
                for one in figures.get("metrics", ()):
                    title = f"{label}, {one['metric']}" + ("" if one["filter"] == "none" else f" ({one['filter']})")
                    cells.setdefault((place, title), {})[name] = lm_eval_text(one, figures["n"])
                if "unmeasured" in figures:
                    cells.setdefault((place, label), {})[name] = f"not measured: {figures['unmeasured']}"
    if not cells:
        return []
    rows = ([cell(title), *(row.get(name, "-") for name in suites)] for (_, title), row in cells.items())
    return [["lm-eval", *suites], *rows]


def lm_eval_text(one: Mapping[str, Any], n: int) -> str:
    """`0.667 (standard error 0.211) of 6`."""
    if one["value"] is None:
        return "-"
    return f"{one['value']:.3f}" + (f" (standard error {one['stderr']:.3f})" if one["stderr"] is not None else "") + f" of {n}"


# --- tables ------------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def cell(text: str) -> str:
    """Text that cannot break out of its table cell."""
    return " ".join(text.replace("|", "\\|").split())


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
