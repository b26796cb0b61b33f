"""The quick reading of mathematics against math-verify itself, which it must never contradict."""

import random
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.verify import math, math_reading
from data.verify.math_reading import final_box, read
from data.verify.math_values import numeral, value
from tests.data.make_run import make_prompt
from tests.data.math_pairs import PLAIN, draw, write_up


@pytest.fixture(scope="module", autouse=True)
def _ready() -> None:
    math.prepare()


def slow(reference: str, answer: str) -> float:
    """math-verify alone: no box is looked for, nothing is remembered."""
    return float(math._equal(math._parse(reference), math._parse(answer)))


def hold_against_math_verify(pairs: list[tuple[str, str]]) -> int:
    """How many of the pairs needed no sympy. Asserts that every verdict is math-verify's."""
    settled = 0
    for reference, answer in pairs:
        prompt = make_prompt("q", reference, verifier="math")
        expected, at_once = slow(reference, answer), math.quick(prompt, answer)
        assert at_once in (None, expected), (reference, answer)
        assert math.score(prompt, answer) == expected, (reference, answer)
        settled += at_once is not None
    return settled


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", "42"),
        ("1,234.5", "1,234.5"),
        ("50%", "50%"),
        ("$5", "$5"),
        ("It is 42.", "It is 42."),
        ("Evelyn", "Evelyn"),
        ("12 apples", "12 apples"),
        ("$x$", "$x$"),
        ("x^2+1", "$x^2+1$"),
        ("(1,2)", "$(1,2)$"),
        ("2pi", "$2\\pi$"),
        ("3, 4", "$3, 4$"),
        ("1e5", "$1e5$"),
        ("\\frac{1}{2}", "$\\frac{1}{2}$"),
        ("\\$14", "$\\$14$"),
        ("**42**", "42"),
        ("**x^2+1**", "$x^2+1$"),
        ("**$x$**", "**$x$**"),
        ("", ""),
    ],
)
def test_bare_expressions_are_read_as_latex_and_prose_is_left_alone(text: str, expected: str) -> None:
    assert read(text) == expected


@pytest.mark.parametrize(
    ("reference", "wrong"),
    [("2pi", "2"), ("3, 4", "4"), ("1e5", "1"), ("x = 2 + y", "2"), ("x^2+1", "1"), ("2\\sqrt{3}", "2"), ("(1,2)", "2")],
)
def test_no_number_is_picked_out_of_a_bare_reference(reference: str, wrong: str) -> None:
    prompt = make_prompt("q", reference, verifier="math")
    assert math.score(prompt, reference) == 1.0
    assert math.score(prompt, wrong) == 0.0 and math.score(prompt, f"\\boxed{{{wrong}}}") == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so \\boxed{42}.", "42"),
        ("$x = \\boxed{ \\frac{1}{2} }$ apples", "\\frac{1}{2}"),
        ("The final answer is $\\boxed{42}$.", "42"),
        ("**Final Answer**\n\\[ \\boxed{[1,9]} \\]", "[1,9]"),
        ("no box", None),
        ("\\boxed{1} or \\boxed{2}", None),
        ("\\boxed{42", None),
        ("\\boxed 42", None),
        ("\\boxed{}", None),
        ("\\boxed{42}\\%", None),
        ("\\boxed{42} percent", None),
        ("\\boxed{42}. The final answer is 5.", None),
        ("The final answer is $3$, \\boxed{42}", None),
        ("The final answer is 5. I hope it is correct. \\boxed{42}", None),
        ("\\boxed{42} The final answer is above.", None),
        ("\\boxed{a$b}", None),
        ("in [ \\boxed{[1, 2] } ]", None),
    ],
)
def test_a_box_counts_where_it_is_the_only_place_to_look(text: str, expected: str | None) -> None:
    assert final_box(text) == expected


@pytest.mark.parametrize(
    ("text", "value", "exact"),
    [
        ("42", Fraction(42), True),
        ("-1,234,567", Fraction(-1234567), True),
        ("+5", Fraction(5), True),
        ("3.50", Fraction(7, 2), False),
        ("\\frac{3}{6}", Fraction(1, 2), True),
        ("-\\frac{1}{3}", Fraction(-1, 3), True),
        ("\\frac{-1}{3}", Fraction(-1, 3), True),
        ("\\frac12", Fraction(1, 2), True),
        ("-7/2", Fraction(-7, 2), True),
    ],
)
def test_a_numeral_has_its_exact_value(text: str, value: Fraction, exact: bool) -> None:
    assert numeral(text) == (value, exact, 1)


