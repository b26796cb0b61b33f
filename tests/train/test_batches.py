from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat import Encoded
from train.batches import Example, admit, num_trained, plan_micro_batches, step_members, visiting_order
from train.schedule import learning_rate

masks = st.lists(st.booleans(), min_size=1, max_size=40)


@given(st.lists(masks, max_size=30), st.integers(1, 40))
def test_token_ledger_balances(rows: list[list[bool]], max_tokens: int) -> None:
    examples = [Example(str(index), Encoded(list(range(len(mask))), mask)) for index, mask in enumerate(rows)]
    admitted = admit(examples, max_tokens)
    ledger = admitted.ledger
    assert ledger.balances
    assert ledger.total == sum(map(len, rows))
    assert ledger.trained == sum(num_trained(example.encoded) for example in admitted.examples)
    assert ledger.traces == len(admitted.examples) + sum(ledger.dropped_traces.values())
    assert all(len(example.encoded.ids) <= max_tokens for example in admitted.examples)


def test_over_length_trace_is_dropped_whole_and_counted() -> None:
    short, long = Encoded([1, 2, 3], [False, True, True]), Encoded(list(range(9)), [True] * 9)
    admitted = admit([Example("short", short), Example("long", long)], max_tokens=8)
    assert [example.trace_id for example in admitted.examples] == ["short"]
    assert (admitted.ledger.trained, admitted.ledger.masked) == (2, 1)
    assert admitted.ledger.dropped == {"over_length": 9}
    assert admitted.ledger.dropped_traces == {"over_length": 1}


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
