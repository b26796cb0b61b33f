"""How much of a text has it said before?

The shares are Gopher's (Rae et al. 2021, section A.1.1 and table A1): what stood before, over what there is. A text said k times
has 1 - 1/k of it, whatever the unit.
"""

import itertools

import numpy as np

from configs.filters import RepetitionFilter
from data.filters.texts import Filtered, said

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_CHARACTERS_PER_WORD = 20
"""More than that, and the text has no spaces to speak of (Chinese, Japanese, base64): characters are counted instead."""


def repetition(trace: Filtered, settings: RepetitionFilter) -> str:
    """`repeated_lines`, `repeated_paragraphs` or `repeated_ngrams` of reasoning or answer, in that order."""
    return next(filter(None, (_reason(text, settings) for text in said(trace))), "")


def _reason(text: str, settings: RepetitionFilter) -> str:
    if len(text) < 2 * settings.min_words:  # a word and its blank take two characters
        return ""
    words = text.split()
    spaced = len(text) <= _CHARACTERS_PER_WORD * len(words)
    if (len(words) if spaced else len(text) // 2) < settings.min_words:
        return ""
    if repeated_share(text.split("\n")) > settings.max_repeated_lines:
        return "repeated_lines"
    if repeated_share(text.split("\n\n")) > settings.max_repeated_paragraphs:
        return "repeated_paragraphs"
    units, size = (words, settings.ngram_words) if spaced else (text, 2 * settings.ngram_words)
    if _most_repeated(units, size) <= settings.max_repeated_ngrams:
        return ""
    return "repeated_ngrams" if repeated_ngrams(units, size) > settings.max_repeated_ngrams else ""


def _most_repeated(words: list[str] | str, size: int) -> float:
    """A bound on repeated_ngrams, for a fifth of its time at 2 KB, and most short texts are below it: every word but the last
    size - 1 begins an n-gram, so there are at least as many different ones as different words, less size - 1."""
    num_ngrams = len(words) - size + 1
    return 1.0 - (len(set(words)) - size + 1) / num_ngrams if num_ngrams > 0 else 0.0


def repeated_share(parts: list[str]) -> float:
    """Share of the parts that stood before, by characters; blanks around them do not count, blank ones neither. By characters
    because half the lines of a program are `}` or `return`."""
    stripped = [part.strip() for part in parts]
    total = sum(map(len, stripped))
    return 1.0 - sum(map(len, set(stripped))) / total if total else 0.0


def repeated_ngrams(words: list[str] | str, size: int) -> float:
    """Share of the n-grams of `size` words (or characters of a string) that stood before; 0.0 when there is none.

    An n-gram is known by 64 bits, a polynomial of its words' numbers: two of the 10^6 of a long trace agree by chance with
    a probability of 10^-7.
    """
    if len(words) < size:
        return 0.0
    ids_W = (_numbered(words) if isinstance(words, list) else _code_points(words)) * _MULTIPLIER
    ids_W ^= ids_W >> np.uint64(29)
    keys_N = ids_W[: len(ids_W) - size + 1].copy()
    for offset in range(1, size):
        keys_N *= _MULTIPLIER
        keys_N += ids_W[offset : len(ids_W) - size + 1 + offset]
    keys_N.sort()
    return float(np.count_nonzero(keys_N[1:] == keys_N[:-1])) / len(keys_N)


def _numbered(words: list[str]) -> np.ndarray:
    """uint64 of shape (W,): each word's number, in the order in which they first stand in the text."""
    numbers = dict(zip(dict.fromkeys(words), itertools.count(1), strict=False))
    return np.fromiter(map(numbers.__getitem__, words), np.uint64, len(words))


def _code_points(text: str) -> np.ndarray:
    """uint64 of shape (characters,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