NO_NUMERALS = [
    "",
    "042",
    "1,23",
    "1 234",
    "3,4",
    ".5",
    "5.",
    "1e5",
    "1/0",
    "\\frac{1}{0}",
    "-\\frac{-1}{2}",
    "٤",
    "9" * 16,
    f"0.{'1' * 15}",
]


@pytest.mark.parametrize("text", NO_NUMERALS)
def test_what_two_readers_might_read_differently_is_no_numeral(text: str) -> None:
    assert numeral(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2\\sqrt{3}", (Fraction(2), True, 3)),
        ("\\sqrt{12}", (Fraction(2), True, 3)),
        ("-\\sqrt{9}", (Fraction(-3), True, 1)),
        ("\\frac{14\\sqrt{3}}{3}", (Fraction(14, 3), True, 3)),
        ("\\frac{\\pi}{2}", (Fraction(1, 2), True, 0)),
        ("3 \\pi", (Fraction(3), True, 0)),
        ("[1, 2)", ("[)", ((Fraction(1), True, 1), (Fraction(2), True, 1)))),
        ("3x^2-2x+1", (frozenset({("x", 2, 3), ("x", 1, -2), ("", 0, 1)}),)),
        ("1+y-x+x", (frozenset({("y", 1, 1), ("", 0, 1)}),)),
        ("x-x", None),
        ("2t", None),
        ("2e", None),
        ("xy", None),
        ("x+", None),
        ("x^12", None),
        ("(1,234)", None),
        ("(1, x)", None),
        ("(1)", None),
        ("2\\sqrt{x}", None),
        ("\\sqrt[3]{8}", None),
    ],
)
def test_roots_multiples_of_pi_and_tuples_have_values_too(text: str, expected: object) -> None:
    assert value(text) == expected


# --- the same verdicts -------------------------------------------------------------------------------------------

_WHOLE = st.integers(-(10**9), 10**9)
_NUMERALS = st.one_of(
    _WHOLE.map(str),
    _WHOLE.map("{:,}".format),
    st.decimals(-(10**6), 10**6, places=3, allow_nan=False).map(lambda value: f"{value:f}"),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(lambda pair: f"\\frac{{{pair[0]}}}{{{pair[1]}}}"),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(lambda pair: f"{pair[0]}/{pair[1]}"),
)
_PLACES = st.sampled_from(
    ("%s", "%s.", "$%s$", "\\(%s\\)", "\\boxed{%s}", "so $x = \\boxed{%s}$ is it", "The final answer is \\[\\boxed{%s}\\]")
)


@settings(max_examples=60, deadline=None)
@given(_NUMERALS, _NUMERALS, _PLACES, st.booleans())
def test_numbers_are_compared_as_math_verify_compares_them(one: str, other: str, place: str, equal: bool) -> None:
    hold_against_math_verify([(one, place % (one if equal else other))])


def surd_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Roots, multiples of pi, tuples and polynomials in several spellings, a third of them about another number."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        a, b, c = rng.randrange(1, 9), rng.choice((2, 3, 4, 5, 6, 8, 12, 18)), rng.randrange(1, 9)
        forms = rng.choice((
            [f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}", f"\\frac{{{2 * a}\\sqrt{{{b}}}}}{{2}}"],
            [f"{a}\\pi", f"{a} \\pi", f"\\frac{{{3 * a}\\pi}}{{3}}"],
            [f"({a},{b})", f"({a}, {b})", f"\\left({a}, {b}\\right)"],
            [f"[-{a},{b}]", f"[-{a}, {b}]", f"\\left[-{a},{b}\\right]"],
            [f"({a},{b},-{c})", f"({a}, {b}, -{c})"],
            [f"{a}x^2-{b}x+{c}", f"{a}x^2 - {b}x + {c}", f"{a}x^{{2}} - {b}x + {c}", f"{c}-{b}x+{a}x^2", f"{a}x^2-{b}x+{c}+y-y"],
            [f"{a}y-{b}", f"-{b}+{a}y", f"y+{a}y-y-{b}"],
            [f"x = {a}", f"x={a}"],
        ))  # fmt: skip
        said = rng.choice(
            (rng.choice(forms), rng.choice(forms), f"{c}\\sqrt{{{b}}}", f"({b}, {a})", f"[{a},{b}]", str(a), f"{a}.0")
        )
        found.append((rng.choice(forms), rng.choice(("%s", "$%s$", "\\boxed{%s}")) % said))
    return found


