"""Gates: bounds on the student's figures, judged from figures alone. The caller decides what a refusal means."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from configs.errors import Refused
from configs.evaluation import Gate, MetricName
from student.scoring import Metrics

ROUNDING = 1e-9
"""Differences of rates are not exact: 0.3 - 0.2 is under 0.1, 0.4 - 0.3 over it. Far below one item in any suite."""


class GateRow(NamedTuple):
    """One gate's verdict. value is None when the figure could not be computed, and then the gate has not been passed."""

    metric: MetricName
    value: float | None
    min: float | None
    max: float | None
    passed: bool


def judge(gates: Mapping[MetricName, Gate], *, student: Metrics, teacher: Metrics | None = None) -> list[GateRow]:
    """One row a gate, in the recipe's order. `teacher` is needed by the metrics that compare with it."""
    rows = []
    for metric, gate in gates.items():
        value = metric_value(metric, student, teacher)
        rows.append(GateRow(metric, value, gate.min, gate.max, within(value, gate)))
    return rows


def within(value: float | None, gate: Gate) -> bool:
    """Bounds are inclusive. A missing figure is a failure: a gate that cannot be measured has not been passed."""
    if value is None or math.isnan(value):
        return False
    return (gate.min is None or value >= gate.min - ROUNDING) and (gate.max is None or value <= gate.max + ROUNDING)


def metric_value(metric: MetricName, student: Metrics, teacher: Metrics | None) -> float | None:
    """The gated figure: one of the student's own, or one set against the teacher's."""
    match metric:
        case "accuracy_of_teacher":
            if teacher is None or student.accuracy is None or not teacher.accuracy:
                return None
            return student.accuracy / teacher.accuracy
        case "hallucination_above_teacher":
            if teacher is None or student.hallucination_rate is None or teacher.hallucination_rate is None:
                return None
            return student.hallucination_rate - teacher.hallucination_rate
        case _:
            return getattr(student, metric)


def gate_table(rows: Sequence[GateRow]) -> str:
    """The verdicts as aligned text, one line a gate under a header."""
    lines = [("gate", "value", "bound", "")]
    lines += [(row.metric, shown(row.value), bound_text(row), "passed" if row.passed else "REFUSED") for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def bound_text(row: GateRow) -> str:
    """`0.6 to 1`, `>= 0.6` or `<= 0.3`."""
    if row.min is not None and row.max is not None:
        return f"{row.min:g} to {row.max:g}"
    return f">= {row.min:g}" if row.min is not None else f"<= {row.max:g}"


def require(rows: Sequence[GateRow]) -> None:
    """Raises Refused with one line naming every gate that was not passed, its value and its bound."""
    failed = [f"{row.metric} {shown(row.value)} (expected {bound_text(row)})" for row in rows if not row.passed]
    if failed:
        raise Refused(f"gates: {'; '.join(failed)}; the run is intact: train longer, change the view, or change evaluate.gates")
