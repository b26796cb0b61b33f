import dataclasses
import json
import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student.grades import Grade, GradedItem, grade_answer
from student.resampling import ratio_draws
from student.scoring import Metrics, measure, ratio_of

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


def of_grades(grades: list[Grade], metric: str) -> float | None:
    """Of known facts with these grades."""
    return ratio_of(metric, [item("facts/x", True, grade) for grade in grades])


def test_partial_answers_are_missed_ones_but_not_made_up() -> None:
    grades = [C, C, WRONG, P, P, NA]
    assert of_grades(grades, "hallucination_rate") == pytest.approx(1 / 4, abs=1e-9)
    assert of_grades(grades, "accuracy") == pytest.approx(2 / 6, abs=1e-9)
    assert of_grades(grades, "omniscience_index") == pytest.approx(100 / 6, abs=1e-9)
    # precision 2/3, recall 2/6: harmonic mean 2 (2/3) (1/3) / (2/3 + 1/3)
    assert of_grades(grades, "simpleqa_f") == pytest.approx(4 / 9, abs=1e-9)


def test_an_ungraded_item_earns_nothing_and_hallucinates_nothing() -> None:
    grades = [C, WRONG, NA, U]
    assert of_grades(grades, "accuracy") == pytest.approx(1 / 4, abs=1e-9)
    assert of_grades(grades, "abstention_rate") == pytest.approx(1 / 4, abs=1e-9)
    assert of_grades(grades, "hallucination_rate") == pytest.approx(1 / 2, abs=1e-9)


def test_a_model_that_always_declines_does_not_hallucinate_and_is_never_accurate() -> None:
    figures = measure([item("facts/metals", known, NA) for known in (True, True, False)])
    assert (figures.hallucination_rate, figures.abstention_rate, figures.omniscience_index) == (0.0, 1.0, 0.0)
    assert figures.accuracy == 0.0 and figures.over_refusal_rate == 1.0


def test_figures_without_items_are_missing_rather_than_zero() -> None:
    figures = measure([item("chain_sum", None, WRONG)])
    assert figures.hallucination_rate is None and figures.abstention_rate is None and figures.omniscience_index is None
    assert figures.reasoning_tokens_per_correct is None  # infinite: nothing was solved
    assert measure([]).accuracy is None and measure([]).intervals == {}


def test_everything_right_is_a_hallucination_rate_of_zero() -> None:
    assert of_grades([C, C], "hallucination_rate") == 0.0


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
@settings(max_examples=25, deadline=None)
def test_rates_stay_in_range_and_intervals_too(grades: list[Grade]) -> None:
    figures = measure([item("facts/x", True, grade) for grade in grades], seed=1)
    assert (figures.hallucination_rate is None) == (set(grades) == {U})
    assert figures.hallucination_rate is None or 0.0 <= figures.hallucination_rate <= 1.0
    if U not in grades:
        low, high = figures.intervals["hallucination_rate"]
        assert 0.0 <= low <= high <= 1.0
    assert figures.omniscience_index is not None and -100.0 <= figures.omniscience_index <= 100.0


# --- confidence, cost, samples -----------------------------------------------------------------------------------


def sure(grade: Grade, confidence: float | None, tokens: int = 10, cost: float | None = None, name: str = "") -> GradedItem:
    return GradedItem("sums", None, grade, 4, tokens, "stop", name, 0, confidence, cost)


def test_figures_of_confidence_equal_the_ones_computed_by_hand() -> None:
    """0.9 right, 0.8 wrong, 0.7 right, 0.2 wrong; what was declined, or has no confidence, is in none of them."""
    items = [sure(C, 0.9, 5), sure(WRONG, 0.8, 20), sure(C, 0.7, 10), sure(WRONG, 0.2, 40), sure(NA, 0.5), sure(U, None)]
    figures = measure(items)
    assert figures.brier == pytest.approx((0.1**2 + 0.8**2 + 0.3**2 + 0.2**2) / 4, abs=1e-9)
    assert figures.ece == pytest.approx((0.1 + 0.8 + 0.3 + 0.2) / 4, abs=1e-9)  # each in a bin of its own
    assert figures.aurc == pytest.approx((0 / 1 + 1 / 2 + 1 / 3 + 2 / 4) / 4, abs=1e-9)
    assert figures.aurc_by_length == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4, abs=1e-9)  # 5, 10, 20, 40 tokens
    assert figures.coverage_at_5_risk == pytest.approx(1 / 4, abs=1e-9)
    assert measure([sure(C, None)]).ece is None and measure([sure(NA, 0.9)]).brier is None


def test_what_a_completed_task_costs_is_all_that_was_spent_over_what_succeeded() -> None:
    items = [sure(C, None, cost=0.25), sure(WRONG, None, cost=0.5), sure(NA, None, cost=0.05), sure(C, None, cost=0.2)]
    assert measure(items).cost_per_completed_task == pytest.approx(1.0 / 2, abs=1e-9)
    assert measure(items[1:3]).cost_per_completed_task == math.inf
    assert measure([sure(C, None)]).cost_per_completed_task is None  # nobody named a price


def test_an_infinite_figure_goes_through_strict_json_and_comes_back() -> None:
    figures = measure([sure(WRONG, 0.5, cost=0.5), *FIXTURE[:4]])
    figures = dataclasses.replace(figures, cost_per_completed_task=math.inf)
    text = json.dumps(figures.to_json(), allow_nan=False)
    assert Metrics.from_json(json.loads(text)) == figures and '"cost_per_completed_task": "inf"' in text