def near_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Numbers in two forms that are equal, or differ in the last places: where roundings could make a difference."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        above, below = rng.randrange(-999, 1000), rng.choice((1, 2, 3, 4, 5, 7, 8, 10, 16, 25, 64, 100, 1000))
        exact = Fraction(above, below)
        off = rng.choice((0, 0, 0, 1, -1)) * Fraction(1, 10 ** rng.randrange(1, 9))
        forms = [f"\\frac{{{above}}}{{{below}}}", f"{above}/{below}", f"{float(exact + off):.8f}", f"{float(exact + off):.3f}"]
        found.append((rng.choice(forms), f"\\boxed{{{rng.choice(forms)}}}"))
    return found


def written_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """References and write-ups of MATH's kinds, with words around them that math-verify looks for."""
    rng = random.Random(seed)
    after = (
        "\n\nI hope it is correct.",
        " percent",
        "%",
        " and $y = 3$.",
        "\n\nThe final answer is 5.",
        " \\frac{1}{2}",
        " [1, 2] ",
    )
    before = ("The final answer is 5. I hope it is correct. ", "Final answer: it is $3$, ", "Answer: 7. ", "See [ 3 ] here: ")
    found = []
    for _ in range(count):
        drawn = draw(rng)
        answer = write_up(rng, rng.choice(drawn.right if rng.random() < 0.6 else drawn.wrong))
        answer += rng.choice(after) if rng.random() < 0.15 else ""
        found.append((drawn.reference, (rng.choice(before) if rng.random() < 0.1 else "") + answer))
    return found


def test_a_few_hundred_answers_get_the_verdict_of_math_verify() -> None:
    assert hold_against_math_verify(near_pairs(60, 1) + surd_pairs(60, 1) + written_pairs(120, 2)) > 110


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3, 9))
def test_six_thousand_answers_get_the_verdict_of_math_verify(seed: int) -> None:
    assert hold_against_math_verify(near_pairs(200, seed) + surd_pairs(300, seed) + written_pairs(500, seed)) > 450


@pytest.mark.parametrize(
    "place", [*PLAIN, "The answer is **%s**.", "Answer: %s", "Answer: $%s$.", "The final answer is %s.", "= $%s$"]
)
def test_a_number_and_nothing_else_is_read_as_math_verify_reads_it(place: str) -> None:
    numbers = ("7", "-7", "0", "1,234", "-12.50", "0.5", "1234567", "+3")
    settled = hold_against_math_verify([(number, place % said) for number in ("7", "-12.5", "1234") for said in numbers])
    assert settled >= 20


def test_the_reference_goes_first_whatever_the_short_cut() -> None:
    assert math.score(make_prompt("q", "$1<x<2$", verifier="math"), "\\boxed{(1,2)}") == 1.0
    assert math.score(make_prompt("q", "$(1,2)$", verifier="math"), "\\boxed{1<x<2}") == 0.0


def test_a_box_that_is_no_expression_leaves_the_words_around_it_to_math_verify() -> None:
    prompt = make_prompt("q", "5", verifier="math")
    answer = "The answer is 5. \\boxed{5.}"
    assert math_reading.final_box(answer) == "5." and math.score(prompt, answer) == slow("5", answer)


def test_ten_thousand_characters_are_read_in_a_millisecond() -> None:
    """The parent reads every answer itself; nothing in one may make that slow."""
    hostile = ["\\boxed{" * 1400, "{" * 10_000, "$" * 10_000, " [" * 5000, " " * 10_000 + "\\boxed{1}", "9" * 10_000]
    hostile += ["final answer " * 800 + "\\boxed{1}", "\\boxed{" + "9" * 9990 + "}", "\\frac{" * 1600, "x" * 9990 + "\\boxed{1}"]
    for text in hostile:
        started = time.process_time()
        for _ in range(20):
            math_reading.quick("7", text)
        assert (time.process_time() - started) / 20 < 0.02, text[:20]
