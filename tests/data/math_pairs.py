"""Answers to mathematics questions as models write them, with seeds instead of files: for the tests and the benchmark.

The shares of reference types are those of 63 consecutive rows at three places of MATH's test file (Hendrycks et al. 2021;
prealgebra, geometry, algebra): 37 integers, 13 fractions, 5 other expressions, 2 decimals, 2 with a unit, 2 intervals, 2 texts.
GSM8K (Cobbe et al. 2021) has integers alone, so that this mix is the harder one for a comparison of numbers.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

_Draw = Callable[[random.Random], str]


class Drawn(NamedTuple):
    """A reference, other right forms of it, and wrong ones."""

    kind: str
    reference: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


def _integer(rng: random.Random) -> Drawn:
    value = rng.choice((rng.randrange(-20, 100), rng.randrange(100, 10_000), rng.randrange(10_000, 9_000_000)))
    return Drawn(
        "integer", str(value), (str(value), str(value), f"{value:,}"),
        (str(value + 1), str(-value or 5), f"\\frac{{{value}}}{{2}}", f"{value}.5", f"{value}\\sqrt{{2}}"),
    )  # fmt: skip


def _fraction(rng: random.Random) -> Drawn:
    below = rng.choice((2, 3, 4, 5, 7, 9, 11, 16, 49))
    above = rng.randrange(1, 60)
    sign = rng.choice(("", "", "-"))
    return Drawn(
        "fraction", rng.choice((f"{sign}\\frac{{{above}}}{{{below}}}", f"{sign}{above}/{below}")),
        (f"{sign}\\frac{{{above}}}{{{below}}}", f"{sign}\\dfrac{{{above}}}{{{below}}}", f"{sign}{above}/{below}",
         f"{sign}\\frac{{{2 * above}}}{{{2 * below}}}", f"{'-' if sign else ''}{above / below:.8f}"),
        (f"{sign}\\frac{{{below}}}{{{above}}}", f"{sign}\\frac{{{above + 1}}}{{{below}}}", f"{above / below:.2f}", str(above)),
    )  # fmt: skip


def _expression(rng: random.Random) -> Drawn:
    a, b = rng.randrange(2, 9), rng.randrange(2, 12)
    return rng.choice((
        Drawn("expression", f"{a}\\sqrt{{{b}}}", (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}", f"{a} \\sqrt {b}"),
              (f"{b}\\sqrt{{{a}}}", f"\\sqrt{{{b}}}", str(a))),
        Drawn("expression", f"{a}x^2-{b}x+1", (f"{a}x^2-{b}x+1", f"1-{b}x+{a}x^2", f"{a}x^{{2}} - {b}x + 1"),
              (f"{a}x^2+{b}x+1", f"{b}x+1", str(a))),
        Drawn("expression", f"{a}\\pi", (f"{a}\\pi", f"{a} \\pi", f"\\pi\\cdot {a}"),
              (f"{a}", f"\\frac{{{a}\\pi}}{{2}}", "\\pi")),
        Drawn("expression", f"{a}+{b}i", (f"{a}+{b}i", f"{b}i+{a}"), (f"{a}-{b}i", str(a + b))),
    ))  # fmt: skip


def _decimal(rng: random.Random) -> Drawn:
    value = rng.choice((f"{rng.randrange(0, 99)}.{rng.randrange(1, 100):02d}", f"-{rng.randrange(1, 9)}.{rng.randrange(1, 999)}"))
    digits = len(value.partition(".")[2])
    whole = value.replace(".", "").lstrip("-0") or "0"
    sign = "-" if value.startswith("-") else ""
    return Drawn(
        "decimal", value, (value, f"{value}0", f"{sign}\\frac{{{whole}}}{{{10**digits}}}", f"{value}0000001"),
        (f"{value}1", value.partition(".")[0], f"{sign or '-'}{value.lstrip('-')}5"),
    )  # fmt: skip


def _unit(rng: random.Random) -> Drawn:
    value = rng.randrange(2, 180)
    reference = rng.choice((f"{value}^\\circ", f"{value}\\text{{ cm}}", f"{value}\\%", f"\\${value}"))
    return Drawn("unit", reference, (reference, str(value), f"{value}\\text{{ units}}"), (str(value + 1), f"{value}x"))


def _interval(rng: random.Random) -> Drawn:
    a, b = sorted(rng.sample(range(-9, 10), 2))
    reference = rng.choice((f"[{a},{b}]", f"({a},{b})", f"[{a},{b})", f"({a}, {b}, 7)", f"{a}, {b}"))
    return Drawn("interval", reference, (reference, reference, reference.replace(",", ", ")),
                 (f"[{a},{b + 1}]", f"({b},{a})", f"{a}", f"{a} < x < {b}"))  # fmt: skip


def _text(rng: random.Random) -> Drawn:
    name = rng.choice(("Evelyn", "even", "Tuesday"))
    return Drawn("text", f"\\text{{{name}}}", (f"\\text{{{name}}}", f"\\text{{ {name}}}"), ("\\text{odd}", name, "3"))


_KINDS: tuple[tuple[Callable[[random.Random], Drawn], int], ...] = (
    (_integer, 37), (_fraction, 13), (_expression, 5), (_decimal, 2), (_unit, 2), (_interval, 2), (_text, 2)
)  # fmt: skip

_STEPS = (
    "First note that $x = {a}$, so the ratio is $\\frac{{{a}}}{{{b}}}$ and we are left with two cases.",
    "We have\n\\[ x^2 - {a}x + {b} = 0, \\]\nwhich factors over the integers.",
    "By the triangle inequality the sum is at most {a}, and equality holds when $n = {b}$.",
    "Let me check: {a} + {b} = {c}, which is what the problem says.",
    "1. **Set up.** Let $n$ be the number of students (there are {a} of them).\n2. **Solve.** Then $n + {b} = {c}$.",
    "The probability of each outcome is 1/{a}; there are {b} of them in all.",
)

BOXES = (
    "\\boxed{%s}",
    "$\\boxed{%s}$",
    "$\\boxed{%s}$.",
    "\\[\n\\boxed{%s}\n\\]",
    "\\[ \\boxed{%s} \\]",
    "$$\\boxed{%s}$$",
    "\\( \\boxed{%s} \\)",
    "Therefore $x = \\boxed{%s}$.",
    "so there are $\\boxed{%s}$ of them.",
    "**Answer:** \\boxed{%s}",
    "**Final Answer**\n\n\\[ \\boxed{%s} \\]",
    "The final answer is $\\boxed{%s}$.",
)
"""How an answer ends that has a box; the last two put words of math-verify's own before it."""

PLAIN = ("%s", "%s.", "The answer is %s.", "$%s$", "\\(%s\\)", "The answer is $%s$.", "**%s**", "= %s", "#### %s")
"""And without one."""


def prose(rng: random.Random) -> str:
    """One to six steps of a solution, 60 to 600 characters."""
    steps = rng.choices(_STEPS, k=rng.randrange(1, 7))
    return "\n\n".join(step.format(a=rng.randrange(2, 30), b=rng.randrange(2, 30), c=rng.randrange(30, 90)) for step in steps)


def draw(rng: random.Random) -> Drawn:
    makers, weights = zip(*_KINDS, strict=True)
    return rng.choices(makers, weights)[0](rng)


def write_up(rng: random.Random, said: str, *, boxed: float = 0.9) -> str:
    """An answer as a chat model gives it: a box nine times in ten, and steps before it two times in three."""
    ending = rng.choice(BOXES if rng.random() < boxed else PLAIN) % said
    return f"{prose(rng)}\n\n{ending}" if rng.random() < 2 / 3 else ending
