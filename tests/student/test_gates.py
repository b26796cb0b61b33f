import dataclasses

import pytest

from configs.errors import Refused, UnusableInput
from configs.evaluation import Evaluate, Gate, Headroom, read_gate
from student.gates import (
    Evaluated,
    check_slices,
    gate_table,
    headroom_of,
    headroom_refusal,
    judge,
    require,
    unmeasured,
)
from student.grades import Grade, GradedItem
from student.scoring import measure


def evaluated(correct: int, wrong: int, invented: int, declined: int) -> Evaluated:
    """Reasoning items right and wrong; unknown facts made up and declined."""
    grades = [(None, Grade.CORRECT)] * correct + [(None, Grade.INCORRECT)] * wrong
    grades += [(False, Grade.INCORRECT)] * invented + [(False, Grade.NOT_ATTEMPTED)] * declined
    items = [
        GradedItem("x" if known is None else "facts/places", known, grade, 4, 6, "stop", f"item {number}")
        for number, (known, grade) in enumerate(grades)
    ]
    return Evaluated(measure(items), items)


TEACHER = evaluated(9, 1, 2, 8)  # accuracy 0.9, hallucination rate 0.2
STUDENT = evaluated(8, 2, 3, 7)  # accuracy 0.8, hallucination rate 0.3


def test_figures_are_held_against_both_bounds_and_bounds_are_inclusive() -> None:
    rows = judge({"accuracy": Gate(min=0.8), "hallucination_rate": Gate(min=0.1, max=0.29)}, student=STUDENT)
    assert [row[:5] for row in rows] == [("accuracy", 0.8, 0.8, None, True), ("hallucination_rate", 0.3, 0.1, 0.29, False)]


def test_figures_relative_to_the_teacher_are_computed_by_hand() -> None:
    gates = {"accuracy_of_teacher": Gate(min=0.8), "hallucination_above_teacher": Gate(max=0.10)}
    share, difference = judge(gates, student=STUDENT, teacher=TEACHER)
    assert share.value == pytest.approx(8 / 9, abs=1e-9) and share.passed
    assert difference.value == pytest.approx(0.1, abs=1e-9) and difference.passed  # 0.3 - 0.2 in floats is not 0.1


def test_a_figure_that_was_not_measured_does_not_pass() -> None:
    [row] = judge({"accuracy_of_teacher": Gate(min=0.0)}, student=STUDENT, teacher=None)
    assert row.value is None and not row.passed
    [row] = judge({"hallucination_rate": Gate(max=1.0)}, student=evaluated(1, 0, 0, 0))
    assert row.value is None and not row.passed


def test_a_refusal_names_every_failed_gate_on_one_line_and_exits_with_3() -> None:
    rows = judge(
        {"accuracy": Gate(min=0.95), "hallucination_rate": Gate(max=0.1), "abstention_rate": Gate(min=0)}, student=STUDENT
    )
    with pytest.raises(Refused) as refusal:
        require(rows)
    message = str(refusal.value)
    assert refusal.value.exit_code == 3 and "\n" not in message
    assert "accuracy 0.8 (0.5 to 1) (expected >= 0.95)" in message
    assert "hallucination_rate 0.3 (0 to 0.6154) (expected <= 0.1)" in message
    assert "abstention" not in message
    require([row for row in rows if row.passed])


def test_suites_that_show_neither_loss_elsewhere_nor_wording_are_named() -> None:
    said = unmeasured(STUDENT.metrics)
    assert said is not None and "without training traces" in said and "other words" in said and "\n" not in said
    elsewhere = dataclasses.replace(STUDENT.metrics, slices={"unseen": STUDENT.metrics})
    assert (said := unmeasured(elsewhere)) is not None and "without training traces" not in said
    assert unmeasured(dataclasses.replace(elsewhere, twin_gap=0.0)) is None


def test_the_table_has_one_line_a_gate_under_a_header() -> None:
    gates = {"accuracy": Gate(min=0.5, max=0.9), "accuracy_of_teacher": Gate(min=1)}
    lines = gate_table(judge(gates, student=STUDENT)).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["accuracy", "0.8", "(0.5", "to", "1)", "0.5", "to", "0.9", "passed"]
    assert lines[2].split() == ["accuracy_of_teacher", "not", "measured", ">=", "1", "REFUSED"]


