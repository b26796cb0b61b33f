"""The figures of a run's expert telemetry: of each sparse layer, for the whole run and for each task. W&B and the report
read these rows; they can be made again from the counts at any time."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data.expert_counts import SCHEMA_METADATA, TaskCounts, check_schema, read_sealed, whole_run
from data.expert_load import hottest, js_by_chance, js_divergence, load_metrics, rank_loads, top_share
from data.store import RunFolder

LOAD_FILE = "expert_load.arrow"
COMPARED_TASKS = 24
"""Figures are made of the largest ones, and of all the others as one: comparing each with each grows with the square."""
LOAD = pa.schema(
    [
        ("task", pa.string()),
        ("layer", pa.int32()),
        ("tokens", pa.int64()),
        ("experts_per_token", pa.int32()),
        ("cv", pa.float64()),
        ("max_over_mean", pa.float64()),
        ("expert_parallel", pa.int32()),
        ("rank_cv", pa.float64()),
        ("rank_max_over_mean", pa.float64()),
        ("effective_share", pa.float64()),
        ("dead_share", pa.float64()),
        ("top_share", pa.float64()),
        ("hottest", pa.list_(pa.int32())),
        ("divergence_nats", pa.float64()),
        ("drift_nats", pa.float64()),
        ("drift_by_chance_nats", pa.float64()),
    ],
    metadata=SCHEMA_METADATA,
)


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """Figures of one sparse layer (the l-th router) for one task, or for the whole run (task None); a row of
    metrics/expert_load.arrow.

    cv, max_over_mean, effective_share, dead_share: see data/expert_load.py; rank_*: the same over expert-parallel ranks.
    top_share: of the assignments, what the experts_per_token busiest experts took. hottest: experts, busiest first.
    divergence_nats: mean Jensen-Shannon divergence to the other tasks (of the whole run: over all pairs). drift_nats: the
    same between the first and the second half of the task's tokens (of the whole run: mean over tasks by tokens, so that
    a change of tasks is no drift); drift_by_chance_nats: what independent tokens would show. None: nothing to compare.
    """

    task: str | None
    layer: int
    tokens: int
    experts_per_token: int
    cv: float
    max_over_mean: float
    expert_parallel: int
    rank_cv: float
    rank_max_over_mean: float
    effective_share: float
    dead_share: float
    top_share: float
    hottest: tuple[int, ...]
    divergence_nats: float | None
    drift_nats: float | None
    drift_by_chance_nats: float | None


def load_table(rows: Sequence[LayerLoad]) -> pa.Table:
    return pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=LOAD)


def from_load_table(table: pa.Table) -> list[LayerLoad]:
    """Raises UnusableInput when its schema is not the current one."""
    check_schema(table, LOAD)
    return [LayerLoad(**row | {"hottest": tuple(row["hottest"])}) for row in table.to_pylist()]


def read_load(run: RunFolder) -> list[LayerLoad]:
    """The figures as the generate stage sealed them; empty like read_counts."""
    table = read_sealed(run, LOAD_FILE)
    return [] if table is None else from_load_table(table)


def layer_loads(found: Sequence[TaskCounts], expert_parallel: int) -> list[LayerLoad]:
    """A row for each layer of the whole run, then of each task, largest first. Empty without counts."""
    if not found:
        return []
    groups = by_task(found)
    counts, drifts = totals(groups), {task: _drift(parts) for task, parts in groups.items()}
    tokens = {task: sum(one.tokens for one in parts) for task, parts in groups.items()}
    divergence_TL = _mean_to_others(task_divergences(list(counts.values())))
    whole = sum(tokens.values())
    rows = _rows(None, whole_run(found), whole, expert_parallel, divergence_TL.mean(0), _weighted(drifts, tokens))
    for task, divergence_L in zip(groups, divergence_TL, strict=True):
        rows += _rows(task, counts[task], tokens[task], expert_parallel, divergence_L, drifts[task])
    return rows


def _mean_to_others(divergence_TTL: np.ndarray) -> np.ndarray:
    """[tasks, L]; NaN for a task that is alone."""
    others = len(divergence_TTL) - 1
    return divergence_TTL.sum(1) / others if others else np.full_like(divergence_TTL[0], np.nan)  # to itself it is 0


def task_divergences(counts: Sequence[np.ndarray]) -> np.ndarray:
    """[tasks, tasks, L]: Jensen-Shannon divergence of each two tasks in each layer, nats."""
    stacked = np.stack(counts)
    return np.stack([js_divergence(one_LE[None], stacked) for one_LE in stacked])


def _drift(parts: Sequence[TaskCounts]) -> np.ndarray:
    """[2, L]: divergence of the first from the second half, and what chance would give; NaN with one part only."""
    halves = [[one.counts_LE for one in parts if one.part == part] for part in (0, 1)]
    if not all(halves):
        return np.full((2, parts[0].counts_LE.shape[0]), np.nan)
    first_LE, second_LE = (np.sum(half, axis=0) for half in halves)
    by_chance_L = js_by_chance(first_LE.sum(-1), second_LE.sum(-1), first_LE.shape[-1])
    return np.stack([js_divergence(first_LE, second_LE), by_chance_L])


def _weighted(drifts: Mapping[str, np.ndarray], tokens: Mapping[str, int]) -> np.ndarray:
    """[2, L]: mean over the tasks that have two parts, by tokens."""
    known = {task: drift for task, drift in drifts.items() if not np.isnan(drift).any()}
    if not known:
        return next(iter(drifts.values()))
    return np.average(list(known.values()), axis=0, weights=[tokens[task] for task in known])


def _rows(
    task: str | None, counts_LE: np.ndarray, tokens: int, expert_parallel: int, divergence_L: np.ndarray, drift_2L: np.ndarray
) -> list[LayerLoad]:
    experts_per_token = max(1, round(int(counts_LE[0].sum()) / max(tokens, 1)))
    metrics, rank_metrics = load_metrics(counts_LE), load_metrics(rank_loads(counts_LE, expert_parallel))
    top_L, hottest_L = top_share(counts_LE, experts_per_token), hottest(counts_LE).tolist()
    return [
        LayerLoad(
            task=task,
            layer=layer,
            tokens=tokens,
            experts_per_token=experts_per_token,
            cv=float(metrics.cv[layer]),
            max_over_mean=float(metrics.max_over_mean[layer]),
            expert_parallel=expert_parallel,
            rank_cv=float(rank_metrics.cv[layer]),
            rank_max_over_mean=float(rank_metrics.max_over_mean[layer]),
            effective_share=float(metrics.effective_share[layer]),
            dead_share=float(metrics.dead_share[layer]),
            top_share=float(top_L[layer]),
            hottest=tuple(hottest_L[layer]),
            divergence_nats=_known(divergence_L[layer]),
            drift_nats=_known(drift_2L[0, layer]),
            drift_by_chance_nats=_known(drift_2L[1, layer]),
        )
        for layer in range(len(counts_LE))
    ]


def mean_over_layers(rows: Iterable[LayerLoad], figure: Callable[[LayerLoad], float | None]) -> float | None:
    """None when no layer has the figure."""
    known = [value for row in rows if (value := figure(row)) is not None]
    return sum(known) / len(known) if known else None


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def by_task(found: Iterable[TaskCounts], *, at_most: int = COMPARED_TASKS) -> dict[str, list[TaskCounts]]:
    """The parts of each task, largest task first; the smallest ones together under one name when there are too many."""
    groups: dict[str, list[TaskCounts]] = {}
    for one in found:
        groups.setdefault(one.task, []).append(one)
    ranked = sorted(groups, key=lambda task: (-sum(one.tokens for one in groups[task]), task))
    if len(ranked) <= at_most:
        return {task: groups[task] for task in ranked}
    rest = [one for task in ranked[at_most - 1 :] for one in groups[task]]
    return {task: groups[task] for task in ranked[: at_most - 1]} | {f"{len(ranked) - at_most + 1} other tasks": rest}


def totals(groups: Mapping[str, Sequence[TaskCounts]]) -> dict[str, np.ndarray]:
    """[L, E] of each task."""
    return {task: np.sum([one.counts_LE for one in parts], axis=0) for task, parts in groups.items()}
