import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student.scoring import (
    Grade,
    GradedItem,
    abstention_rate,
    accuracy,
    bootstrap_ratio,
    grade_answer,
    hallucination_interval,
    hallucination_rate,
    measure,
    omniscience_index,
)

C, WRONG, P, NA, U = Grade.CORRECT, Grade.INCORRECT, Grade.PARTIAL, Grade.NOT_ATTEMPTED, Grade.UNGRADED


def item(
    task: str, known: bool | None, grade: Grade, reasoning: int = 10, finish: Literal["stop", "length", "abort"] = "stop"
) -> GradedItem:
    return GradedItem(task, known, grade, reasoning, reasoning + 2, finish)


# 4 sums (3 right, one cut), 2 counts (1 right), 3 known facts (1 right, 1 declined, 1 wrong), 5 unknown (3 declined, 2 made up)
FIXTURE = [
    *[item("chain_sum", None, C, 30)] * 3,
    item("chain_sum", None, WRONG, 64, "length"),
    item("letter_counting", None, C, 20),
    item("letter_counting", None, WRONG, 20),
    item("facts/metals", True, C, 5),
    item("facts/metals", True, NA, 5),
    item("facts/colours", True, WRONG, 5),
    *[item("facts/metals", False, NA, 5)] * 3,
    *[item("facts/animals", False, WRONG, 5)] * 2,
]


def test_every_figure_of_a_fixture_equals_the_one_computed_by_hand() -> None:
    figures = measure(FIXTURE)
    assert figures.accuracy == pytest.approx(5 / 9, abs=1e-9)  # 4 of 6 reasoning items and 1 of 3 known facts
    assert figures.by_family == pytest.approx({"chain_sum": 0.75, "facts": 1 / 3, "letter_counting": 0.5}, abs=1e-9)
    assert figures.hallucination_rate == pytest.approx(3 / 7, abs=1e-9)  # I 3, NA 4, P 0
    assert figures.abstention_rate == pytest.approx(4 / 8, abs=1e-9)
    assert figures.omniscience_index == pytest.approx(100 * (1 - 3) / 8, abs=1e-9)
    assert figures.unknown_abstention_rate == pytest.approx(3 / 5, abs=1e-9)
    assert figures.over_refusal_rate == pytest.approx(1 / 3, abs=1e-9)
    assert figures.reasoning_tokens_per_correct == pytest.approx((90 + 64 + 40 + 15) / 5, abs=1e-9)
    assert figures.truncation_rate == pytest.approx(1 / 14, abs=1e-9)
    assert (figures.num_items, figures.num_answerable, figures.num_known, figures.num_unknown) == (14, 9, 3, 5)
    assert figures.grades == {"correct": 5, "incorrect": 5, "not_attempted": 4}


def test_partial_answers_are_missed_ones_but_not_made_up() -> None:
    assert hallucination_rate([C, C, WRONG, P, P, NA]) == pytest.approx(1 / 4, abs=1e-9)
    assert accuracy([C, C, WRONG, P, P, NA]) == pytest.approx(2 / 6, abs=1e-9)
    assert omniscience_index([C, C, WRONG, P, P, NA]) == pytest.approx(100 / 6, abs=1e-9)


def test_an_ungraded_item_earns_nothing_and_hallucinates_nothing() -> None:
    grades = [C, WRONG, NA, U]
    assert accuracy(grades) == pytest.approx(1 / 4, abs=1e-9)
    assert abstention_rate(grades) == pytest.approx(1 / 4, abs=1e-9)
    assert hallucination_rate(grades) == pytest.approx(1 / 2, abs=1e-9)


def test_a_model_that_always_declines_does_not_hallucinate_and_is_never_accurate() -> None:
    figures = measure([item("facts/metals", known, NA) for known in (True, True, False)])
    assert (figures.hallucination_rate, figures.abstention_rate, figures.omniscience_index) == (0.0, 1.0, 0.0)
    assert figures.accuracy == 0.0 and figures.over_refusal_rate == 1.0


def test_figures_without_items_are_missing_rather_than_zero() -> None:
    figures = measure([item("chain_sum", None, WRONG)])
    assert figures.hallucination_rate is None and figures.abstention_rate is None and figures.omniscience_index is None
    assert figures.reasoning_tokens_per_correct is None  # infinite: nothing was solved
    assert measure([]).accuracy is None and measure([]).accuracy_interval is None


def test_everything_right_is_a_hallucination_rate_of_zero() -> None:
    assert hallucination_rate([C, C]) == 0.0


@pytest.mark.parametrize(
    ("known", "answer", "abstained", "score", "expected"),
    [
        (None, "123", False, 1.0, C),
        (None, "124", False, 0.01, WRONG),  # reasoning-gym pays 0.01 for trying
        (None, "124", False, 0.999999, WRONG),
        (None, "I don't know", True, 0.0, NA),
        (None, "x", False, None, U),
        (True, "iron", False, 1.0, C),
        (True, "gold", False, 0.0, WRONG),
        (True, "I don't know", True, 0.0, NA),
        (False, "iron", False, None, WRONG),
        (False, "iron", False, 1.0, WRONG),  # no answer about an unknown place is ever right
        (False, "I don't know", True, 1.0, NA),  # expected, and still not a correct answer
        (False, "", False, None, WRONG),  # rambling to the limit is no abstention
        (None, "", False, 1.0, WRONG),
    ],
)
def test_the_grade_follows_from_what_was_asked_and_said(
    known: bool | None, answer: str, abstained: bool, score: float | None, expected: Grade
) -> None:
    assert grade_answer(known=known, answer=answer, abstained=abstained, score=score) is expected


@given(st.lists(st.sampled_from([C, WRONG, P, NA, U]), min_size=1, max_size=40))
def test_rates_stay_in_range_and_the_interval_holds_the_rate(grades: list[Grade]) -> None:
    rate, interval = hallucination_rate(grades), hallucination_interval(grades, seed=1)
    assert rate is not None and 0.0 <= rate <= 1.0
    assert interval is not None and 0.0 <= interval.low <= interval.high <= 1.0
    index = omniscience_index(grades)
    assert index is not None and -100.0 <= index <= 100.0


def test_the_bootstrap_is_seeded_and_near_the_normal_interval_for_many_items() -> None:
    first, again = (bootstrap_ratio(hits=300, misses=700, outside=0, seed=7) for _ in range(2))
    assert first == again and first is not None
    half_width = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    # 4,000 resamples place a 2.5 % quantile to about 3 % of the interval's half width
    assert first.low == pytest.approx(0.3 - half_width, abs=0.1 * half_width)
    assert first.high == pytest.approx(0.3 + half_width, abs=0.1 * half_width)


def test_the_bootstrap_of_certainty_is_a_point() -> None:
    assert bootstrap_ratio(hits=5, misses=0, outside=0, seed=0) == (1.0, 1.0)
    assert bootstrap_ratio(hits=0, misses=0, outside=4, seed=0) == (0.0, 0.0)
