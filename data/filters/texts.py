"""What a filter sees of a trace."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from data.records import FinishReason, Message

COLUMNS = ("messages", "tools", "raw_text", "finish_reason", "prompt_tokens", "reasoning_tokens", "answer_tokens")
"""All that filters read: whoever judges a segment need not turn its token ids and logprobs into Python."""


class Filtered(Protocol):
    """A data.records.Trace, or any record with COLUMNS."""

    @property
    def messages(self) -> Sequence[Message]: ...
    @property
    def tools(self) -> str: ...
    @property
    def raw_text(self) -> str: ...
    @property
    def finish_reason(self) -> FinishReason: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def reasoning_tokens(self) -> int: ...
    @property
    def answer_tokens(self) -> int: ...


class Said(NamedTuple):
    """What the teacher wrote, apart: a draft in the reasoning is no repetition in the answer."""

    reasoning: str
    answer: str


def said(trace: Filtered) -> Said:
    """Reasoning and answer; of an output whose think block never closed, everything as reasoning."""
    message = trace.messages[-1]
    found = Said(message.get("reasoning_content") or "", message.get("content") or "")
    return found if found.reasoning or found.answer else Said(trace.raw_text, "")


def asked(trace: Filtered) -> list[str]:
    """The prompt's texts, the reasoning of earlier turns included."""
    turns = trace.messages[:-1]
    return [text for turn in turns for text in (turn.get("reasoning_content"), turn.get("content")) if text]


@lru_cache(maxsize=2)
def in_lower_case(text: str) -> str:
    """text.lower(), which two filters in a row want of the same two texts: 5 ms for 500 KB that are not ASCII."""
    return text.lower()