def test_attempts_at_an_item_are_drawn_together() -> None:
    """Ten attempts at each of 20 items that agree are 20 witnesses, not 200."""
    items = [
        GradedItem("sums", None, C if number < 12 else WRONG, 4, 6, "stop", f"item {number}", sample)
        for number in range(20)
        for sample in range(10)
    ]
    figures, alone = measure(items), measure(items[::10])
    assert figures.accuracy == alone.accuracy == pytest.approx(0.6, abs=1e-9)
    assert figures.intervals["accuracy"] == alone.intervals["accuracy"]
    assert (figures.num_items, figures.num_attempts) == (20, 200)


def test_slices_have_the_figures_of_their_own_items() -> None:
    figures = measure(FIXTURE)
    assert sorted(figures.slices) == ["animals", "chain_sum", "colours", "facts", "letter_counting", "metals"]
    alone = measure([one for one in FIXTURE if one.task == "facts/metals"])
    assert figures.slices["metals"] == dataclasses.replace(alone, slices={})
    assert figures.slices["facts"].omniscience_index == figures.omniscience_index


def test_the_gap_to_twins_is_that_of_the_items_which_have_some() -> None:
    """a: 1 of 2 right, its twins 1 of 2; b: 2 of 2, its twin 0 of 1; c has none. Gaps 0 and 1."""

    def one(name: str, sample: int, grade: Grade, twin_of: str = "") -> GradedItem:
        return GradedItem("sums", None, grade, 4, 6, "stop", name, sample, twin_of=twin_of)

    items = [one("a", 0, C), one("a", 1, WRONG), one("b", 0, C), one("b", 1, C), one("c", 0, WRONG)]
    items += [one("a'", 0, C, "a"), one("a''", 0, WRONG, "a"), one("b'", 0, WRONG, "b")]
    figures = measure(items)
    assert figures.twin_gap == pytest.approx(0.5, abs=1e-9)
    assert figures.intervals["twin_gap"] == (0.0, 1.0)
    assert measure(items[:5]).twin_gap is None and figures.slices["twins"].num_items == 3


# --- the bootstrap -----------------------------------------------------------------------------------------------


def test_the_bootstrap_is_seeded_and_near_the_normal_interval_for_many_items() -> None:
    items = [item("sums", None, C if number < 300 else WRONG) for number in range(1000)]
    first, again = (measure(items, seed=7).intervals["accuracy"] for _ in range(2))
    half_width = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    # 4,000 resamples place a 2.5 % quantile to about 3 % of the interval's half width
    assert first == again and first.low == pytest.approx(0.3 - half_width, abs=0.1 * half_width)
    assert first.high == pytest.approx(0.3 + half_width, abs=0.1 * half_width)


def test_where_every_draw_is_the_same_the_interval_is_wilsons() -> None:
    """z^2 = 3.8415: of 5 right ones out of 5 the lower end is 5 / (5 + z^2). Attempts at one item are one witness."""
    z2 = 1.959963984540054**2
    assert measure([item("sums", None, C)] * 5).intervals["accuracy"] == pytest.approx((5 / (5 + z2), 1.0), abs=1e-9)
    declined = measure([item("facts/x", True, NA)] * 4).intervals["hallucination_rate"]
    assert declined == pytest.approx((0.0, z2 / (4 + z2)), abs=1e-9)
    asked_often = [dataclasses.replace(item("sums", None, C), item="one", sample=sample) for sample in range(8)]
    assert measure(asked_often).intervals["accuracy"] == pytest.approx((1 / (1 + z2), 1.0), abs=1e-9)
    nothing_missed = measure([item("facts/x", True, C)] * 3).intervals["hallucination_rate"]
    assert nothing_missed == pytest.approx((0.0, z2 / (3 + z2)), abs=1e-9)
    certain = measure([item("facts/x", True, C)] * 2)  # of the closed book, in [-100, 100]
    assert certain.intervals["omniscience_index"] == pytest.approx((100 * (2 - z2) / (2 + z2), 100.0), abs=1e-9)
    assert certain.intervals["simpleqa_f"] == pytest.approx((2 / (2 + z2), 1.0), abs=1e-9)
    sure_items = [sure(C, 1.0), sure(C, 1.0)]
    assert measure(sure_items).intervals["brier"] == pytest.approx((0.0, z2 / (2 + z2)), abs=1e-9)
    assert measure(sure_items).intervals["ece"] == pytest.approx((0.0, z2 / (2 + z2)), abs=1e-9)


def test_draws_of_ratios_equal_drawing_the_groups_one_by_one() -> None:
    random = np.random.default_rng(3)
    sums_GM, counts_GM = random.integers(0, 5, (7, 2)).astype(float), random.integers(1, 4, (7, 2)).astype(float)
    found_RM = ratio_draws(sums_GM, counts_GM, seed=11, num_resamples=50)
    drawn_RG = np.random.default_rng(11).integers(0, 7, (50, 7))
    for row, drawn_G in enumerate(drawn_RG):
        for metric in range(2):
            total = sum(sums_GM[group, metric] for group in drawn_G)
            assert found_RM[row, metric] == pytest.approx(total / sum(counts_GM[group, metric] for group in drawn_G), abs=1e-12)
