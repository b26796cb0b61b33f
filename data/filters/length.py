"""Is it too long, or too short?"""

from configs.filters import LengthFilter
from data.filters.texts import Filtered


def length(trace: Filtered, settings: LengthFilter) -> str:
    """`too_long` (prompt, reasoning and answer), or `reasoning_too_short`, `answer_too_long` and so on, in that order. Traces are
    dropped whole, never cut."""
    if trace.prompt_tokens + trace.reasoning_tokens + trace.answer_tokens > settings.max_tokens:
        return "too_long"
    return _part(
        "reasoning", trace.reasoning_tokens, settings.min_reasoning_tokens, settings.max_reasoning_tokens
    ) or _part("answer", trace.answer_tokens, settings.min_answer_tokens, settings.max_answer_tokens)  # fmt: skip


def _part(name: str, num_tokens: int, least: int, most: int | None) -> str:
    if num_tokens < least:
        return f"{name}_too_short"
    return f"{name}_too_long" if most is not None and num_tokens > most else ""
