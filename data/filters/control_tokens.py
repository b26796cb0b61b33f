"""Does a text hold a word that a tokenizer turns into a control token?

`<|user|>` inside an answer would open a turn of its own when the trace is rendered and tokenised: the student would learn to
write its user's lines. Which words those are is the tokenizers' to say (the teacher's and the student's); tracestill.py brings
them to the build (data.asking.ControlWords). What a prompt holds was settled when it was made.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from configs.filters import ControlTokensFilter, FilterSettings
from data.filters.texts import Filtered, said


def has_control_tokens(chosen: Sequence[FilterSettings]) -> bool:
    return any(isinstance(one, ControlTokensFilter) for one in chosen)


def with_control_tokens(chosen: Sequence[FilterSettings], tokens: Iterable[str]) -> tuple[FilterSettings, ...]:
    """The same settings; a control_tokens filter among them also looks for `tokens`, sorted, each once."""
    added = set(tokens)
    return tuple(
        one.model_copy(update={"tokens": tuple(sorted(added.union(one.tokens)))}) if isinstance(one, ControlTokensFilter) else one
        for one in chosen
    )


def control_tokens(trace: Filtered, settings: ControlTokensFilter) -> str:
    """`control_token` when reasoning or answer holds one of settings.tokens; a call's own are allowed where there are tools."""
    look = _look_for(settings.tokens, settings.tool_tokens if trace.tools else ())
    return "control_token" if any(look.found_in(text) for text in said(trace)) else ""


class Look(NamedTuple):
    """beginnings: of which one stands in every text that holds a token. `in` is a hundred times faster than the pattern."""

    beginnings: tuple[str, ...]
    pattern: re.Pattern[str]

    def found_in(self, text: str) -> bool:
        return any(beginning in text for beginning in self.beginnings) and self.pattern.search(text) is not None


@lru_cache(maxsize=16)
def _look_for(tokens: tuple[str, ...], allowed: tuple[str, ...]) -> Look:
    wanted = set(tokens).difference(allowed)
    return Look(tuple(sorted({token[:3] for token in wanted})), re.compile(_any_of(wanted) if wanted else r"(?!)"))


def _any_of(words: Iterable[str]) -> str:
    """A pattern in which what words share is tried once: one branch a word takes 740 ms instead of 30 for 500 KB of `<|<|<|` and
    256 reserved words."""
    rests: dict[str, set[str]] = {}
    for word in words:
        if not word:
            return ""
        rests.setdefault(word[0], set()).add(word[1:])
    return f"(?:{'|'.join(re.escape(first) + _any_of(rests[first]) for first in sorted(rests))})"
