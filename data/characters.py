"""What a word is, one character at a time.

A word is what survives re-wrapping, quoting, bold type and another case: a run of letters, digits and combining marks, under
NFKC and casefold. Punctuation parts words and leaves nothing behind, underscores and Markdown's marks included, so that
`**Bold**, don't` reads bold, don, t. Two exceptions, each with its reason:

- a run of `+ - / < ^` is a word of its own where the word before it ends, or the word after it begins, with a digit: "3 + 4" and
  "3 - 4" are two exercises. Between other words it is a hyphen or a bullet. `* = > # |` never count, because Markdown
  writes them around numbers too; "3 * 4" is still told from "3 + 4", by what it lacks;
- a character of a script that is written without spaces (Han, kana, Thai, Lao, Burmese, Khmer) is a word each; a
  sentence would be one word otherwise, and no n-gram would ever be found in a longer text.

`spelled` reads a text so, slowly; data/words.py does it for many texts at once.
"""

import functools
import re
import unicodedata

import numpy as np
from numpy.typing import NDArray

UNICODE = unicodedata.unidata_version
"""Of the tables that decide on letters and normal forms; Python 3.11 has 14.0.0."""

SEPARATOR, WORD, OPERATOR, ALONE = range(4)  # classes of characters; a change of class parts words
OPERATORS = {**{sign: sign for sign in "+-/<^"}, "‐": "-", "‑": "-", "–": "-", "−": "-", "÷": "/", "⁄": "/", "∕": "/"}
_DIGITS = "0123456789"
# First and last code points of the scripts without spaces, and of what is written with them.
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3021, 0x30FF), (0x31F0, 0x31FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1B000, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
NUM_CODE_POINTS = 0x40000
"""Planes 4 to 16 hold no letter: private use, tags, nothing. They are separators."""


def character_class(character: str) -> int:
    """Separator, part of a word, operator, or a word alone: what one character is to the boundaries of words."""
    if character in OPERATORS:
        return OPERATOR
    category = unicodedata.category(character)
    if character.isalnum():
        return ALONE if _is_unspaced(ord(character)) else WORD if ord(character) < NUM_CODE_POINTS else SEPARATOR
    # Soft hyphens, joiners, byte order marks (Cf) may stand inside a word, and its normal form has lost them. The zero width
    # space alone parts words by its definition.
    joins = category[0] == "M" or (category == "Cf" and character != "\u200b")
    return WORD if joins and ord(character) < NUM_CODE_POINTS else SEPARATOR


def _is_unspaced(code_point: int) -> bool:
    return any(first <= code_point <= last for first, last in _UNSPACED)


@functools.cache
def class_table() -> NDArray[np.uint8]:
    """uint8 by code point, one entry more for all beyond. 0.1 s, paid by the first text that is not ASCII."""
    return np.array([*(character_class(chr(point)) for point in range(NUM_CODE_POINTS)), SEPARATOR], np.uint8)


def _folded(byte: int) -> int:
    """Separators are 0, operators lie below the digits, letters are small; bytes beyond ASCII are as they are."""
    if byte >= 128:
        return byte
    kind = character_class(chr(byte))
    return 0 if kind == SEPARATOR else 1 + "+-/<^".index(chr(byte)) if kind == OPERATOR else ord(chr(byte).lower())


FOLD = bytes(map(_folded, range(256)))
FIRST_OF_WORDS = ord("0")


def normal_form(word: str) -> str:
    """A raw word as it is compared: NFKC, casefold, without what is no part of a word; operators by their ASCII sign. "" for a
    word of invisible characters alone. Idempotent."""
    if word.isascii():
        return word.lower()
    if all(character in OPERATORS for character in word):
        return "".join(OPERATORS[character] for character in word)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())
    return "".join(character for character in folded if character.isalnum() or _is_visible_mark(character))


def _is_visible_mark(character: str) -> bool:
    # Variation selectors choose a glyph: the digit of a keycap emoji is the digit.
    return unicodedata.category(character)[0] == "M" and not "\ufe00" <= character <= "\ufe0f"


@functools.lru_cache(maxsize=1 << 16)
def normal_bytes(raw: bytes) -> bytes:
    return normal_form(raw.decode("utf-8", "surrogatepass")).encode("utf-8", "surrogatepass")


def spelled(text: str) -> list[tuple[str, int, int]]:
    """(normal form, first, end) of every word of one text, by characters and in plain Python: what `words` must agree with, and
    how single words are shown. first and end are character offsets."""
    classes = "".join(str(character_class(character)) for character in text)
    runs = [match.span() for match in re.finditer("1+|2+|3", classes)]
    found = []
    for number, (first, end) in enumerate(runs):
        if classes[first] == str(OPERATOR):
            before = next((text[stop - 1] for start, stop in reversed(runs[:number]) if classes[start] != str(OPERATOR)), " ")
            after = next((text[start] for start, _ in runs[number + 1 :] if classes[start] != str(OPERATOR)), " ")
            if before not in _DIGITS and after not in _DIGITS:
                continue
        if normal := normal_form(text[first:end]):
            found.append((normal, first, end))
    return found
