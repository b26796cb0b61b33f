"""How often does the reasoning begin anew?

The reasoning alone (of a teacher without a think block, the answer): a reference manual in an answer begins 20 passages alike.
"""

import re
from collections import Counter

from configs.filters import RestartsFilter
from data.filters.texts import Filtered, said

# What every announcement below has in it, without the letter that may be a capital: `in` finds it at memory speed and without a
# copy in lower case, and most texts have none.
_STEMS = (
    "tart over", "tarting over", "tart again", "tarting again", "tart afresh", "tart anew", "egin over", "egin again",
    "egin afresh", "egin anew", "cratch", "estart", "重新开始", "从头开始", "重头开始", "从头再来",
)  # fmt: skip
# The writer speaks of itself: `restart the server` and `implemented from scratch` are somebody else's.
_ANNOUNCED = re.compile(
    r"\b(?:let me|let's|let’s|let us|i'll|i’ll|i will|i should|i need to|i have to|i must|time to|ok(?:ay)?,?|wait,?)"
    r" (?:\w+ ){0,2}?"
    r"(?:restart\b(?! the)|(?:start|begin) (?:over|again|afresh|anew|from scratch)\b|starting (?:over|again)\b)"
    r"|重新开始|从头开始|重头开始|从头再来"
)


def restarts(trace: Filtered, settings: RestartsFilter) -> str:
    """`restarts` when the reasoning begins anew more than settings.max_restarts times, one way or the other."""
    reasoning, answer = said(trace)
    text = reasoning or answer
    again = max(announced(text), begun_again(text, settings.opening_characters))
    return "restarts" if again > settings.max_restarts else ""


def announced(text: str) -> int:
    """How often the text says that it starts over."""
    if not any(stem in text for stem in _STEMS):
        return 0
    return sum(1 for _ in _ANNOUNCED.finditer(text.lower()))


def begun_again(text: str, opening_characters: int) -> int:
    """How often the most frequent opening of a long paragraph came back."""
    if len(text) < 2 * opening_characters:
        return 0
    openings = [
        paragraph.lstrip()[:opening_characters] for paragraph in text.split("\n\n") if len(paragraph) >= opening_characters
    ]
    return max(Counter(openings).values(), default=1) - 1
