"""Does a text end in one cycle, over and over?"""

from configs.filters import LoopFilter
from data.filters.texts import Filtered, said

_NEEDLE = 16
"""Characters of the end that are looked for further up. The last min_characters hold at least two cycles, so that a true
period always brings them back."""


def loop(trace: Filtered, settings: LoopFilter) -> str:
    """`ends_in_loop` when reasoning or answer does: the last min_repeats cycles and at least min_characters."""
    for text in said(trace):
        if ending_period(text, settings.min_repeats, settings.min_characters, settings.max_period):
            return "ends_in_loop"
    return ""


def ending_period(text: str, min_repeats: int, min_characters: int, max_period: int) -> int:
    """Characters of the shortest cycle that `text`, without its last blanks, ends in at least min_repeats times over at least
    min_characters; 0 when there is none. At most one comparison for each place that looks like the end."""
    text = text.rstrip()
    size = len(text)
    if size < min_characters:
        return 0
    needle = text[-min(_NEEDLE, min_characters // 2 or 1) :]
    lowest = size - len(needle) - max_period
    at = text.rfind(needle, max(0, lowest), size - 1)
    while at >= 0:
        period = size - len(needle) - at
        reach = max(min_repeats * period, min_characters)
        # A text that equals itself a period further on is that period, repeated.
        if reach <= size and text[size - reach : size - period] == text[size - reach + period :]:
            return period
        at = text.rfind(needle, max(0, lowest), at + len(needle) - 1)
    return 0
