"""The report's plots as inline SVG that follows the page's light or dark colours.

Matplotlib draws with sentinel colours, which are then exchanged for CSS variables; a PNG (data/stats_plots.py) is drawn with
the page's light ones. Nothing in the result is fetched from anywhere, and equal data give equal bytes.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

NUMBERED_TASKS = 10  # more, and the numbers run into each other
INK, MUTED, GRID = "#010203", "#010204", "#010205"
SERIES = ("#010210", "#010211", "#010212", "#010213", "#010214", "#010215")
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {color: f"--series-{index}" for index, color in enumerate(SERIES)}
LIGHT = {INK: "#16202b", MUTED: "#5d6b7a", GRID: "#dde3ea"} | dict(
    zip(SERIES, ("#0b8f6c", "#6a4fc4", "#d98a1f", "#3d7fc1", "#c63d4f", "#98a3b0"), strict=True)
)
"""report.html.j2's."""
STYLE = {
    "svg.fonttype": "none",  # text stays text: sharp, selectable, in the page's font
    "text.parse_math": False,  # a task may be called `a$b$`
    "font.size": 9.0,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


def training_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, ylabel: str) -> str:
    """Lines over the optimizer step. curves: name -> (steps, values); a line of few points gets markers."""
    with styled(ylabel):
        figure, axes = new_figure(6.4, 2.7)
        for index, (name, (steps, values)) in enumerate(curves.items()):
            marker = "o" if len(steps) <= 30 else None
            axes.plot(steps, values, color=SERIES[index % len(SERIES)], label=name, linewidth=1.6, marker=marker, markersize=3.5)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(ylabel)
        axes.set_ylim(bottom=0)
        axes.legend()
        return svg(figure, f"{ylabel} over training")


def length_histogram(lengths: Mapping[str, Sequence[int]], *, bins: int = 40) -> str:
    """Stacked histogram of output tokens, one colour a task (more than six tasks: the smaller ones together)."""
    with styled("lengths"):
        figure, axes = new_figure(6.4, 2.7)
        groups = _largest(lengths, len(SERIES))
        pooled = [value for values in groups.values() for value in values]
        width = max(
            1, math.ceil((max(pooled) + 1 - min(pooled)) / bins)
        )  # whole tokens: bins of 1 and 2 would alternate in height
        edges = [edge - 0.5 for edge in range(min(pooled), max(pooled) + 1 + width, width)]
        colors = list(SERIES[: len(groups)])
        axes.hist(list(groups.values()), bins=edges, stacked=True, color=colors, label=list(groups), rwidth=0.92)
        axes.set_xlabel("output tokens, reasoning included")
        axes.set_ylabel("traces")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        figure.legend(loc="outside upper left", ncols=3)
        return svg(figure, "trace lengths by task")


def _largest(lengths: Mapping[str, Sequence[int]], keep: int) -> dict[str, list[int]]:
    ranked = sorted(lengths, key=lambda task: (-len(lengths[task]), task))
    if len(ranked) <= keep:
        return {task: list(lengths[task]) for task in ranked}
    rest = [value for task in ranked[keep - 1 :] for value in lengths[task]]
    return {task: list(lengths[task]) for task in ranked[: keep - 1]} | {f"{len(ranked) - keep + 1} other tasks": rest}


class Point(NamedTuple):
    """A share in [0, 1] at a depth in [0, 1], with its interval."""

    depth: float
    share: float
    low: float
    high: float


def accuracy_by_depth(curves: Mapping[str, Sequence[Point]]) -> str:
    """The share of right answers over where in the prompt they stood, a line a task, with 95 % intervals as whiskers; of more
    than six tasks the first six."""
    with styled("depth"):
        figure, axes = new_figure(6.4, 2.7)
        for index, (task, points) in enumerate(list(curves.items())[: len(SERIES)]):
            depths = [point.depth + 0.006 * index for point in points]  # or whiskers of two tasks lie on one another
            shares = [point.share for point in points]
            # never negative: rounding puts the end of an interval of 0 or 1 beside it
            whiskers = [[max(0.0, p.share - p.low) for p in points], [max(0.0, p.high - p.share) for p in points]]
            axes.errorbar(
                depths, shares, yerr=whiskers, color=SERIES[index], label=task, linewidth=1.6, elinewidth=0.9, marker="o",
                markersize=3.5, capsize=2.0,
            )  # fmt: skip
        axes.set_xlabel("depth in the prompt, 0 is its start")
        axes.set_ylabel("right answers")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figure.legend(loc="outside upper left", ncols=2)
        return svg(figure, "accuracy by depth")


def expert_heat_map(load_LE: Sequence[Sequence[float]]) -> str:
    """Load of each expert (column) in each sparse layer (row), as a multiple of its layer's mean; 1 everywhere is even."""
    values = np.asarray(load_LE, dtype=float)
    with styled("experts"):
        figure, axes = new_figure(8.4, min(4.5, 1.0 + 0.28 * len(values)))
        # interpolation none embeds one pixel a cell: 78 layers x 256 experts stay 20 KB, where one path a cell took 3 MB
        image = axes.imshow(
            values, aspect="auto", cmap="viridis", vmin=0.0, vmax=max(2.0, float(values.max())), interpolation="none"
        )
        axes.grid(visible=False)
        axes.set_xlabel("routed expert")
        axes.set_ylabel("sparse layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("x mean load", color=MUTED)
        bar.outline.set_visible(False)  # type: ignore[operator]
        return svg(figure, "expert load by layer")


def divergence_matrix(names: Sequence[str], divergence_TT: Sequence[Sequence[float]]) -> str:
    """How differently each two tasks use the experts, in nats: 0 is the same load, ln 2 is experts of their own."""
    values, size = np.asarray(divergence_TT, dtype=float), len(names)
    with styled("divergence"):
        figure, axes = new_figure(8.4, 1.4 + 0.26 * size)
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, interpolation="none")
        axes.grid(visible=False)
        axes.set_xticks(range(size), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), names)
        if size <= NUMBERED_TASKS:
            for row, column in np.ndindex(size, size):
                shade = "white" if values[row, column] < 0.6 * values.max() else "black"
                axes.text(column, row, f"{values[row, column]:.3f}", ha="center", va="center", color=shade, fontsize=8.0)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("nats", color=MUTED)
        bar.outline.set_visible(False)  # type: ignore[operator]
        return svg(figure, "divergence of expert load between tasks")


def styled(name: str) -> AbstractContextManager[None]:
    """Matplotlib's settings for one drawing. Ids inside the SVG derive from `name`: the same in every run, and no drawing's
    clip paths are another's."""
    return matplotlib.rc_context(STYLE | {"svg.hashsalt": name})  # type: ignore[arg-type]


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def svg(figure: Figure, label: str) -> str:
    """The drawing as one <svg> element for an HTML page: no prolog, no metadata, no namespace, colours as variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', rf'<svg role="img" aria-label="{label}" \1', text, count=1)
    text = re.sub(
        r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', rf'<svg role="img" aria-label="{label}" \1\2', text, count=1
    )
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
