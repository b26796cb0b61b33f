"""What a model said, taken apart: reasoning inside the think tags, answer after them, and what is wrong with the tags.

Pure string work on the decoded output. Nothing is repaired: an output that is not well formed keeps whatever can be
read off it, and `problem` says why it should not be trained on. The one thing that is never guessed is an answer: when
the think block does not close there is none, whatever the text inside it looks like.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Literal, NamedTuple, Protocol

OPEN, CLOSE = "<think>", "</think>"

Problem = Literal["", "think_unclosed", "think_reopened", "think_reclosed", "think_misplaced"]
"""Why a text is not one closed think block with an answer after it; "" when it is, or when there is no block at all."""


class Parsed(NamedTuple):
    """reasoning and answer are stripped of surrounding whitespace, which belongs to the template; inside they are verbatim."""

    reasoning: str
    answer: str
    problem: Problem


def split_reasoning(text: str, *, prompt_opens_think: bool) -> Parsed:
    """The reasoning and the answer of one output.

    prompt_opens_think: the generation prompt already ended in `<think>` (GLM), so that `text` starts inside the block.

    - never closed: reasoning and answer are both "" (`think_unclosed`);
    - opened or closed a second time: split at the first `</think>`, with that problem (`think_reopened`, `think_reclosed`);
    - closed without having been opened, or opened after other text: likewise (`think_misplaced`);
    - no tag at all where the model opens the block itself: a plain answer, no problem.
    """
    body, problem = _enter_block(text, prompt_opens_think)
    if body is None:
        return Parsed("", text.strip(), "")
    reasoning, close, answer = body.partition(CLOSE)
    if not close:
        return Parsed("", "", "think_unclosed")
    if not problem and OPEN in reasoning + answer:
        problem = "think_reopened"
    if not problem and CLOSE in answer:
        problem = "think_reclosed"
    return Parsed(reasoning.strip(), answer.strip(), problem)


def _enter_block(text: str, prompt_opens_think: bool) -> tuple[str | None, Problem]:
    """The text from the first character of the think block on, or None when there is no block."""
    if prompt_opens_think:
        return text, ""
    before, opened, body = text.partition(OPEN)
    if opened and CLOSE not in before:
        return body, "think_misplaced" if before.strip() else ""
    if CLOSE in text:
        return text, "think_misplaced"
    return None, ""


class Encoder(Protocol):
    """The one thing that is needed of a tokenizer here."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...


def count_reasoning_tokens(ids: Sequence[int], tokenizer: Encoder, *, prompt_opens_think: bool) -> int:
    """Generated ids up to and including the first `</think>`; all of them when the block never closes, none without one.

    Counted from ids: servers that put `<think>` into the prompt report 0 reasoning tokens for the same output.
    """
    close, opening = _tag_ids(tokenizer)
    if (end := _find(ids, close)) is not None:
        return end + len(close)
    return len(ids) if prompt_opens_think or _find(ids, opening) is not None else 0


@cache
def _tag_ids(tokenizer: Encoder) -> tuple[list[int], list[int]]:
    """Of `</think>` and of `<think>`."""
    return tokenizer.encode(CLOSE, add_special_tokens=False), tokenizer.encode(OPEN, add_special_tokens=False)


def _find(ids: Sequence[int], part: Sequence[int]) -> int | None:
    """First position of `part` in `ids`. A tag is one id in every tokenizer we met; a tag of several ids works too."""
    wanted, start = list(part), 0
    with suppress(ValueError):  # index gives up
        while True:  # from one first id to the next: a comparison at every position took 2 ms of 4,600 ids
            start = ids.index(wanted[0], start)
            if list(ids[start : start + len(wanted)]) == wanted:
                return start
            start += 1
    return None
