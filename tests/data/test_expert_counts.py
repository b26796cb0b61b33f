"""Expert telemetry as files: added up once, in halves, and measured for each layer and task."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from configs.errors import UnusableInput
from data.expert_counts import (
    COUNTS_FOLDER,
    TaskCounts,
    add_up,
    committed_counts,
    counts_table,
    from_counts_table,
    read_counts,
    whole_run,
)
from data.expert_figures import LayerLoad, by_task, from_load_table, layer_loads, load_table, read_load
from data.store import RunFolder, commit_segment, sha256_file, table_bytes, write_bytes

EVEN, LEFT, RIGHT = [[5, 5, 5, 5]], [[10, 10, 0, 0]], [[0, 0, 10, 10]]


def counted(task: str, counts: list[list[int]], part: int = 0) -> TaskCounts:
    """Two experts a token."""
    counts_LE = np.array(counts)
    return TaskCounts(task, int(counts_LE[0].sum()) // 2, counts_LE, part)


def same(found: list[TaskCounts], expected: list[TaskCounts]) -> bool:
    def plain(one: TaskCounts) -> tuple[object, ...]:
        return (one.task, one.tokens, one.part, one.counts_LE.tolist())

    return [plain(one) for one in found] == [plain(one) for one in expected]


def commit(run: RunFolder, *counts: TaskCounts, named: bool = True) -> Path:
    """One segment of traces with its count file; unnamed, as a kill between the two leaves it."""
    path = run.metrics / COUNTS_FOLDER / f"{len(list(run.metrics.rglob('*.arrow'))):03d}.arrow"
    write_bytes(path, table_bytes(counts_table(counts)))
    fact = {"file": str(path.relative_to(run.root)), "sha256": sha256_file(path)}
    if named:
        run.traces.mkdir(exist_ok=True)
        commit_segment(run.traces, pa.table({"x": [1]}), worker="w", facts={"expert_counts": fact})
    return path


# --- files -------------------------------------------------------------------------------------------------------


def test_counts_survive_arrow() -> None:
    found = [counted("a", [[1, 2], [3, 4]]), counted("a", [[5, 6], [7, 8]], part=1), counted("b", [[0, 9], [2, 0]])]
    assert same(from_counts_table(counts_table(found)), found) and from_counts_table(counts_table([])) == []


def test_figures_survive_arrow() -> None:
    rows = layer_loads([counted("a", LEFT), counted("b", RIGHT)], expert_parallel=2)
    assert from_load_table(load_table(rows)) == rows and rows[0].task is None


def test_a_table_of_another_schema_is_refused() -> None:
    with pytest.raises(UnusableInput, match="expert telemetry: schema .* expected"):
        from_counts_table(pa.table({"task": ["a"]}))


def test_a_count_file_that_no_segment_names_does_not_count(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    commit(run, counted("a", EVEN))
    commit(run, counted("a", LEFT), named=False)
    commit(run, counted("a", EVEN), counted("b", RIGHT))
    found = add_up(committed_counts(run))
    assert whole_run(found).tolist() == [[10, 10, 20, 20]] and [one.task for one in found] == ["a", "a", "b"]


def test_a_damaged_count_file_is_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path)
    commit(run, counted("a", EVEN))
    damaged, lost = commit(run, counted("a", LEFT)), commit(run, counted("a", RIGHT))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    lost.unlink()
    assert whole_run(add_up(committed_counts(run))).tolist() == EVEN
    assert caplog.text.count("is left out") == 2 and damaged.name in caplog.text


def test_an_unfinished_run_has_no_figures_yet(tmp_path: Path) -> None:
    assert read_counts(RunFolder(tmp_path)) == [] and read_load(RunFolder(tmp_path)) == []


# --- adding up ---------------------------------------------------------------------------------------------------


def test_a_tasks_tokens_fall_into_two_halves_in_commit_order() -> None:
    """Tokens 10, 10, 10, 30 of task a: middles at 5, 15, 25 and 45 of 60, so the last alone is the second half."""
    sizes = [[[5, 5, 5, 5]], [[5, 5, 5, 5]], [[5, 5, 5, 5]], [[30, 30, 0, 0]]]
    found = add_up(
        [[counted("a", counts), counted("b", EVEN)] if counts[0][0] == 30 else [counted("a", counts)] for counts in sizes]
    )
    assert same(found, [counted("a", [[15, 15, 15, 15]]), counted("a", [[30, 30, 0, 0]], part=1), counted("b", EVEN)])


@pytest.mark.parametrize("tokens", [(1, 9), (9, 1), (5, 5)])
def test_two_segments_are_always_two_halves(tokens: tuple[int, int]) -> None:
    assert [one.part for one in add_up([[counted("a", [[2 * size, 0]])] for size in tokens])] == [0, 1]


def test_many_small_tasks_are_shown_as_one() -> None:
    found = [counted(f"t{size}", [[2 * size, 0]]) for size in range(1, 7)]
    groups = by_task(found, at_most=3)
    assert list(groups) == ["t6", "t5", "4 other tasks"]
    assert sum(one.tokens for one in groups["4 other tasks"]) == 1 + 2 + 3 + 4


# --- figures -----------------------------------------------------------------------------------------------------


def figures_of(rows: list[LayerLoad], task: str | None) -> LayerLoad:
    return next(row for row in rows if row.task == task)


def test_figures_of_two_opposite_tasks_by_hand() -> None:
    """Each task uses its own half of the experts; together they are even. Two ranks hold one half each."""
    rows = layer_loads([counted("a", LEFT), counted("b", RIGHT), counted("b", RIGHT, part=1)], expert_parallel=2)
    left, right, run = figures_of(rows, "a"), figures_of(rows, "b"), figures_of(rows, None)
    assert (left.tokens, right.tokens, run.tokens, run.experts_per_token) == (10, 20, 30, 2)
    assert left.max_over_mean == 2 and left.effective_share == pytest.approx(0.5) and left.dead_share == 0.5
    assert left.rank_max_over_mean == 2 and left.hottest == (0, 1, 2) and left.top_share == 1
    assert run.max_over_mean == run.rank_max_over_mean == pytest.approx(4 / 3)  # 10, 10, 20, 20
    assert left.divergence_nats == right.divergence_nats == run.divergence_nats == pytest.approx(math.log(2))
    assert left.drift_nats is None and right.drift_nats == run.drift_nats == pytest.approx(0.0)


def test_a_change_of_tasks_is_no_drift_and_a_change_within_a_task_is() -> None:
    steady = layer_loads([counted("a", LEFT), counted("a", LEFT, 1), counted("b", RIGHT), counted("b", RIGHT, 1)], 1)
    assert figures_of(steady, None).drift_nats == pytest.approx(0.0)
    turned = layer_loads([counted("a", LEFT), counted("a", RIGHT, 1), counted("b", EVEN), counted("b", EVEN, 1)], 1)
    assert figures_of(turned, "a").drift_nats == pytest.approx(math.log(2))
    assert figures_of(turned, None).drift_nats == pytest.approx(math.log(2) / 2)  # both tasks have 20 tokens
    assert figures_of(turned, "a").drift_by_chance_nats == pytest.approx(3 / 8 * (1 / 20 + 1 / 20))


def test_a_single_task_has_nothing_to_diverge_from() -> None:
    assert {row.divergence_nats for row in layer_loads([counted("a", LEFT)], 1)} == {None}
