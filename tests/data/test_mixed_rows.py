import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.mixed_rows import ALLOWED_WASTE, MOST_MORE, _split, pack_mixed
from data.packing import Packing, pack

CAPACITIES = (64, 100, 250)


def lengths_up_to(most: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.integers(1, most), max_size=80).map(lambda lengths: np.array(lengths, dtype=np.int64))


def log_normal(median: float, p99: float, count: int, most: int) -> np.ndarray:
    sigma = np.log(p99 / median) / 2.3263
    return np.random.default_rng(0).lognormal(np.log(median), sigma, count).astype(np.int64).clip(1, most)


def spread_of_lengths(packing: Packing, lengths_N: np.ndarray) -> float:
    """How differently long the documents of different rows are: deviation of the rows' mean lengths over the mean."""
    means_R = packing.sums(lengths_N) / np.diff(packing.offsets_R1)
    return float(means_R.std() / lengths_N.mean())


@given(lengths_up_to(250), st.integers(0, 3))
def test_every_document_stands_in_one_row_and_no_row_is_above_its_capacity(lengths_N: np.ndarray, seed: int) -> None:
    packing = pack_mixed(lengths_N, CAPACITIES, (seed, 1))
    rows = [packing.row(row).tolist() for row in range(len(packing))]
    assert sorted(document for row in rows for document in row) == list(range(len(lengths_N)))
    assert [int(lengths_N[row].sum()) for row in rows] == packing.tokens_R.tolist()
    assert all(rows) and (packing.tokens_R <= packing.capacities_R).all()


@given(lengths_up_to(250), st.integers(0, 3))
def test_rows_are_as_many_whatever_the_seed_and_hardly_more_than_best_fit_needs(lengths_N: np.ndarray, seed: int) -> None:
    fewest, packing = (pack_some(lengths_N, CAPACITIES, (seed, 1)) for pack_some in (pack, pack_mixed))
    assert len(packing) == len(pack_mixed(lengths_N, CAPACITIES, (seed, 2)))
    assert len(fewest) <= len(packing) <= len(fewest) + math.ceil(MOST_MORE * len(fewest))


def test_of_many_documents_a_thousandth_is_wasted_at_most() -> None:
    lengths_N = log_normal(40, 320, 60_000, 1_000)
    packing = pack_mixed(lengths_N, (1_000,), 0)
    assert len(pack(lengths_N, (1_000,), 0)) < len(packing)
    assert packing.waste <= ALLOWED_WASTE


@pytest.mark.parametrize(
    ("median", "p99", "count", "capacity"), [(100, 230, 4500, 2048), (400, 3000, 3000, 8192), (4000, 32000, 2000, 131072)]
)
def test_rows_hold_documents_of_all_lengths(median: float, p99: float, count: int, capacity: int) -> None:
    lengths_N = log_normal(median, p99, count, capacity)
    mixed, sorted_in = pack_mixed(lengths_N, (capacity,), 0), pack(lengths_N, (capacity,), 0)
    assert spread_of_lengths(mixed, lengths_N) < 0.25 * spread_of_lengths(sorted_in, lengths_N)


def test_an_epoch_puts_other_documents_together_and_again_the_same() -> None:
    lengths_N = log_normal(400, 3000, 500, 8192)
    one, again, other = (pack_mixed(lengths_N, (8192,), (7, epoch)) for epoch in (0, 0, 1))
    assert one.members_N.tolist() == again.members_N.tolist()
    neighbours = [{frozenset(packing.row(row)[:2].tolist()) for row in range(len(packing))} for packing in (one, other)]
    assert len(neighbours[0] & neighbours[1]) < len(one) // 4


@pytest.mark.parametrize("num_rows", [5, 6, 9])
def test_where_no_deal_is_found_rows_are_split_to_the_same_number(num_rows: int) -> None:
    lengths_N = np.array([51, 49, 40, 30, 30, 26, 26, 48, 50, 50])
    packing = _split(pack(lengths_N, (100,), 0), num_rows, lengths_N, (100,))
    rows = [packing.row(row).tolist() for row in range(len(packing))]
    assert len(rows) == num_rows and sorted(document for row in rows for document in row) == list(range(10))
    assert (packing.tokens_R <= 100).all()