def test_a_gate_reads_as_it_is_said() -> None:
    assert read_gate("hallucination_rate in finance") == ("hallucination_rate", "", None, "finance")
    assert read_gate("accuracy above base in unseen") == ("accuracy", "above", "base", "unseen")
    assert read_gate("accuracy of teacher") == read_gate("accuracy_of_teacher")
    assert read_gate("accuracy in a domain of many words").slice == "a domain of many words"
    for wrong in ("acuracy", "accuracy of student", "accuracy over teacher", "accuracy in ", "", "Accuracy"):
        with pytest.raises(ValueError, match="expected METRIC"):
            read_gate(wrong)


def test_a_gate_of_a_domain_is_about_its_items_alone() -> None:
    gates = {"hallucination_rate in places": Gate(max=0.35), "accuracy in x": Gate(min=0.8), "accuracy in nowhere": Gate(min=0)}
    rows = judge(gates, student=STUDENT)
    assert [(row.value, row.passed) for row in rows] == [(0.3, True), (0.8, True), (None, False)]


def test_a_gate_by_its_interval_asks_more_than_the_figure() -> None:
    """3 of 10 made up is under 0.35, and may well be 0.5."""
    figure, whole = (judge({"hallucination_rate": Gate(max=0.35, interval=asked)}, student=STUDENT)[0] for asked in (False, True))
    assert figure.passed and not whole.passed and whole.high is not None and whole.high > 0.35
    many = evaluated(80, 20, 300, 700)
    assert judge({"hallucination_rate": Gate(max=0.35, interval=True)}, student=many)[0].passed
    with pytest.raises(Refused, match="expected <= 0.35, by its interval"):
        require([whole])


def test_a_comparison_is_paired_item_by_item() -> None:
    """20 items of which none is right for one alone: no doubt from the accuracy of a half, only from what 20 have not shown."""
    half, unseen = evaluated(10, 10, 0, 0), 1.959963984540054**2 / (20 + 1.959963984540054**2)
    [row] = judge({"accuracy above base": Gate(min=-0.17, interval=True)}, student=half, base=half)
    assert row.passed and (row.low, row.high) == pytest.approx((-unseen, unseen), abs=1e-9)
    [row] = judge({"accuracy above base in x": Gate(min=0.05)}, student=evaluated(12, 8, 0, 0), base=half)
    assert row.value == pytest.approx(0.1, abs=1e-9) and row.passed
    [row] = judge({"accuracy above base": Gate(min=0)}, student=half)
    assert row.value is None and not row.passed


def refused(settings: Headroom, teacher: Evaluated, base: Evaluated) -> Refused | None:
    return headroom_refusal(settings, headroom_of(teacher.items, base.items, settings, seed=0))


def test_a_teacher_that_is_no_better_by_more_than_chance_is_not_distilled() -> None:
    base, better = evaluated(10, 30, 0, 0), evaluated(30, 10, 0, 0)
    assert refused(Headroom(), better, base) is None
    refusal = refused(Headroom(), evaluated(11, 29, 0, 0), base)
    assert refusal is not None and refusal.exit_code == 3
    assert "accuracy of the teacher above the base's 0.025 (0 to 0.075, 40 items, p 1); expected the lower end above 0" in str(
        refusal
    )
    assert refused(Headroom(above=0.6), better, base) is not None
    nothing = refused(Headroom(metric="omniscience_index"), better, base)
    assert nothing is not None and "was not measured on 40 items" in str(nothing)


def test_answers_that_nobody_graded_are_no_advantage() -> None:
    """The base against itself: with three of its right answers ungraded it is still level, and with ten nobody knows."""
    half = evaluated(50, 50, 0, 0)

    def without(lost: int) -> Evaluated:
        items = [
            dataclasses.replace(item, grade=Grade.UNGRADED) if place < lost else item for place, item in enumerate(half.items)
        ]
        return Evaluated(measure(items), items)

    refusal = refused(Headroom(), half, without(3))
    assert refusal is not None and "0 (-0.03809 to 0.03809, 97 items, p 1)" in str(refusal)
    refusal = refused(Headroom(), half, without(10))
    assert refusal is not None and "accuracy (10 attempts without a grade) of teacher and base was not measured" in str(refusal)


