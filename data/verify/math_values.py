"""Values as they are written in answers, compared exactly: integers, decimals, fractions, multiples of a root or of pi, pairs
and tuples of them, and polynomials.

Every comparison is math-verify's own verdict or None. Two traps set the bounds: math-verify rounds floats to 6 places (1/3 is
0.333333 to it and 0.33333 is not), and takes a difference for zero that 15 digits do not show.
"""

import re
from fractions import Fraction
from itertools import pairwise
from math import isqrt
from typing import NamedTuple, TypeAlias

_INTEGER = re.compile(r"[-+]?(?:0|[1-9]\d{0,14}|[1-9]\d{0,2}(?:,\d{3}){1,4})", re.ASCII)
_DECIMAL = re.compile(r"[-+]?(?:0|[1-9]\d*)\.\d+", re.ASCII)
_FRACTION = re.compile(r"([-+]?)(?:\\frac(?:\{(-?\d{1,7})\}\{(\d{1,7})\}|(\d)(\d))|(\d{1,7})/(\d{1,7}))", re.ASCII)
_ROOT = r"(?:\\sqrt\{(?P<root%s>\d{1,6})\}|(?P<pi%s>\\pi))"
_MULTIPLE = re.compile(rf"(?P<sign>-?)(?P<times>[1-9]\d{{0,6}})? ?{_ROOT % ('', '')}", re.ASCII)
_PART = re.compile(
    rf"(?P<sign>-?)\\frac\{{(?P<times>[1-9]\d{{0,6}})? ?{_ROOT % ('', '')}\}}\{{(?P<below>[1-9]\d{{0,6}})\}}", re.ASCII
)
_TUPLE = re.compile(r"([(\[])(.+)([)\]])")
# No e, i or capital, which mean something else to math-verify, and no letter that it takes for a unit (`2t` is 2 to it).
_TERM = re.compile(r"(?P<sign>[-+]|^)(?P<times>[1-9]\d{0,6})?(?:(?P<name>[abknpqrxyz])(?:\^(?P<power>[2-9]))?)?", re.ASCII)
_THOUSANDS = re.compile(r"\d{3}", re.ASCII)
_MAX_DIGITS = 15
"""Of a decimal: math-verify's floats have 53 bits."""
_CLOSE = Fraction(1, 10**5)
"""What differs by less than this, relatively, may be equal after a rounding: not for us to say."""


class Numeral(NamedTuple):
    """value x sqrt(root), or value x pi for root 0; root is free of squares. exact: no decimal, which is a float to
    math-verify."""

    value: Fraction
    exact: bool
    root: int = 1


class Tuple(NamedTuple):
    """Numbers in brackets: a point, or the ends of an interval. brackets: the opening and the closing one."""

    brackets: str
    items: tuple[Numeral, ...]


class Polynomial(NamedTuple):
    """Integer coefficients by (variable, exponent), none of them 0; ("", 0) is the constant. At least one has a variable."""

    terms: frozenset[tuple[str, int, int]]


Value: TypeAlias = Numeral | Tuple | Polynomial


def value(text: str) -> Value | None:
    """The number, tuple or polynomial that `text` as a whole is; None for any other form."""
    return numeral(text) or _tuple(text) or _polynomial(text)


def plain_number(text: str) -> bool:
    """An integer or a decimal: reads the same with and without LaTeX's delimiters."""
    return bool(_INTEGER.fullmatch(text) or _DECIMAL.fullmatch(text))


def numeral(text: str) -> Numeral | None:
    """None also for what bare text and LaTeX read differently (`1 234`, `3,4`, `042`)."""
    if _INTEGER.fullmatch(text):
        return Numeral(Fraction(int(text.replace(",", ""))), True)
    if _DECIMAL.fullmatch(text):
        return Numeral(Fraction(text), False) if sum(map(str.isdigit, text)) <= _MAX_DIGITS else None
    return _fraction(text) or _multiple(text)


def _fraction(text: str) -> Numeral | None:
    found = _FRACTION.fullmatch(text)
    if found is None or (found[1] and (found[2] or "").startswith("-")):
        return None
    above, below = found[2] or found[4] or found[6], found[3] or found[5] or found[7]
    return Numeral(Fraction(int(found[1] + above), int(below)), True) if int(below) else None


