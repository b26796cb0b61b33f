from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat import Encoded
from train.batches import admit, num_trained, plan_micro_batches, step_members, visiting_order
from train.schedule import learning_rate

masks = st.lists(st.booleans(), min_size=1, max_size=40)


def sizes(rows: list[list[bool]]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [Encoded(list(range(len(mask))), mask) for mask in rows]
    return np.array([len(row.ids) for row in encoded], np.int64), np.array([num_trained(row) for row in encoded], np.int64)


@given(st.lists(masks, max_size=30), st.integers(1, 40))
def test_token_ledger_balances(rows: list[list[bool]], max_tokens: int) -> None:
    lengths_N, trained_N = sizes(rows)
    kept_R, ledger = admit(lengths_N, trained_N, max_tokens)
    assert ledger.balances
    assert ledger.total == sum(map(len, rows))
    assert ledger.trained == sum(sum(rows[row][1:]) for row in kept_R)
    assert ledger.traces == len(kept_R) + sum(ledger.dropped_traces.values())
    assert kept_R.tolist() == [row for row, mask in enumerate(rows) if len(mask) <= max_tokens]


def test_over_length_trace_is_dropped_whole_and_counted() -> None:
    kept_R, ledger = admit(*sizes([[False, True, True], [True] * 9]), max_tokens=8)
    assert kept_R.tolist() == [0]
    assert (ledger.trained, ledger.masked) == (2, 1)
    assert ledger.dropped == {"over_length": 9}
    assert ledger.dropped_traces == {"over_length": 1}


@given(st.integers(1, 50), st.integers(1, 4), st.integers(0, 5))
def test_every_trace_is_visited_once_per_epoch(num_traces: int, epochs: int, seed: int) -> None:
    order = visiting_order(num_traces, epochs, seed)
    for epoch in range(epochs):
        assert sorted(order[epoch * num_traces : (epoch + 1) * num_traces]) == list(range(num_traces))
    assert order == visiting_order(num_traces, epochs, seed)


def test_fractional_epochs_visit_a_share_and_epochs_differ() -> None:
    order = visiting_order(100, 1.5, seed=3)
    assert len(order) == 150 and len(set(order[100:])) == 50
    assert order[:50] != order[100:]
    assert visiting_order(100, 1.0, seed=4) != order[:100]


def test_last_step_alone_may_be_short() -> None:
    assert [list(members) for members in step_members(list(range(7)), 3)] == [[0, 1, 2], [3, 4, 5], [6]]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60), st.integers(1, 4), st.integers(64, 256))
def test_plan_places_every_row_once_within_the_token_budget(lengths: list[int], world_size: int, budget: int) -> None:
    plan = plan_micro_batches(lengths, world_size, budget)
    rows = Counter(row for rank in plan for micro_batch in rank for row in micro_batch)
    assert rows == Counter(range(len(lengths)))
    assert len(plan) == world_size
    assert len({len(rank) for rank in plan}) == 1  # equal numbers of collectives on every rank
    for rank in plan:
        for micro_batch in rank:
            assert len(micro_batch) * max((lengths[row] for row in micro_batch), default=0) <= budget


def test_ranks_get_equal_work_from_unequal_rows() -> None:
    lengths = [100] * 4 + [50] * 8
    plan = plan_micro_batches(lengths, 2, 100_000)
    assert [[len(micro_batch) for micro_batch in rank] for rank in plan] == [[4], [8]]


def test_fewer_rows_than_ranks_leave_an_empty_micro_batch() -> None:
    assert plan_micro_batches([5], 2, 64) == [[[0]], [[]]]


def test_learning_rate_warms_up_then_falls_as_half_a_cosine() -> None:
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx(0.5)  # half-way through the eight steps after warm-up
    assert rates[-1] > 0.0 and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert learning_rate(0, 1, 1.0, 0.0) == 1.0
