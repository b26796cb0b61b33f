"""Columns of a segment's sidecar, short to write and quick to read: a ledger of a million requests is 4,000 sidecars.

A column of few different words is {"names": [...], "codes": "..."}, a character for each row (chr(48 + position in names):
`0`, `1`, ...); identities of 32 hex digits are one string. A plain list is a column too.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

Column = Sequence[str] | str | dict

FIRST_CODE = 48
ID_DIGITS = 32


def coded(words: Sequence[str]) -> dict[str, object]:
    names = list(dict.fromkeys(words))
    code_of = {name: chr(FIRST_CODE + number) for number, name in enumerate(names)}
    return {"names": names, "codes": "".join(code_of[word] for word in words)}


def words_of(column: Column) -> list[str]:
    """One word a row. Raises ValueError for what is no column."""
    match column:
        case {"names": list(names), "codes": str(codes)} if all(0 <= ord(code) - FIRST_CODE < len(names) for code in set(codes)):
            word_of = {chr(FIRST_CODE + number): name for number, name in enumerate(names)}
            return [word_of[code] for code in codes]
        case str() if len(column) % ID_DIGITS == 0:
            return [column[start : start + ID_DIGITS] for start in range(0, len(column), ID_DIGITS)]
        case list():
            return column
        case _:
            raise ValueError(f"a {type(column).__name__} is no column")


def num_rows(column: object) -> int:
    """-1 for what is no column."""
    match column:
        case {"names": list(), "codes": str(codes)}:
            return len(codes)
        case str():
            return len(column) // ID_DIGITS
        case list():
            return len(column)
        case _:
            return -1


def tally(column: Column, keep: Iterable[bool] | None = None) -> Counter[str]:
    """How often each word stands in the rows that are kept; in all of them when none are named."""
    if not isinstance(column, dict):
        return Counter(words_of(column) if keep is None else itertools.compress(words_of(column), keep))
    codes = Counter(column["codes"] if keep is None else itertools.compress(column["codes"], keep))
    return Counter({column["names"][ord(code) - FIRST_CODE]: count for code, count in codes.items()})
