"""Accuracy by depth of an evaluated model, from its graded attempts, and as the cells of a table."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from data.depth import DepthFigures, Outcome, Share, depth_figures
from student.grades import Grade, GradedItem


class DepthRow(NamedTuple):
    """A line of a table: a cell a model, "" where that has no figure."""

    title: str
    cells: list[str]


def accuracy_by_depth(items: Iterable[GradedItem]) -> dict[str, DepthFigures] | None:
    """By task; None where no item has places. Ungraded attempts are counted apart, and in no share."""
    outcomes = [
        Outcome(one.task, one.depths, None if one.grade is Grade.UNGRADED else one.grade is Grade.CORRECT)
        for one in items
        if one.depths
    ]
    return depth_figures(outcomes) if outcomes else None


def depth_rows(models: Iterable[Mapping[str, DepthFigures] | None]) -> list[DepthRow]:
    """Ends, middle and the difference of the two for each task that a model has figures of; ungraded attempts where there
    are any."""
    figures = [one or {} for one in models]
    rows = []
    for task in sorted({task for one in figures for task in one}):
        found = [one.get(task) for one in figures]
        rows += [
            DepthRow(f"{task}, ends", ["" if one is None else share_text(one["ends"]) for one in found]),
            DepthRow(f"{task}, middle", ["" if one is None else share_text(one["middle"]) for one in found]),
            DepthRow(f"{task}, lost in the middle", ["" if one is None else lost_text(one) for one in found]),
            DepthRow(f"{task}, ungraded", [str(one["unjudged"]) if one and one["unjudged"] else "" for one in found]),
        ]
    return [row for row in rows if any(row.cells)]


def share_text(share: Share) -> str:
    """`93.8 % (71.7 to 98.9) of 16`; "" where nothing was judged."""
    if share["accuracy"] is None or share["interval"] is None:
        return ""
    low, high = share["interval"]
    return f"{100 * share['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of {share['traces']}"


def lost_text(figures: DepthFigures) -> str:
    """`+37.5 points (1.2 to 61.0)`: how much more often right at the ends."""
    lost, interval = figures["lost_in_the_middle"], figures["lost_in_the_middle_interval"]
    if lost is None or interval is None:
        return ""
    return f"{100 * lost:+.1f} points ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
