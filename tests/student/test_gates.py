import pytest

from configs.errors import Refused
from configs.evaluation import Gate
from student.gates import GateRow, gate_table, judge, require
from student.scoring import Grade, GradedItem, Metrics, measure


def metrics(correct: int, wrong: int, invented: int, declined: int) -> Metrics:
    """Reasoning items right and wrong; unknown facts made up and declined."""
    grades = [(None, Grade.CORRECT)] * correct + [(None, Grade.INCORRECT)] * wrong
    grades += [(False, Grade.INCORRECT)] * invented + [(False, Grade.NOT_ATTEMPTED)] * declined
    return measure([GradedItem("x" if known is None else "facts/x", known, grade, 4, 6, "stop") for known, grade in grades])


TEACHER = metrics(9, 1, 2, 8)  # accuracy 0.9, hallucination rate 0.2
STUDENT = metrics(8, 2, 3, 7)  # accuracy 0.8, hallucination rate 0.3


def test_figures_are_held_against_both_bounds_and_bounds_are_inclusive() -> None:
    rows = judge({"accuracy": Gate(min=0.8), "hallucination_rate": Gate(min=0.1, max=0.29)}, student=STUDENT)
    assert rows == [GateRow("accuracy", 0.8, 0.8, None, True), GateRow("hallucination_rate", 0.3, 0.1, 0.29, False)]


def test_figures_relative_to_the_teacher_are_computed_by_hand() -> None:
    gates = {"accuracy_of_teacher": Gate(min=0.8), "hallucination_above_teacher": Gate(max=0.10)}
    share, difference = judge(gates, student=STUDENT, teacher=TEACHER)  # type: ignore[arg-type]
    assert share.value == pytest.approx(8 / 9, abs=1e-9) and share.passed
    assert difference.value == pytest.approx(0.1, abs=1e-9) and difference.passed  # 0.3 - 0.2 in floats is not 0.1


def test_a_figure_that_was_not_measured_does_not_pass() -> None:
    [row] = judge({"accuracy_of_teacher": Gate(min=0.0)}, student=STUDENT, teacher=None)
    assert row.value is None and not row.passed
    [row] = judge({"hallucination_rate": Gate(max=1.0)}, student=metrics(1, 0, 0, 0))
    assert row.value is None and not row.passed


def test_a_refusal_names_every_failed_gate_on_one_line_and_exits_with_3() -> None:
    rows = judge(
        {"accuracy": Gate(min=0.95), "hallucination_rate": Gate(max=0.1), "abstention_rate": Gate(min=0)}, student=STUDENT
    )
    with pytest.raises(Refused) as refusal:
        require(rows)
    message = str(refusal.value)
    assert refusal.value.exit_code == 3 and "\n" not in message
    assert "accuracy 0.8 (expected >= 0.95)" in message and "hallucination_rate 0.3 (expected <= 0.1)" in message
    assert "abstention" not in message
    require([row for row in rows if row.passed])


def test_the_table_has_one_line_a_gate_under_a_header() -> None:
    lines = gate_table(
        judge({"accuracy": Gate(min=0.5, max=0.9), "accuracy_of_teacher": Gate(min=1)}, student=STUDENT)
    ).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["accuracy", "0.8", "0.5", "to", "0.9", "passed"]
    assert lines[2].split() == ["accuracy_of_teacher", "not", "measured", ">=", "1", "REFUSED"]
