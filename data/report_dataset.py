"""The dataset for the page: what `tracestill data stats` tells, with its plots."""

from collections.abc import Mapping
from dataclasses import dataclass

from data.stats import Stats, dataset_stats
from data.stats_plots import as_svg, stats_plots
from data.stats_tables import cost_rows, view_lines
from data.store import RunFolder, read_rollup
from data.verdict_files import has_evidence


@dataclass(frozen=True, slots=True)
class DatasetPart:
    """The section of the page. plots: SVG by name (data/stats_plots.py). cost: what, in all, per kept trace."""

    stats: Stats
    plots: Mapping[str, str]
    cost: tuple[tuple[str, str, str], ...]
    view: tuple[tuple[str, str], ...]


def dataset_part(run: RunFolder) -> DatasetPart | None:
    """None before a dataset is built, and for one of an earlier release. Raises UnusableInput for a file that changed."""
    rollup = read_rollup(run.dataset)
    if rollup is None or not has_evidence(rollup):
        return None
    found = dataset_stats(run)
    return DatasetPart(
        stats=found,
        plots={plot.name: as_svg(plot) for plot in stats_plots(found)},
        cost=tuple(cost_rows(found.cost)),
        view=tuple(view_lines(found.view, found.num_wide_spread)),
    )
