"""Filters: what makes a trace unfit to be trained on, whatever its answer. Pure, versioned, one countable reason each.

A filter writes a verdict and deletes nothing: a dataset is a view, and another recipe may look again. Few of them on
purpose; no answer filter helped significantly in 1,000 ablations (OpenThoughts3, arXiv 2506.04178), and what these
four catch is not bad reasoning but broken records.
"""

from collections.abc import Callable
from typing import NamedTuple

from configs.schema import Data
from data.records import Trace
from data.structure import CLOSE, OPEN, split_reasoning


class Filter(NamedTuple):
    """apply returns "" for a trace that may stay and the reason otherwise. version goes into the verdict file's name:
    raise it when a change of the code may change a verdict."""

    apply: Callable[[Trace, Data], str]
    version: int


def finish_reason(trace: Trace, settings: Data) -> str:
    """`length` or `abort`. A truncated trace has no answer, even where its last words look like one."""
    return "" if trace.finish_reason == "stop" else trace.finish_reason


def think_tags(trace: Trace, settings: Data) -> str:
    """Why the think block is not opened once and closed once: one of data.structure.Problem."""
    text = trace.raw_text
    if OPEN not in text and CLOSE not in text:
        # No tag at all: a teacher without a think block, or one that never left it. The writer knew the dialect and
        # left the answer empty in the second case.
        return "" if _said(trace) else "think_unclosed"
    # A prompt that ends in `<think>` leaves none for the output; one that does not leaves it as the first thing said.
    return split_reasoning(text, prompt_opens_think=not text.lstrip().startswith(OPEN)).problem


def answer_present(trace: Trace, settings: Data) -> str:
    """`no_answer` when nothing follows the reasoning."""
    return "" if _said(trace) else "no_answer"


def length(trace: Trace, settings: Data) -> str:
    """`too_long` above settings.max_trace_tokens of prompt, reasoning and answer. Traces are dropped whole, never cut."""
    num_tokens = trace.prompt_tokens + trace.reasoning_tokens + trace.answer_tokens
    return "too_long" if num_tokens > settings.max_trace_tokens else ""


def _said(trace: Trace) -> str:
    return trace.messages[-1].get("content", "").strip()


# In the order in which they decide a trace's reason.
FILTERS: dict[str, Filter] = {
    "finish_reason": Filter(finish_reason, 1),
    "think_tags": Filter(think_tags, 1),
    "answer_present": Filter(answer_present, 1),
    "length": Filter(length, 1),
}
