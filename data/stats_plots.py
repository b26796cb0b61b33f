"""`tracestill data stats --plots`: what became of the traces, drawn; the report shows the same pictures.

A drawing is given colours and draws; whether it becomes an SVG of the page or a PNG is decided by who asks.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from data import plots
from data.calibration_metrics import Bin
from data.stats import Histogram, Stats
from data.verdict_files import WIDE_SPREAD_RATIO
from data.viewer import printable

MOST_TASKS = 12
"""Bars; smaller tasks are one bar together."""
LONGEST_NAME = 28
PNG_DPI = 160
FATES = ("kept", "rejected", "unjudged")
Colours = Sequence[str]


class Plot(NamedTuple):
    """name: of its file. label: what it shows. height: inches, at a width of 6.4."""

    name: str
    label: str
    height: float
    draw: Callable[[Figure, Axes, Colours], None]


def stats_plots(found: Stats) -> Iterator[Plot]:
    """Those for which there is something to draw."""
    bars = fate_bars(found)
    yield Plot(
        "fates", "fates by task", 1.2 + 0.26 * len(bars), lambda figure, axes, colours: _fates(figure, axes, colours, bars)
    )
    yield Plot("lengths", "generated tokens", 2.7, lambda figure, axes, colours: _lengths(figure, axes, colours, found.generated))
    if sum(found.efficiency.counts["right"]):
        spread = found.efficiency
        yield Plot(
            "efficiency", "tokens over the shortest right trace", 2.7, lambda _, axes, colours: _efficiency(axes, colours, spread)
        )
    if found.view.report is not None:
        bins = found.view.report.reliability
        yield Plot("reliability", "reliability of p(correct)", 3.4, lambda _, axes, colours: _reliability(axes, colours, bins))


def as_svg(plot: Plot) -> str:
    """For the page, in its colours."""
    with plots.styled(f"stats {plot.name}"):
        figure, axes = plots.new_figure(6.4, plot.height)
        plot.draw(figure, axes, plots.SERIES)
        return plots.svg(figure, plot.label)


def write_plots(found: Stats, folder: Path) -> list[Path]:
    """A PNG each; their paths. Equal figures give equal pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_png(plot, folder / f"{plot.name}.png") for plot in stats_plots(found)]


def _write_png(plot: Plot, path: Path) -> Path:
    style = {name: plots.LIGHT.get(value, value) if isinstance(value, str) else value for name, value in plots.STYLE.items()}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure, axes = plots.new_figure(6.4, plot.height)
        plot.draw(figure, axes, [plots.LIGHT[colour] for colour in plots.SERIES])
        figure.suptitle(plot.label)
        figure.savefig(path, dpi=PNG_DPI, metadata={"Software": None})
    return path


# --- fates -------------------------------------------------------------------------------------------------------


class FateBar(NamedTuple):
    """counts: in the order of FATES."""

    task: str
    counts: tuple[int, int, int]


def fate_bars(found: Stats) -> list[FateBar]:
    """Largest tasks first; of more than MOST_TASKS the smaller ones together, last."""
    ranked = sorted(found.tasks.items(), key=lambda item: (-item[1]["completed"], item[0]))
    bars = [FateBar(task, (its["kept"], its["rejected"], its["unjudged"])) for task, its in ranked]
    if len(bars) <= MOST_TASKS:
        return bars
    shown, rest = bars[: MOST_TASKS - 1], bars[MOST_TASKS - 1 :]
    kept, rejected, unjudged = (sum(bar.counts[fate] for bar in rest) for fate in range(len(FATES)))
    return [*shown, FateBar(f"{len(rest)} other tasks", (kept, rejected, unjudged))]


def _fates(figure: Figure, axes: Axes, colours: Colours, bars: Sequence[FateBar]) -> None:
    left = [0] * len(bars)
    names = range(len(bars))
    for fate, colour in zip(range(len(FATES)), (colours[0], colours[2], colours[5]), strict=True):
        widths = [bar.counts[fate] for bar in bars]
        if any(widths):
            axes.barh(names, widths, left=left, color=colour, label=FATES[fate], height=0.7)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set_yticks(names, [_short(bar.task) for bar in bars])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("traces")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.legend(loc="outside upper left", ncols=3)


def _short(name: str) -> str:
    """Its end: the beginning is what tasks of a family share."""
    name = printable(name)
    return name if len(name) <= LONGEST_NAME else "..." + name[3 - LONGEST_NAME :]


# --- lengths and efficiency --------------------------------------------------------------------------------------


def _lengths(figure: Figure, axes: Axes, colours: Colours, found: Histogram) -> None:
    edges, below = found.edges, [0] * (len(found.edges) - 1)
    widths = [high - low for low, high in itertools.pairwise(edges)]
    for (name, counts), colour in zip(found.counts.items(), (colours[0], colours[2]), strict=True):
        axes.bar(edges[:-1], counts, widths, bottom=below, align="edge", color=colour, label=name)
        below = [before + count for before, count in zip(below, counts, strict=True)]
    if max(widths) > min(widths):
        axes.set_xscale("log")
    axes.set_xlabel("generated tokens, reasoning included")
    _count_traces(axes)
    figure.legend(loc="outside upper left", ncols=2)


def _efficiency(axes: Axes, colours: Colours, found: Histogram) -> None:
    """Up to the last bin that holds something, the red flag's ratio at least."""
    edges, counts = found.edges, found.counts["right"]
    widths = [high - low for low, high in itertools.pairwise(edges)]
    axes.bar(edges[:-1], counts, widths, align="edge", color=colours[0])
    axes.axvline(WIDE_SPREAD_RATIO, color=colours[4], linewidth=1.2, linestyle="--")
    last = max(number for number, count in enumerate(counts) if count)
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=1)  # one trace of 64 times is what this is about
    axes.set_xlim(1.0, max(edges[last + 1], 1.3 * WIDE_SPREAD_RATIO))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
    axes.set_xlabel("tokens over those of the prompt's shortest right trace; dashed: the red flag")
    _count_traces(axes, whole=False)
    axes.set_ylabel("right traces")


def _count_traces(axes: Axes, *, whole: bool = True) -> None:
    axes.set_ylabel("traces")
    if whole:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


# --- reliability -------------------------------------------------------------------------------------------------


def _reliability(axes: Axes, colours: Colours, bins: Sequence[Bin]) -> None:
    """A point a bin, its area by the traces in it; on the diagonal forecasts are what comes."""
    shown = [
        (each.mean_p, each.accuracy, each.num_rows) for each in bins if each.mean_p is not None and each.accuracy is not None
    ]
    most = max((rows for _, _, rows in shown), default=1)
    axes.plot([0, 1], [0, 1], color=colours[5], linewidth=1.0, linestyle="--")
    sizes = [18 + 220 * rows / most for _, _, rows in shown]
    axes.scatter(
        [p for p, _, _ in shown], [share for _, share, _ in shown], s=sizes, color=colours[0], alpha=0.75, zorder=3, clip_on=False
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("p(correct), mean of the bin")
    axes.set_ylabel("right, of held-out traces")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
