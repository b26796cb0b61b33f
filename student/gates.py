"""Gates: bounds on the student's figures, and headroom: is there something to distil? Judged from graded items alone; the caller
decides what a refusal means."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from configs.errors import Refused, UnusableInput
from configs.evaluation import Gate, Gated, Headroom, read_gate
from student.grades import UNSEEN, Grade, GradedItem
from student.paired import Paired, difference, quotient
from student.resampling import Interval
from student.scoring import RATIOS, Metrics

MAX_UNGRADED = 0.05
"""Share of a slice's attempts that may be ungraded: with more, what was graded says too little for a gate."""
SIGNIFICANT = 0.05
ROUNDING = 1e-9
"""Differences of rates are not exact: 0.3 - 0.2 is under 0.1, 0.4 - 0.3 over it. Far below one item in any suite."""


class Evaluated(NamedTuple):
    """One model's figures and the attempts that they stand on."""

    metrics: Metrics
    items: Sequence[GradedItem]


class GateRow(NamedTuple):
    """One gate's verdict. value is None when the figure could not be computed, and then the gate has not been passed. low, high:
    its 95 % interval, which had to keep the bound where by_interval."""

    metric: str
    value: float | None
    min: float | None
    max: float | None
    passed: bool
    low: float | None = None
    high: float | None = None
    by_interval: bool = False


def judge(
    gates: Mapping[str, Gate],
    *,
    student: Evaluated,
    teacher: Evaluated | None = None,
    base: Evaluated | None = None,
    seed: int = 0,
) -> list[GateRow]:
    """One row a gate, in the recipe's order. `teacher` and `base` are needed by the gates that compare with them."""
    models = {"teacher": teacher, "base": base}
    rows = []
    for name, gate in gates.items():
        gated = read_gate(name)
        other = models[gated.reference] if gated.reference else None
        value, interval = gated_figure(gated, student, other, seed)
        low, high = interval or (None, None)
        passed = within(value, gate) and (
            not gate.interval or (interval is not None and all(within(end, gate) for end in interval))
        )
        rows.append(GateRow(name, value, gate.min, gate.max, passed, low, high, gate.interval))
    return rows


def check_slices(gates: Iterable[str], slices: Collection[str]) -> None:
    """Raises UnusableInput for a gate on a slice that no item is in: it could never be passed, and is most often a typo."""
    for name in gates:
        if (gated := read_gate(name)).slice and gated.slice not in slices:
            raise UnusableInput(
                f"evaluate.gates {name!r}: no evaluation item is in slice {gated.slice!r}; expected one of "
                f"{', '.join(sorted(slices)) or 'none, there are no slices'}"
            )


def within(value: float | None, gate: Gate) -> bool:
    """Bounds are inclusive. A missing figure is a failure: a gate that cannot be measured has not been passed."""
    if value is None or math.isnan(value):
        return False
    return (gate.min is None or value >= gate.min - ROUNDING) and (gate.max is None or value <= gate.max + ROUNDING)


def gated_figure(gated: Gated, student: Evaluated, other: Evaluated | None, seed: int) -> tuple[float | None, Interval | None]:
    """The figure that a gate is about, and its interval; a comparison's is paired, item by item."""
    metrics, items = of_slice(student, gated.slice)
    if metrics is None or is_ungraded(items, gated.metric):
        return None, None
    if not gated.relation:
        return getattr(metrics, gated.metric), metrics.intervals.get(gated.metric)
    if other is None:
        return None, None
    their_metrics, their_items = of_slice(other, gated.slice)
    if their_metrics is None or is_ungraded(their_items, gated.metric):
        return None, None
    if gated.metric in RATIOS:
        paired = (quotient if gated.relation == "of" else difference)(items, their_items, gated.metric, seed=seed)
        return paired.value, paired.interval
    mine, theirs = getattr(metrics, gated.metric), getattr(their_metrics, gated.metric)
    if mine is None or theirs is None or (gated.relation == "of" and theirs <= 0):
        return None, None
    return (mine / theirs if gated.relation == "of" else mine - theirs), None


def is_ungraded(items: Sequence[GradedItem], metric: str) -> bool:
    """Whether too few of the attempts that this figure speaks of were graded for it to be one."""
    if metric == "truncation_rate":
        return False
    twins = {name for item in items for name in (item.twin_of, item.twin_of and item.item) if name}
    meant = [item for item in items if is_meant(item, metric) and (metric != "twin_gap" or item.item in twins)]
    return sum(item.grade is Grade.UNGRADED for item in meant) > MAX_UNGRADED * len(meant)


