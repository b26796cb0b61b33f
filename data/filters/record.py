"""Is the record whole: did the model end, is its think block closed, is there an answer?"""

from configs.filters import AnswerPresentFilter, FinishReasonFilter, ThinkTagsFilter
from data.filters.texts import Filtered
from data.structure import CLOSE, OPEN, split_reasoning


def finish_reason(trace: Filtered, settings: FinishReasonFilter) -> str:
    """`length`, `loop` or `abort`. A truncated trace has no answer, even where its last words look like one."""
    return "" if trace.finish_reason == "stop" else trace.finish_reason


def think_tags(trace: Filtered, settings: ThinkTagsFilter) -> str:
    """Why the think block is not opened once and closed once: one of data.structure.Problem."""
    text = trace.raw_text
    if OPEN not in text and CLOSE not in text:
        # No tag at all: a teacher without a think block, or one that never left it. The writer knew the dialect and
        # left the answer empty in the second case.
        return "" if _answer(trace) else "think_unclosed"
    # A prompt that ends in `<think>` leaves none for the output; one that does not leaves it as the first thing said.
    return split_reasoning(text, prompt_opens_think=not text.lstrip().startswith(OPEN)).problem


def answer_present(trace: Filtered, settings: AnswerPresentFilter) -> str:
    """`no_answer` when nothing follows the reasoning."""
    return "" if _answer(trace) else "no_answer"


def _answer(trace: Filtered) -> str:
    return (trace.messages[-1].get("content") or "").strip()
