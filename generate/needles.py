"""Pairs of facts that only together answer a question, and the depths at which they are hidden.

Fact `link` says which place belongs to an item, fact `code` which code belongs to a place; the question gives the item and
asks for the code. Decoys are further places with items and codes of their own, so that no fact answers alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

from data.records import digest
from generate.templates import Template

VARIABLES = ("item", "place", "code")
"""What a file of facts may use, in its blocks `link`, `code`, `question` and `answer`."""
STRATUM = 0.1
GRID = tuple((2 * step + 1) / 20 for step in range(10))
"""Depths 0.05, 0.15, ... 0.95: the middles of ten strata."""
DISTANT = 0.3
"""Least distance of the two facts, as measured in tokens. Aimed at is a step of the grid more, because a fact stands at the
end of a line and lines have lengths."""
_FIRST = (
    "Ash", "Bram", "Corvin", "Dunmar", "Elder", "Farn", "Grim", "Halver", "Isel", "Kester", "Lorn", "Marrow", "Norvel", "Ostren",
    "Perrin", "Quill",
)  # fmt: skip
_SECOND = (
    "bury", "combe", "dale", "fell", "garth", "haven", "holme", "mere", "moor", "reach", "stead", "thorpe", "wick", "worth",
)  # fmt: skip


class Needle(NamedTuple):
    """One pair of facts with its question. The words in `own` occur nowhere else in a fair prompt."""

    link: str
    code: str
    question: str
    answer: str
    own: tuple[str, ...]


def make_needle(template: Template, seed: object, taken: Sequence[str] = ()) -> Needle:
    """The pair of this seed, on a place that is not in `taken`. Raises UnusableInput for a file without the four blocks."""
    attempt = 0
    while (place := _place(digest(seed, attempt))) in taken:
        attempt += 1
    number = int(digest(seed, attempt, "numbers"), 16)
    values = {"item": str(100_000 + number % 900_000), "place": place, "code": str(10_000 + number // 900_000 % 90_000)}
    link, code, question, answer = (template.render_block(block, values) for block in ("link", "code", "question", "answer"))
    return Needle(link, code, question, answer, (place, values["code"]))


def _place(key: str) -> str:
    number = int(key, 16)
    return _FIRST[number % len(_FIRST)] + _SECOND[number // len(_FIRST) % len(_SECOND)]


def depth_pairs(seed: object) -> list[tuple[float, float]]:
    """(depth of link, depth of code): all 42 ordered pairs of the grid that are 0.4 or more apart, in the seed's order. The
    n-th prompt takes the n-th pair, modulo 42: every 42 prompts have the same depths."""
    pairs = [
        (first, second)
        for row, first in enumerate(GRID)
        for column, second in enumerate(GRID)
        if abs(row - column) >= round(DISTANT * len(GRID)) + 1
    ]
    return sorted(pairs, key=lambda pair: digest(seed, *pair))
