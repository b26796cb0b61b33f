"""How many rows of which length the cache may hold: a rectangle of slots x columns under a fixed number of tokens.

The decode step reads contiguous rows, so a slot costs as many columns as the longest row in play. The rectangle follows
the work: short rows stand many abreast, one long row alone; the bytes never exceed what the plan left free.
"""

from typing import NamedTuple

FIRST_COLUMNS = 128


class Rectangle(NamedTuple):
    slots: int
    columns: int


def rectangle(rows: int, columns: int, *, num_slots: int, cache_tokens: int | None) -> Rectangle | None:
    """The shape to give the cache when `rows` need `columns` each; None when cache_tokens cannot hold that.

    Columns grow by at least an eighth (twice without a budget), so that copies are rare, and as little as fits when space
    is short. Slots are all that the budget leaves for those columns, at most num_slots.
    """
    if cache_tokens is None:
        return Rectangle(num_slots, max(FIRST_COLUMNS, 1 << (columns - 1).bit_length()))
    for wide in (_rounded_up(columns), columns):
        if rows * wide <= cache_tokens:
            return Rectangle(min(num_slots, cache_tokens // wide), wide)
    return None


def _rounded_up(columns: int) -> int:
    """To a multiple of an eighth of the power of two below it, at least of FIRST_COLUMNS."""
    step = max(FIRST_COLUMNS, (1 << columns.bit_length() - 1) // 8)
    return -(-columns // step) * step
