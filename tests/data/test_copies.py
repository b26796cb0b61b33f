"""Which copy counts: the vectorised answer equals the obvious one, whatever was finished twice."""

import secrets

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.copies import counting_rows, keys_of

IDENTITIES = [secrets.token_hex(16) for _ in range(6)]


def obvious(rows: list[tuple[str, bool]]) -> list[bool]:
    winners: dict[str, int] = {}
    for number, (identity, is_abort) in enumerate(rows):
        if identity not in winners or (rows[winners[identity]][1] and not is_abort):
            winners[identity] = number
    return [winners[identity] == number for number, (identity, _) in enumerate(rows)]


@given(st.lists(st.tuples(st.sampled_from(IDENTITIES), st.booleans()), max_size=30))
def test_the_first_completed_copy_counts_else_the_first(rows: list[tuple[str, bool]]) -> None:
    keys = keys_of([identity for identity, _ in rows])
    assert counting_rows(keys, np.array([is_abort for _, is_abort in rows], dtype=bool)).tolist() == obvious(rows)


def test_equal_halves_of_two_keys_do_not_make_them_one() -> None:
    keys = np.array([[1, 1], [1, 2], [2, 1], [1, 1]], dtype=np.uint64)
    assert counting_rows(keys, np.zeros(4, dtype=bool)).tolist() == [True, True, True, False]


def test_any_text_is_an_identity() -> None:
    keys = keys_of(["t1", "t2", "t1"])
    assert keys.shape == (3, 2) and keys[0].tolist() == keys[2].tolist() != keys[1].tolist()
    assert keys_of([]).shape == (0, 2)
    assert keys_of(["00" * 15 + "01"]).tolist() == [[0, 1]]