@pytest.mark.parametrize(
    ("gate", "bound", "grades", "theirs"),
    [
        ("hallucination_rate above base", Gate(max=0.0, interval=True), [Grade.NOT_ATTEMPTED], [Grade.INCORRECT]),
        ("abstention_rate above base", Gate(min=0.5, interval=True), [Grade.NOT_ATTEMPTED], [Grade.INCORRECT]),
        ("accuracy above base", Gate(min=0.5, interval=True), [Grade.CORRECT] * 2, [Grade.INCORRECT] * 2),
        ("accuracy of teacher", Gate(min=1.0, interval=True), [Grade.CORRECT] * 2, [Grade.CORRECT] * 2),
        ("omniscience_index", Gate(min=90, interval=True), [Grade.CORRECT] * 2, []),
        ("simpleqa_f", Gate(min=0.9, interval=True), [Grade.CORRECT] * 2, []),
        ("hallucination_rate", Gate(max=0.3, interval=True), [Grade.CORRECT] * 2, []),
    ],
)
def test_an_item_or_two_are_not_certain(gate: str, bound: Gate, grades: list[Grade], theirs: list[Grade]) -> None:
    def answers(given: list[Grade]) -> Evaluated:
        items = [GradedItem("facts/x", True, grade, 4, 6, "stop", f"item {number}") for number, grade in enumerate(given)]
        return Evaluated(measure(items), items)

    other = answers(theirs or grades)
    [row] = judge({gate: bound}, student=answers(grades), base=other, teacher=other)
    assert not row.passed and row.low is not None and row.high is not None and row.low < row.high
    [alone] = judge({gate: bound.model_copy(update={"interval": False})}, student=answers(grades), base=other, teacher=other)
    assert alone.passed


def test_answers_without_a_grade_count_among_those_that_the_figure_speaks_of() -> None:
    """8 of 10 closed-book answers have no grade; 200 sums beside them do not make the rate of those a figure."""
    items = [GradedItem("sums", None, Grade.CORRECT, 4, 6, "stop", f"sum {number}") for number in range(200)]
    items += [
        GradedItem("facts/x", True, Grade.UNGRADED if number < 8 else Grade.CORRECT, 4, 6, "stop", f"fact {number}")
        for number in range(10)
    ]
    student = Evaluated(measure(items), items)
    for metric in ("hallucination_rate", "abstention_rate", "over_refusal_rate"):
        [row] = judge({metric: Gate(max=0.3)}, student=student)
        assert row.value is None and not row.passed, metric
    [row] = judge({"accuracy": Gate(min=0.5)}, student=student)
    assert row.passed


def test_a_gate_on_a_slice_that_no_item_is_in_is_named_with_those_there_are() -> None:
    check_slices(["accuracy", "accuracy in x", "hallucination_rate above base in places"], STUDENT.metrics.slices)
    with pytest.raises(UnusableInput) as raised:
        check_slices(["accuracy above base in unsen"], STUDENT.metrics.slices)
    assert "'accuracy above base in unsen': no evaluation item is in slice 'unsen'; expected one of facts, places, x" in str(
        raised.value
    )


def ungraded(declined: int, unknown: int) -> Evaluated:
    grades = [Grade.NOT_ATTEMPTED] * declined + [Grade.UNGRADED] * unknown
    items = [GradedItem("facts/finance", True, grade, 4, 6, "stop", f"item {number}") for number, grade in enumerate(grades)]
    return Evaluated(measure(items), items)


@pytest.mark.parametrize(("declined", "unknown", "passes"), [(0, 50, False), (1, 88, False), (19, 1, True), (9, 1, False)])
def test_what_was_not_graded_passes_no_gate(declined: int, unknown: int, passes: bool) -> None:
    gates = {"hallucination_rate in finance": Gate(max=0.3), "accuracy": Gate(min=0.0)}
    assert [row.passed for row in judge(gates, student=ungraded(declined, unknown))] == [passes, passes]
    if not declined:
        assert ungraded(0, unknown).metrics.hallucination_rate is None


def test_three_right_answers_are_not_99_percent() -> None:
    three = evaluated(3, 0, 0, 3)
    gates = {"accuracy": Gate(min=0.99, interval=True), "hallucination_rate": Gate(max=0.01, interval=True)}
    rows = judge(gates, student=three)
    assert [(row.value, row.passed) for row in rows] == [(1.0, False), (0.0, False)]
    assert rows[0].low == pytest.approx(3 / (3 + 1.959963984540054**2), abs=1e-9)  # Wilson's for 3 of 3


def test_two_items_do_not_show_that_the_teacher_is_better() -> None:
    refusal = refused(Headroom(), evaluated(2, 0, 0, 0), evaluated(0, 2, 0, 0))
    assert refusal is not None and "2 items, p 0.5" in str(refusal)


def test_a_share_of_what_is_below_nothing_is_not_measured() -> None:
    rows = judge({"omniscience_index of teacher": Gate(min=0.8)}, student=evaluated(0, 0, 10, 0), teacher=evaluated(0, 0, 1, 9))
    assert rows[0].value is None and not rows[0].passed


def test_an_interval_that_no_comparison_has_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="the difference of two models' twin_gap has no interval; leave interval out"):
        Evaluate.model_validate({"gates": {"twin_gap above base": {"max": 0.3, "interval": True}}})
