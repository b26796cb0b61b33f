"""Facts put into packed texts, near given depths, and where they came to stand."""

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from generate.packing import CountTokens, Piece

_BREAKS = (re.compile(r"\n"), re.compile(r"(?<=[.!?。！？])(?=\s)|(?<=[。！？])"), re.compile(r"(?=\s)"))
"""Where a text may be parted, best first: line ends, sentence ends, blanks."""
_WINDOW = 0.02
"""Share of the whole text on either side of the wanted place that is searched for a better kind of break."""


class Wanted(NamedTuple):
    """A fact, how many tokens it adds, and the depth in the whole message that it shall have, in [0, 1]."""

    fact: str
    tokens: int
    depth: float


class Hidden(NamedTuple):
    """A fact where it stands: `start` characters into the context, in the text `name`."""

    fact: str
    name: str
    start: int
    depth: float


def insert(pieces: Sequence[Piece], wanted: Sequence[Wanted], head: int, total: int) -> tuple[str, list[Hidden]]:
    """The pieces' text with each fact on a line of its own near its depth, and where each stands, in the order wanted.

    head: tokens of the message before the pieces; total: of the message with the facts. A depth is turned into a place by
    the pieces' token counts (less the facts that stand before it) and, within a piece, by characters.
    """
    places: dict[int, tuple[int, int]] = {}
    added = head
    for index in sorted(range(len(wanted)), key=lambda index: wanted[index].depth):
        places[index] = _place(pieces, max(0.0, wanted[index].depth * total - added))
        added += wanted[index].tokens
    blocks = [piece.block for piece in pieces]
    # From the end on, so that earlier places stay where they are; of two at one place, the deeper one first.
    for index in sorted(places, key=lambda index: (places[index], wanted[index].depth), reverse=True):
        number, start = places[index]
        blocks[number] = f"{blocks[number][:start]}\n{wanted[index].fact}\n{blocks[number][start:].removeprefix(chr(10))}"
    context = "".join(blocks)
    return context, [
        Hidden(fact, pieces[places[index][0]].name, context.index(f"\n{fact}\n") + 1, depth)
        for index, (fact, _, depth) in enumerate(wanted)
    ]


def _place(pieces: Sequence[Piece], tokens: float) -> tuple[int, int]:
    """(piece, character of its block): a break near the place that so many tokens lead to, never before the name line."""
    number, left = 0, tokens
    while number < len(pieces) - 1 and left >= pieces[number].tokens:
        left -= pieces[number].tokens
        number += 1
    block = pieces[number].block
    first = block.index("\n")
    target = max(first, min(len(block) - 1, int(len(block) * left / pieces[number].tokens)))
    window = max(100, int(_WINDOW * sum(len(piece.block) for piece in pieces)))
    for pattern in _BREAKS:
        if found := [match.start() for match in pattern.finditer(block, max(first, target - window), target + window)]:
            return number, min(found, key=lambda place: abs(place - target))
    return number, target


def tokens_before(content: str, starts: Sequence[int], count_tokens: CountTokens) -> list[int]:
    """Tokens of `content` before each of these characters. Every stretch between two of them is counted once, on its own:
    a tokenizer that joins text over a stretch's end (a line's, here) is off by one there."""
    cuts = sorted({0, *starts})
    counts = count_tokens([content[left:right] for left, right in pairwise(cuts)])
    before = dict(zip(cuts, [0, *accumulate(counts)], strict=True))
    return [before[start] for start in starts]
