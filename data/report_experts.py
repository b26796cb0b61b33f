"""Expert telemetry for the report: where the teacher's tokens went, how evenly, and how that differs between tasks.

Everything comes from the two Arrow files that the generate stage sealed; before that, and for a teacher without routers or
behind a server, there is nothing to show.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from data import plots
from data.expert_counts import TaskCounts, read_counts, whole_run
from data.expert_figures import LayerLoad, by_task, mean_over_layers, read_load, task_divergences, totals
from data.expert_load import js_by_chance, shares
from data.report_summary import ExpertSummary
from data.store import RunFolder


@dataclass(frozen=True, slots=True)
class TaskLoad:
    """One task over all layers: figures of its worst layer, and mean divergences. None: nothing to compare."""

    task: str
    tokens: int
    max_over_mean: float
    rank_max_over_mean: float
    effective_share: float
    dead_share: float
    divergence_nats: float | None
    drift_nats: float | None


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """The section of the page. divergence_svg: None for a single task. chance_nats: what two samples of one load as small as
    the two smallest tasks would differ by."""

    summary: ExpertSummary
    load_svg: str
    divergence_svg: str | None
    chance_nats: float
    drift_by_chance_nats: float | None
    layers: tuple[LayerLoad, ...]
    tasks: tuple[TaskLoad, ...]


def expert_part(run: RunFolder, summary: ExpertSummary | None) -> ExpertPart | None:
    """What the page shows beside the summary."""
    if summary is None:
        return None
    found, rows = read_counts(run), read_load(run)
    counts = totals(by_task(found))
    layers = tuple(row for row in rows if row.task is None)
    return ExpertPart(
        summary=summary,
        load_svg=plots.expert_heat_map(relative_load(found)),
        divergence_svg=_divergence_svg(counts),
        chance_nats=_chance(counts),
        drift_by_chance_nats=mean_over_layers(layers, lambda row: row.drift_by_chance_nats),
        layers=layers,
        tasks=tuple(_task_load([row for row in rows if row.task == task]) for task in counts),
    )


def relative_load(found: Iterable[TaskCounts]) -> list[list[float]]:
    """[L, E]: each expert's tokens over its layer's mean; zeros for a layer without tokens."""
    share_LE = shares(whole_run(found))
    return (share_LE * share_LE.shape[-1]).tolist()


def _divergence_svg(counts: Mapping[str, np.ndarray]) -> str | None:
    if len(counts) < 2:
        return None
    return plots.divergence_matrix(list(counts), task_divergences(list(counts.values())).mean(-1).tolist())


def _chance(counts: Mapping[str, np.ndarray]) -> float:
    assignments = sorted(counts_LE[0].sum() for counts_LE in counts.values())[:2]
    num_experts = next(iter(counts.values())).shape[-1]
    return float(js_by_chance(assignments[0], assignments[-1], num_experts))


def _task_load(rows: list[LayerLoad]) -> TaskLoad:
    return TaskLoad(
        task=rows[0].task or "(no task)",
        tokens=rows[0].tokens,
        max_over_mean=max(row.max_over_mean for row in rows),
        rank_max_over_mean=max(row.rank_max_over_mean for row in rows),
        effective_share=min(row.effective_share for row in rows),
        dead_share=max(row.dead_share for row in rows),
        divergence_nats=mean_over_layers(rows, lambda row: row.divergence_nats),
        drift_nats=mean_over_layers(rows, lambda row: row.drift_nats),
    )
