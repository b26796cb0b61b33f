import itertools
import math

import numpy as np
import pytest

from configs.errors import UnusableInput
from student.grades import Grade, GradedItem
from student.paired import difference, discordant, mcnemar, quotient

RIGHT, WRONG, DECLINED = Grade.CORRECT, Grade.INCORRECT, Grade.NOT_ATTEMPTED


def graded(grades: str, *, known: bool | None = None, samples: int = 1) -> list[GradedItem]:
    """C, I or N an attempt."""
    of = {"C": RIGHT, "I": WRONG, "N": DECLINED}
    return [
        GradedItem("x", known, of[letter], 4, 6, "stop", f"item {number // samples}", number % samples)
        for number, letter in enumerate(grades)
    ]


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 1), (5, 5), (9, 2), (0, 8)])
def test_mcnemar_equals_counting_every_way_the_coins_can_fall(first: int, second: int) -> None:
    coins = list(itertools.product((0, 1), repeat=first + second))
    as_rare = [sum(way) <= min(first, second) or sum(way) >= max(first, second) for way in coins]
    assert mcnemar(first, second) == pytest.approx(sum(as_rare) / len(coins), abs=1e-12)


def test_mcnemar_of_many_items_is_exact_and_finite() -> None:
    assert mcnemar(5000, 5000) == 1.0 and 0.0 < mcnemar(3000, 2000) < 1e-40


def test_a_difference_is_that_of_the_figures_and_names_its_test() -> None:
    found = difference(graded("CCCCCCCCII"), graded("CCCIIIIIII"))
    assert found.value == pytest.approx(0.5, abs=1e-9) and found.num_items == 10
    assert (found.test, found.p) == ("exact McNemar", pytest.approx(2 / 2**5, abs=1e-12))  # five items only the first got right
    assert discordant(graded("CCI"), graded("ICC")) == (1, 1)
    assert found.interval is not None and 0.0 < found.interval.low < 0.5 < found.interval.high


def test_pairing_takes_the_difficulty_of_the_items_out() -> None:
    """Same figures; where the models agree on all but one item, nothing is left to doubt but that item."""
    same, other = graded("CCCCCIIIII"), graded("CCCCIIIIII")
    swapped = [item.__class__(**{name: getattr(item, name) for name in item.__slots__}) for item in graded("IIIIICCCCI")]
    close, apart = difference(same, other).interval, difference(same, swapped).interval
    assert close is not None and apart is not None
    assert close.high - close.low < 0.5 * (apart.high - apart.low)


def test_the_interval_equals_a_bootstrap_written_out() -> None:
    first, second = graded("CICCIICC", samples=2), graded("IICCCIIC", samples=2)
    drawn_RG = np.random.default_rng(5).integers(0, 4, (4000, 4))
    right = [
        [[item.grade is RIGHT for item in items if item.item == f"item {number}"] for number in range(4)]
        for items in (first, second)
    ]
    values = sorted(np.mean([np.mean(right[0][g]) - np.mean(right[1][g]) for g in drawn_G]) for drawn_G in drawn_RG)
    found = difference(first, second, seed=5)
    assert found.test == "paired bootstrap" and found.value == pytest.approx(5 / 8 - 4 / 8, abs=1e-9)
    assert found.interval is not None
    assert found.interval.low == pytest.approx(values[int(0.025 * 3999)], abs=1e-12)
    assert found.interval.high == pytest.approx(values[math.ceil(0.975 * 3999)], abs=1e-12)
    below, above = sum(value <= 0 for value in values), sum(value >= 0 for value in values)
    assert found.p == pytest.approx(min(1.0, 2 * (min(below, above) + 1) / 4001), abs=1e-12)


def test_a_quotient_is_that_of_the_figures_and_missing_over_nothing() -> None:
    found = quotient(graded("CCCCCCCCII"), graded("CCCCCCCCCI"))
    assert found.value == pytest.approx(8 / 9, abs=1e-9) and found.interval is not None and found.interval.low < 8 / 9
    assert quotient(graded("CC"), graded("II")).value is None


def test_closed_book_figures_are_compared_too() -> None:
    found = difference(graded("CIINN", known=True), graded("CNNNI", known=True), "hallucination_rate")
    assert found.value == pytest.approx(2 / 4 - 1 / 4, abs=1e-9) and found.test == "paired bootstrap"
    assert difference(graded("CI"), graded("CC"), "hallucination_rate").value is None  # no closed book


def test_models_that_answered_other_items_are_not_compared() -> None:
    with pytest.raises(UnusableInput, match="2 attempts only the first has, 0 only the second"):
        difference(graded("CCCC"), graded("CC"))
    with pytest.raises(UnusableInput, match="0 attempts only the first has, 4 only the second"):
        difference(graded("CCCC"), graded("CCCCCCCC", samples=2))
    with pytest.raises(UnusableInput, match="needs named items"):
        difference([GradedItem("x", None, RIGHT, 4, 6, "stop")] * 2, graded("CC"))
