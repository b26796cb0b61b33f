import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.packing import pack
from data.row_groups import DENSE_7B, Documents, RowCost, RowGroups, group_rows, spread

CAPACITIES = (64, 100, 250)
QUADRATIC = RowCost(flops_per_token=10.0, flops_per_pair=1.0)

lengths = st.lists(st.integers(1, 250), min_size=1, max_size=60).map(lambda values: np.array(values, dtype=np.int64))
widths = st.integers(1, 9)


def grouped(lengths_N: np.ndarray, width: int, seed: int = 0, capacities: Sequence[int] = CAPACITIES) -> RowGroups:
    return group_rows(pack(lengths_N, capacities, seed), lengths_N, capacities, QUADRATIC, width, seed)


def log_normal(count: int, capacity: int) -> np.ndarray:
    return np.random.default_rng(0).lognormal(np.log(4000), np.log(8) / 2.326, count).astype(np.int64).clip(1, capacity)


def rows_of(groups: RowGroups) -> list[list[int]]:
    return [groups.rows.row(row).tolist() for row in range(len(groups.rows))]


def test_a_row_costs_its_tokens_and_the_square_of_each_document() -> None:
    groups = grouped(np.array([30, 20, 14]), width=1)
    assert groups.cost_R.tolist() == [10 * 64 + 30**2 + 20**2 + 14**2]


def test_attention_costs_a_7b_as_much_as_the_rest_at_33_thousand_tokens() -> None:
    assert DENSE_7B.flops_per_token / DENSE_7B.flops_per_pair == pytest.approx(33_000, rel=0.01)


@given(lengths, widths, st.integers(0, 2))
def test_grouping_keeps_every_document_once_and_every_row_within_its_capacity(
    lengths_N: np.ndarray, width: int, seed: int
) -> None:
    rows = rows_of(grouped(lengths_N, width, seed))
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(lengths_N)))
    for row in rows:
        longest = max(int(lengths_N[document]) for document in row)
        assert sum(int(lengths_N[document]) for document in row) <= next(one for one in CAPACITIES if one >= longest)


@given(lengths, widths)
def test_every_rank_has_a_row_in_every_group_unless_documents_are_fewer(lengths_N: np.ndarray, width: int) -> None:
    rows = rows_of(grouped(lengths_N, width))
    last = rows[len(rows) - len(rows) % width :]
    assert all(len(row) == 1 for row in last)  # none of them could have been shared further
    assert len(rows) % width == 0 or len(last) < width


@given(lengths, widths)
def test_groups_are_consecutive_in_cost(lengths_N: np.ndarray, width: int) -> None:
    """Before the rows that were spread."""
    packing = pack(lengths_N, CAPACITIES, 0)
    whole = len(packing) if len(packing) % width == 0 else max(0, len(packing) // width - 1) * width
    costs = grouped(lengths_N, width).cost_R[:whole].tolist()
    assert costs == sorted(costs, reverse=True)


@given(lengths, widths, st.integers(1, 4))
def test_the_steps_of_an_epoch_take_every_row_once_and_only_the_last_takes_fewer(
    lengths_N: np.ndarray, width: int, groups_per_step: int
) -> None:
    groups = grouped(lengths_N, width)
    rows_per_step = width * groups_per_step
    steps = [groups.rows_of_step(step, rows_per_step).tolist() for step in range(groups.num_steps(rows_per_step))]
    assert sorted(itertools.chain.from_iterable(steps)) == list(range(len(groups.rows)))
    assert (
        all(len(step) in (rows_per_step, rows_per_step - width + len(groups.rows) % width) for step in steps[:-1]) and steps[-1]
    )


def spread_rows(lengths_N: np.ndarray, capacity: int, width: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A packing's rows, as many as leave a rank of `width` without one, and the same spread."""
    documents = Documents(lengths_N, QUADRATIC.of_documents(lengths_N), (capacity,))
    packing = pack(lengths_N, (capacity,), 0)
    before = [packing.row(row) for row in range(min(len(packing), width - 1))]
    return before, spread(before, documents, width)


WALL = [18, 12, 15, 15, 17, 13, 7, 9, 14, 16, 6, 8, 10, 11, 9, 12, 18]
"""Seven rows of 30: by cost over eight rows, no row has room for the last document."""


@given(st.lists(st.integers(1, 30), min_size=1, max_size=24), st.integers(2, 9))
@example(WALL, 8)
def test_rows_spread_over_more_ranks_stay_within_capacity(members: list[int], width: int) -> None:
    lengths_N = np.array(members, dtype=np.int64)
    before, after = spread_rows(lengths_N, 30, width)
    assert sorted(np.concatenate(after)) == sorted(np.concatenate(before))
    assert len(after) == min(width, len(np.concatenate(before))) and all(len(row) for row in after)
    assert all(lengths_N[row].sum() <= 30 for row in after)


def test_where_capacity_is_in_the_way_of_equal_costs_the_dearest_row_is_halved() -> None:
    before, after = spread_rows(np.array(WALL), 30, 8)
    assert len(before) == 7 and len(after) == 8
    assert sum(any(np.array_equal(one, other) for other in before) for one in after) == 6


def test_one_row_of_short_documents_gives_eight_ranks_equal_work() -> None:
    groups = grouped(np.full(64, 1), width=8)
    assert groups.rows.tokens_R.tolist() == [8] * 8
    assert groups.skew(np.arange(8), 8) == 1.0


def test_a_document_alone_is_one_row_and_the_other_ranks_have_none() -> None:
    groups = grouped(np.array([9]), width=3)
    assert groups.deal(np.arange(1), 3).tolist() == [[0, -1, -1]]
    assert groups.skew(np.arange(1), 3) == 3.0


@given(lengths, widths, widths)
def test_dealing_gives_every_row_to_one_rank_and_leaves_places_empty_at_the_end_only(
    lengths_N: np.ndarray, width: int, ranks: int
) -> None:
    groups = grouped(lengths_N, width)
    places_MW = groups.deal(np.arange(len(groups.rows)), ranks)
    assert sorted(places_MW[places_MW >= 0].tolist()) == list(range(len(groups.rows)))
    assert (places_MW[:-1] >= 0).all() and (places_MW[-1] >= 0).any()


def test_the_rank_with_the_dearest_row_of_one_micro_step_gets_the_cheapest_of_the_next() -> None:
    groups = grouped(np.array([250, 190, 240, 200]), width=2, capacities=(250,))
    assert groups.rows.tokens_R[groups.deal(np.arange(4), 2)].tolist() == [[250, 240], [190, 200]]


@pytest.mark.parametrize(("width", "bound"), [(2, 1.01), (8, 1.01), (16, 1.02), (32, 1.05)])
def test_ranks_of_a_step_cost_the_same_on_ten_thousand_log_normal_documents(width: int, bound: float) -> None:
    lengths_N = log_normal(10_000, 65_536)
    groups = group_rows(pack(lengths_N, (65_536,), 0), lengths_N, (65_536,), DENSE_7B, width, 0)
    steps = [groups.rows_of_step(step, 2 * width) for step in range(groups.num_steps(2 * width))]
    assert np.mean([groups.skew(rows_R, width) for rows_R in steps]) <= bound
