"""Mathematical equality: numbers at once and exactly (data/verify/math_reading.py), everything else through math-verify.

math-verify (sympy) runs only in a worker process with a deadline of its own (data/verify/runner.py): its timeouts use
signals, which work in a main thread only, and a simplification that has left for C code does not hear them.
"""

import functools
import logging

from data.records import Prompt
from data.verify import math_reading

VERSION = 2
"""2: a bare expression (`x^2+1`, `(1,2)`, `2pi`) is read as LaTeX; version 1 picked a number out of it, or nothing."""
_REMEMBERED = 4096
"""Verdicts and references kept in a worker: the samples of one prompt end in few different boxes."""


def score(prompt: Prompt, answer: str) -> float:
    """1.0 when the answer's final expression equals the reference, else 0.0.

    The reference goes first: math-verify is not symmetric (gold "(1,2)" refuses "1<x<2", gold "1<x<2" accepts "(1,2)").

    Raises:
        ValueError: the reference holds no expression; no answer to it can be judged.
    """
    if not _reference(prompt.answer):
        raise ValueError(f"prompt {prompt.prompt_id}: the reference {prompt.answer[:60]!r} is no mathematical expression")
    box = math_reading.final_box(answer)
    verdict = None if box is None else _boxed(prompt.answer, box)
    return float(_equal(_reference(prompt.answer), _parse(answer)) if verdict is None else verdict)


def quick(prompt: Prompt, answer: str) -> float | None:
    """`score` where it needs no sympy: a few microseconds. Takes for granted that the reference passed its self-check."""
    verdict = math_reading.quick(prompt.answer, answer)
    return None if verdict is None else float(verdict)


def prepare() -> None:
    """Pays for importing sympy and for math-verify's first parse (1 s: it compiles its expressions then)."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we took its timeouts away; ours are harder
    _equal(_parse("1"), _parse("2"))


@functools.lru_cache(_REMEMBERED)
def _reference(text: str) -> list:
    return _parse(text)


@functools.lru_cache(_REMEMBERED)
def _boxed(reference: str, box: str) -> bool | None:
    """The verdict on every answer that ends in this box; None when the box is no expression, and the words around it count."""
    given = _parse(f"\\boxed{{{box}}}")
    return None if not given or isinstance(given[0], str) else _equal(_reference(reference), given)


def _parse(text: str) -> list:
    """The expressions in `text`, likeliest first, and the text of the first."""
    import math_verify

    return math_verify.parse(math_reading.read(text), parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _equal(reference: list, given: list) -> bool:
    """math-verify takes what it cannot compare for unequal. Memory that ran out is no comparison: it is raised."""
    import math_verify

    try:
        return math_verify.verify(reference, given, timeout_seconds=None, raise_on_error=True)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the first pair failed; the others still count
        return math_verify.verify(reference, given, timeout_seconds=None)
