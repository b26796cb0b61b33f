"""Texts into a token budget: whole ones in a stated order, and only a text that no budget would hold is cut.

A text that does not fit into what is left is left out and named, and smaller ones after it may still come. A text that
alone exceeds the whole room is cut at a line end to what is left, and marked. Costs are the teacher's tokens. What looks like
a control token of the teacher is escaped when a text becomes a piece, so that places and costs are those of the prompt.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from generate.control_tokens import NO_CONTROL_TOKENS, ControlTokens

CountTokens = Callable[[Sequence[str]], list[int]]
"""Tokens of each text, by the teacher's tokenizer, without special tokens."""

CHAT_TOKENS = 32
"""Kept free of every budget for what the chat template adds around one message: GLM writes 5 tokens, ChatML 9."""
MIN_ROOM = 8
"""Tokens: a smaller rest takes no text, its name line alone is about that."""
CLOSED_SHARE = 200
"""Nor is a rest below 1/200 of the room offered to anything: half a per cent is not worth counting every text of a tree."""
NAMED_LEFT_OUT = 20
"""Texts left out that a prompt's provenance names; the others are counted."""


class Text(NamedTuple):
    """A text that may be packed, as lines with their ends."""

    name: str
    lines: tuple[str, ...]


class Piece(NamedTuple):
    """A packed text as it stands in the prompt. num_lines: how many of its lines do; `truncated` when not all. escaped: control
    tokens in it that were escaped."""

    name: str
    block: str
    tokens: int
    num_lines: int
    truncated: bool
    escaped: int = 0


class Packed(NamedTuple):
    """Pieces in the order they were taken; names of texts that did not fit."""

    pieces: list[Piece]
    left_out: list[str]


def lines_of(text: str) -> tuple[str, ...]:
    """Split after each newline and nowhere else, so that line numbers are those of an editor; the last line gets one."""
    lines = text.split("\n")
    return tuple(f"{line}\n" for line in (lines[:-1] if lines[-1] == "" else lines))


def block_of(text: Text, num_lines: int | None = None, *, numbered: bool = False) -> str:
    """A text under its name, the first `num_lines` lines of it; numbered: from 1, as `path:line` counts."""
    total = len(text.lines)
    kept = text.lines[:num_lines]
    head = text.name if len(kept) == total else f"{text.name} (first {len(kept)} of {total} lines)"
    body = "".join(f"{number:>5} {line}" for number, line in enumerate(kept, 1)) if numbered else "".join(kept)
    return f"=== {head} ===\n{body}\n"


class Shelf:
    """Texts by name, read when they are asked for; what each costs as a whole is counted once."""

    def __init__(
        self,
        read: Callable[[str], str],
        count_tokens: CountTokens,
        control: ControlTokens = NO_CONTROL_TOKENS,
        *,
        numbered: bool = False,
    ) -> None:
        self._read, self._count_tokens, self._control, self._numbered = read, count_tokens, control, numbered
        self._costs: dict[str, int] = {}

    def text(self, name: str) -> Text:
        """As it was read: nothing is escaped in it yet."""
        return Text(name, lines_of(self._read(name)))

    def whole(self, text: Text) -> Piece:
        return self._as_piece(text, len(text.lines))

    def cut(self, text: Text, room: int) -> Piece | None:
        """The longest run of first lines that fits, found by halving; None when not even one does."""
        fits, too_many = 0, len(text.lines)
        best: Piece | None = None
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            piece = self._as_piece(text, middle)
            if piece.tokens <= room:
                fits, best = middle, piece
            else:
                too_many = middle
        return best

    def _as_piece(self, text: Text, num_lines: int) -> Piece:
        block, escaped = self._control.escape(block_of(text, num_lines, numbered=self._numbered))
        [tokens] = self._count_tokens([block])
        return Piece(text.name, block, tokens, num_lines, num_lines < len(text.lines), escaped)

    def piece(self, name: str, room: int, whole_room: int) -> Piece | None:
        """The text as a piece of at most `room` tokens; cut when it exceeds even `whole_room`; None when it is to be left
        out. One that is known not to fit is not read again."""
        if room < self._costs.get(name, 0) <= whole_room:
            return None
        text = self.text(name)
        whole = self.whole(text)
        self._costs[name] = whole.tokens
        if whole.tokens <= room:
            return whole
        return self.cut(text, room) if whole.tokens > whole_room else None


def pack(shelf: Shelf, names: Sequence[str], taken: Sequence[Piece], room: int) -> Packed:
    """`taken`, and then every text in the order of `names` that fits into what is left of `room`."""
    pieces, left_out = list(taken), []
    left = room - sum(piece.tokens for piece in taken)
    for name in names:
        piece = shelf.piece(name, left, room) if left >= max(MIN_ROOM, room // CLOSED_SHARE) else None
        if piece is None:
            left_out.append(name)
        else:
            pieces.append(piece)
            left -= piece.tokens
    return Packed(pieces, left_out)


class Fitted(NamedTuple):
    """A rendered prompt and what is in it."""

    content: str
    tokens: int
    packed: Packed


def fit(
    packed: Packed, keep: int, budget: int, render: Callable[[Sequence[Piece]], str], count_tokens: CountTokens
) -> Fitted | None:
    """The rendered prompt, within `budget` tokens as a whole. A tokenizer may count a text otherwise when it stands beside
    another, so the last pieces taken go again until it fits; the first `keep` never do. None when those alone are too many.
    """
    pieces, left_out = list(packed.pieces), list(packed.left_out)
    while True:
        content = render(pieces)
        [tokens] = count_tokens([content])
        if tokens <= budget:
            return Fitted(content, tokens, Packed(pieces, left_out))
        if len(pieces) <= keep:
            return None
        left_out.insert(0, pieces.pop().name)
