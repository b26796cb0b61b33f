"""Mathematical equality through math-verify (sympy).

Runs only in a worker process with a deadline of its own (data/verify/runner.py): math-verify's timeouts use signals,
which work in a main thread only, and a simplification that has left for C code does not hear them.
"""

import logging

from data.records import Prompt


def score(prompt: Prompt, answer: str) -> float:
    """1.0 when the answer's final expression equals the reference, else 0.0.

    The reference goes first: math-verify is not symmetric (gold "(1,2)" refuses "1<x<2", gold "1<x<2" accepts "(1,2)").

    Raises:
        ValueError: the reference holds no expression; no answer to it can be judged.
    """
    reference = _parse(prompt.answer)
    if not reference:
        raise ValueError(f"prompt {prompt.prompt_id}: the reference {prompt.answer[:60]!r} is no mathematical expression")
    return float(_equal(reference, _parse(answer)))


def prepare() -> None:
    """Pays for importing sympy and for math-verify's first parse (1 s: it compiles its expressions then)."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we took its timeouts away; ours are harder
    _equal(_parse("1"), _parse("2"))


def _parse(text: str) -> list:
    """The expressions in `text`, likeliest first. Bare LaTeX is put in dollars: it is looked for inside delimiters only."""
    import math_verify

    bare = "\\" in text and not any(mark in text for mark in ("$", "\\boxed", "\\[", "\\("))
    return math_verify.parse(f"${text}$" if bare else text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _equal(reference: list, given: list) -> bool:
    import math_verify

    return math_verify.verify(reference, given, timeout_seconds=None)
