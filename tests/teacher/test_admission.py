"""The cache's rectangle: never above the budget, never too small for what was asked."""

from hypothesis import given
from hypothesis import strategies as st

from teacher.admission import FIRST_COLUMNS, Rectangle, rectangle


@given(st.integers(1, 300), st.integers(1, 1 << 20), st.integers(1, 300), st.integers(1, 1 << 24))
def test_a_rectangle_holds_what_was_asked_within_the_budget(rows: int, columns: int, more: int, budget: int) -> None:
    found = rectangle(rows, columns, num_slots=rows + more, cache_tokens=budget)
    if found is None:
        assert rows * columns > budget
    else:
        assert rows <= found.slots <= rows + more and found.columns >= columns
        assert found.slots * found.columns <= budget


@given(st.integers(1, 1 << 20))
def test_growing_is_rare(columns: int) -> None:
    """With room, a grown cache lasts for another eighth of its columns, or its first 128."""
    found = rectangle(1, columns, num_slots=1, cache_tokens=1 << 40)
    assert found is not None and (found.columns < columns + max(FIRST_COLUMNS, columns / 4))
    following = rectangle(1, found.columns + 1, num_slots=1, cache_tokens=1 << 40)
    assert following is not None and following.columns - found.columns >= max(FIRST_COLUMNS, found.columns / 17)


def test_slots_are_what_the_budget_leaves_for_the_longest_row() -> None:
    assert rectangle(1, 1000, num_slots=64, cache_tokens=8192) == Rectangle(8, 1024)
    assert rectangle(1, 8000, num_slots=64, cache_tokens=8192) == Rectangle(1, 8192)
    assert rectangle(2, 4095, num_slots=64, cache_tokens=8190) == Rectangle(2, 4095)
    assert rectangle(2, 4096, num_slots=64, cache_tokens=8190) is None


def test_without_a_budget_columns_double() -> None:
    assert rectangle(3, 129, num_slots=64, cache_tokens=None) == Rectangle(64, 256)
    assert rectangle(3, 1, num_slots=64, cache_tokens=None) == Rectangle(64, FIRST_COLUMNS)