def is_meant(item: GradedItem, metric: str) -> bool:
    """Whether the figure speaks of the attempt, graded or not."""
    match metric:
        case "hallucination_rate" | "abstention_rate" | "omniscience_index" | "simpleqa_f":
            return item.known is not None
        case "over_refusal_rate":
            return item.known is True
        case "unknown_abstention_rate":
            return item.known is False
        case _:
            return item.is_answerable


def of_slice(evaluated: Evaluated, name: str) -> tuple[Metrics | None, list[GradedItem]]:
    if not name:
        return evaluated.metrics, list(evaluated.items)
    return evaluated.metrics.slices.get(name), [item for item in evaluated.items if name in item.slices]


# --- headroom ----------------------------------------------------------------------------------------------------


def headroom_of(teacher: Sequence[GradedItem], base: Sequence[GradedItem], settings: Headroom, *, seed: int) -> Paired:
    """The teacher's figure less the base's, on attempts that both have graded: an answer of the base that nobody graded is no
    advantage of the teacher's. Not measured where those are too few."""
    lost = {(item.item, item.sample) for items in (teacher, base) for item in items if item.grade is Grade.UNGRADED}
    if any(is_ungraded(items, settings.metric) for items in (teacher, base)):
        return Paired(f"{settings.metric} ({len(lost)} attempts without a grade)", 0, None, None, None, "paired bootstrap")
    ours, theirs = ([item for item in items if (item.item, item.sample) not in lost] for items in (teacher, base))
    return difference(ours, theirs, settings.metric, seed=seed)


def headroom_refusal(settings: Headroom, found: Paired) -> Refused | None:
    """None when the teacher is better than the base by more than the setting demands and more than chance gives. found: the
    paired difference of the two in the setting's metric."""
    is_chance = found.p is None or found.p >= SIGNIFICANT  # two items that both fall one way leave no width to an interval
    if found.interval is not None and found.interval.low > settings.above and not is_chance:
        return None
    return Refused(
        f"headroom: {headroom_text(found)}; expected the lower end above {settings.above:g}, and p below {SIGNIFICANT:g}: the "
        "teacher is not measurably better than the base on these suites, so there is nothing to distil; choose harder suites, "
        "more items or another teacher, or set evaluate.headroom: null"
    )


def headroom_text(found: Paired) -> str:
    if found.value is None or found.interval is None:
        return f"{found.metric} of teacher and base was not measured on {found.num_items} items"
    low, high = found.interval
    chance = "" if found.p is None or found.p < SIGNIFICANT else f", p {found.p:.2g}"
    figures = f"{found.value:.4g} ({low:.4g} to {high:.4g}, {found.num_items} items{chance})"
    return f"{found.metric} of the teacher above the base's {figures}"


# --- words -------------------------------------------------------------------------------------------------------


def gate_table(rows: Sequence[GateRow]) -> str:
    """The verdicts as aligned text, one line a gate under a header."""
    lines = [("gate", "value", "bound", "")]
    lines += [(row.metric, shown_with_interval(row), bound_text(row), "passed" if row.passed else "REFUSED") for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def shown_with_interval(row: GateRow) -> str:
    """`0.28 (0.21 to 0.34)`."""
    return shown(row.value) if row.low is None or row.high is None else f"{shown(row.value)} ({row.low:.4g} to {row.high:.4g})"


def bound_text(row: GateRow) -> str:
    """`0.6 to 1`, `>= 0.6` or `<= 0.3`, and whether the whole interval must keep it."""
    whole = ", by its interval" if row.by_interval else ""
    if row.min is not None and row.max is not None:
        return f"{row.min:g} to {row.max:g}{whole}"
    return (f">= {row.min:g}" if row.min is not None else f"<= {row.max:g}") + whole


def unmeasured(student: Metrics | None) -> str | None:
    """What these suites cannot show of any student, as one line; None: both were asked for."""
    if student is None or (UNSEEN in student.slices and student.twin_gap is not None):
        return None
    missing = (
        []
        if UNSEEN in student.slices
        else ["no item of a family without training traces, so nobody knows what was lost elsewhere"]
    )
    missing += (
        [] if student.twin_gap is not None else ["no item asked again in other words, so nobody knows what hangs on the wording"]
    )
    return f"{'; '.join(missing)}: docs/evaluation.md, suites"


def require(rows: Sequence[GateRow]) -> None:
    """Raises Refused with one line naming every gate that was not passed, its value and its bound."""
    failed = [f"{row.metric} {shown_with_interval(row)} (expected {bound_text(row)})" for row in rows if not row.passed]
    if failed:
        raise Refused(f"gates: {'; '.join(failed)}; the run is intact: train longer, change the view, or change evaluate.gates")
