from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.packing import WORD_BITS, Packing, pack, random_keys

CAPACITIES = (64, 100, 250)


def lengths_up_to(most: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.integers(1, most), max_size=80).map(lambda lengths: np.array(lengths, dtype=np.int64))


def fills(packing: Packing) -> Counter[tuple[int, int]]:
    return Counter(zip(packing.capacities_R.tolist(), packing.tokens_R.tolist(), strict=True))


def scan_every_row(lengths: Sequence[int], capacities: Sequence[int]) -> Counter[tuple[int, int]]:
    """Best-fit decreasing as it is defined: all open rows are looked at for every document. Rows as (capacity, tokens). Among
    equal spaces the last one touched is taken, which matters only for which of two capacities gets the tokens."""
    rows: list[tuple[int, int, int]] = []
    for touched, length in enumerate(sorted(lengths, reverse=True)):
        fitting = [(capacity - tokens, -last, index) for index, (capacity, tokens, last) in enumerate(rows)]
        fitting = [one for one in fitting if one[0] >= length]
        if fitting:
            index = min(fitting)[2]
            capacity, tokens, _ = rows[index]
            rows[index] = (capacity, tokens + length, touched)
        else:
            rows.append((next(one for one in capacities if one >= length), length, touched))
    return Counter((capacity, tokens) for capacity, tokens, _ in rows)


@given(lengths_up_to(250), st.integers(0, 3))
def test_rows_are_those_of_a_scan_over_every_row(lengths_N: np.ndarray, seed: int) -> None:
    assert fills(pack(lengths_N, CAPACITIES, seed)) == scan_every_row(lengths_N.tolist(), CAPACITIES)


@pytest.mark.parametrize("capacities", [(5000,), (1 << WORD_BITS, 3 << WORD_BITS), ((2 << WORD_BITS) - 1,)])
def test_rows_of_many_words_of_spaces_are_those_of_a_scan_too(capacities: tuple[int, ...]) -> None:
    lengths_N = np.random.default_rng(5).lognormal(6, 1.2, 600).astype(np.int64).clip(1, capacities[-1])
    assert fills(pack(lengths_N, capacities, 0)) == scan_every_row(lengths_N.tolist(), capacities)


@given(lengths_up_to(250), st.integers(0, 3))
def test_every_document_stands_in_one_row_and_no_row_is_above_its_capacity(lengths_N: np.ndarray, seed: int) -> None:
    packing = pack(lengths_N, CAPACITIES, seed)
    rows = [packing.row(row).tolist() for row in range(len(packing))]
    assert sorted(document for row in rows for document in row) == list(range(len(lengths_N)))
    assert [int(lengths_N[row].sum()) for row in rows] == packing.tokens_R.tolist() == packing.sums(lengths_N).tolist()
    assert all(rows) and (packing.tokens_R <= packing.capacities_R).all()


@given(lengths_up_to(250))
def test_a_row_is_longer_only_for_a_document_that_needs_it(lengths_N: np.ndarray) -> None:
    packing = pack(lengths_N, CAPACITIES, 0)
    for row, capacity in enumerate(packing.capacities_R.tolist()):
        longest = lengths_N[packing.row(row)].max()
        assert capacity == next(one for one in CAPACITIES if one >= longest)


def test_short_documents_fill_what_a_long_one_leaves() -> None:
    packing = pack(np.array([150, 60, 36, 64]), CAPACITIES, 0)
    assert [packing.row(row).tolist() for row in range(len(packing))] == [[0, 3, 2], [1]]
    assert packing.capacities_R.tolist() == [250, 64]
    assert packing.waste == pytest.approx(4 / 314)


@given(lengths_up_to(8), st.integers(0, 5))
def test_a_seed_moves_documents_of_equal_length_and_nothing_else(lengths_N: np.ndarray, seed: int) -> None:
    one, other = pack(lengths_N, (20,), seed), pack(lengths_N, (20,), seed + 1)
    assert one.tokens_R.tolist() == other.tokens_R.tolist()
    assert lengths_N[one.members_N].tolist() == lengths_N[other.members_N].tolist()


def test_epochs_put_documents_of_equal_length_into_other_rows_and_an_epoch_again_into_the_same() -> None:
    lengths_N = np.full(60, 5)
    epochs = [pack(lengths_N, (20,), (3, epoch)).members_N.tolist() for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]


def test_shuffling_keys_are_the_same_for_ever() -> None:
    """A resume on another machine depends on them."""
    assert random_keys(2, (7, 1)).tolist() == [14206593023844375757, 2064693230803885548]


def test_no_documents_are_no_rows() -> None:
    packing = pack(np.zeros(0, dtype=np.int64), (8,), 0)
    assert len(packing) == 0 and packing.waste == 0.0 and len(packing.sums(np.zeros(0))) == 0


def test_ten_thousand_log_normal_documents_waste_under_a_thousandth() -> None:
    lengths_N = np.random.default_rng(0).lognormal(np.log(4000), np.log(8) / 2.326, 10_000).astype(np.int64).clip(1, 65_536)
    assert pack(lengths_N, (65_536,), 0).waste <= 0.001


@pytest.mark.long
def test_a_million_documents_are_packed_in_seconds() -> None:
    lengths_N = np.random.default_rng(0).lognormal(np.log(4000), np.log(8) / 2.326, 1_000_000).astype(np.int64).clip(1, 65_536)
    assert pack(lengths_N, (65_536,), 0).waste < 1e-4