def _multiple(text: str) -> Numeral | None:
    """Of a root or of pi: `-2\\sqrt{3}`, `\\frac{14\\sqrt{3}}{3}`, `\\frac{\\pi}{2}`."""
    found = _MULTIPLE.fullmatch(text) or _PART.fullmatch(text)
    if found is None:
        return None
    parts = found.groupdict()
    times = Fraction(int(parts["sign"] + (parts["times"] or "1")), int(parts.get("below") or 1))
    if parts["pi"]:
        return Numeral(times, True, 0)
    square, rest = _squares(int(parts["root"]))
    return Numeral(times * square, True, rest)


def _squares(number: int) -> tuple[int, int]:
    """(s, r) with number = s**2 x r and r free of squares; (0, 1) for 0."""
    square = next((root for root in range(isqrt(number), 1, -1) if number % (root * root) == 0), 1) if number else 0
    return square, number // (square * square) if square else 1


def _tuple(text: str) -> Tuple | None:
    found = _TUPLE.fullmatch(text)
    if found is None:
        return None
    parts = [part.strip(" ") for part in found[2].split(",")]
    if len(parts) < 2 or any(_THOUSANDS.fullmatch(part) for part in parts[1:]):  # (1,234) is whatever a thousands' comma is
        return None
    items = tuple(read for part in parts if (read := numeral(part)) is not None)
    return Tuple(found[1] + found[3], items) if len(items) == len(parts) else None


def _polynomial(text: str) -> Polynomial | None:
    """A sum of terms in one variable each: `3x^2-2x+1`, `y+2x`."""
    terms: dict[tuple[str, int], int] = {}
    end = 0
    while end < len(text):
        found = _TERM.match(text, end)
        if found is None or not (found["times"] or found["name"]) or (end and not found["sign"]):
            return None
        key = (found["name"] or "", int(found["power"] or 1) if found["name"] else 0)
        terms[key] = terms.get(key, 0) + int((found["sign"] or "") + (found["times"] or "1"))
        end = found.end()
    left = frozenset((name, power, times) for (name, power), times in terms.items() if times)
    return Polynomial(left) if any(name for name, _, _ in left) else None


def equal(reference: Value, given: Value) -> bool | None:
    """Whether math-verify calls them equal; None where one of its roundings or conversions decides."""
    if isinstance(reference, Numeral) and isinstance(given, Numeral):
        return _equal_numbers(reference, given)
    if isinstance(reference, Tuple) and isinstance(given, Tuple):
        return _equal_tuples(reference, given)
    if isinstance(reference, Polynomial) and isinstance(given, Polynomial):
        return reference == given
    kinds = (reference, given)
    if any(isinstance(kind, Tuple) and not _spread(kind) for kind in kinds) or any(_inexact(kind) for kind in kinds):
        return None
    return False


def _spread(pair: Tuple) -> bool:
    """No two neighbours are the same number: [3,3] is 3."""
    return all(_equal_numbers(*two) is False for two in pairwise(pair.items))


def _inexact(kind: Value) -> bool:
    return isinstance(kind, Numeral) and not kind.exact


def _equal_numbers(one: Numeral, other: Numeral) -> bool | None:
    if one.value == other.value and (one.root == other.root or not one.value):
        return True
    if one.root == other.root == 1 and one.exact and other.exact:
        return False
    if not (one.exact and other.exact) and (one.root, other.root) != (1, 1):
        return None
    size, scale = _apart(one, other)
    return False if size >= _CLOSE * scale else None


def _apart(one: Numeral, other: Numeral) -> tuple[Fraction | float, Fraction | float]:
    """The difference, and the larger of both and 1. Exact without a root; with one, floats are far better than the bound."""
    if one.root == other.root == 1:
        return abs(one.value - other.value), max(1, abs(one.value), abs(other.value))
    first, second = (float(x.value) * (3.141592653589793 if x.root == 0 else x.root**0.5) for x in (one, other))
    return abs(first - second), max(1.0, abs(first), abs(second))


def _equal_tuples(one: Tuple, other: Tuple) -> bool | None:
    """math-verify reads (1,2) as an interval and (2,1) as a point: brackets count between two intervals only."""
    if len(one.items) != len(other.items):
        return None
    if one.brackets != other.brackets:
        return False if _ascends(one) and _ascends(other) else None
    verdicts = [_equal_numbers(*pair) for pair in zip(one.items, other.items, strict=True)]
    return None if None in verdicts else all(verdicts)


def _ascends(pair: Tuple) -> bool:
    return len(pair.items) == 2 and pair.items[0].root == pair.items[1].root == 1 and pair.items[0].value < pair.items[1].value
