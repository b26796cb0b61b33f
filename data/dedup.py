"""Exact deduplication: the same conversation with the same reasoning and answer, up to whitespace, is kept once."""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from data.records import Message, digest

VERSION = 1


class Keyed(NamedTuple):
    """A trace and the hash of everything in it that training would see."""

    trace_id: str
    key: str


def conversation_key(messages: Sequence[Message]) -> str:
    """Hash over every turn's role, content and reasoning, with runs of whitespace made one.

    Case and punctuation count: two traces that differ in them are two lessons for a byte-level or BPE student.
    """
    return digest(
        [[message.get(part, "") and " ".join(message.get(part, "").split()) for part in _PARTS] for message in messages]
    )


_PARTS = ("role", "content", "reasoning_content")


def duplicates(traces: Iterable[Keyed], eligible: AbstractSet[str]) -> set[str]:
    """The trace_ids that repeat an earlier one. `traces` come in log order; the first *eligible* copy is the original.

    A copy that another judgement has turned down (truncated, say) is neither an original nor a duplicate, so that
    dropping it can never take its healthy twin along.
    """
    seen: set[str] = set()
    repeated = set()
    for trace_id, key in traces:
        if trace_id not in eligible:
            continue
        if key in seen:
            repeated.add(trace_id)
        seen.add(key)
    return repeated
