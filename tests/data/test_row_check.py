"""Before a dataset is written, some of its rows are held to what the student will be served."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.schema import Data
from data import row_check
from data.asking import Models
from data.build import build
from data.store import RunFolder
from tests.data.make_run import make_prompt, make_run, make_trace

PROMPTS = [make_prompt(f"What is {number} + 2?") for number in range(12)]
SETTINGS = Data(validation_share=0.0)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Two segments; of each prompt a right trace and a wrong one. The teacher's own ids are always 4 and 5."""
    halves = [PROMPTS[:5], PROMPTS[5:]]
    return make_run(
        tmp_path,
        PROMPTS,
        [[make_trace(one, answer, sample=int(answer)) for one in half for answer in ("4", "5")] for half in halves],
    )


class Student:
    """Is trained on the teacher's own ids where the prompt has an even number, and refuses the prompt it is told to."""

    def __init__(self, refused: str = "") -> None:
        self.refused, self.seen = refused, list[tuple[str, str]]()

    def __call__(self, messages: Sequence[Mapping[str, object]], finish_reason: str, tools: str) -> Sequence[int]:
        question = str(messages[0]["content"])
        if question == self.refused:
            raise UnusableInput("turn 1: token 7 is trained as 1 'a', served as 2 'b'")
        self.seen.append((question, finish_reason))
        return (1, 4, 5) if int(question.split()[2]) % 2 == 0 else (4, 5, 6)


def test_kept_rows_are_checked_and_compared_with_the_teachers_own_ids(run: RunFolder) -> None:
    student = Student()
    built = build(SETTINGS, run, num_workers=1, models=Models(trained_ids=lambda: student))
    assert built.counts["kept"] == 12 and sorted(student.seen) == sorted(
        (one.messages[0].get("content"), "stop") for one in PROMPTS
    )
    assert built.checked == (12, 12, 6)
    assert built.checked is not None and built.checked.in_words() == (
        "12 rows checked in the student's tokens, 6 of 12 on the teacher's own ids"
    )


def test_as_many_rows_are_checked_as_are_allowed_and_always_the_same(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_check, "CHECKED_ROWS", 3)
    first, again = Student(), Student()
    for student in (first, again):
        built = build(SETTINGS, run, num_workers=1, models=Models(trained_ids=lambda student=student: student))
        assert built.checked is not None and built.checked.rows == 3
    lowest = sorted(make_trace(one, sample=4).trace_id for one in PROMPTS)[:3]
    expected = {one.messages[0].get("content") for one in PROMPTS if make_trace(one, sample=4).trace_id in lowest}
    assert {question for question, _ in first.seen} == {question for question, _ in again.seen} == expected


def test_row_that_cannot_be_trained_as_it_is_served_is_named_and_the_dataset_stands(run: RunFolder) -> None:
    built = build(SETTINGS, run, num_workers=1)
    before = {path: path.read_bytes() for path in built.files}
    refusing = Student(refused="What is 7 + 2?")
    name = make_trace(PROMPTS[7], sample=4).trace_id
    with pytest.raises(UnusableInput, match=f"^trace {name}: turn 1: token 7 is trained as 1 'a', served as 2 'b'"):
        build(Data(validation_share=0.5), run, num_workers=1, models=Models(trained_ids=lambda: refusing))
    assert {path: path.read_bytes() for path in built.files} == before


def test_dataset_is_built_without_a_student_and_its_bytes_do_not_depend_on_one(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    def absent() -> Student:
        raise UnusableInput("student.model weights/base-7b: no such folder")

    with caplog.at_level(logging.WARNING):
        built = build(SETTINGS, run, num_workers=1, models=Models(trained_ids=absent))
    assert built.checked is None and "not checked in the student's tokens: student.model weights/base-7b" in caplog.text
    without = {path: path.read_bytes() for path in built.files}
    checked = build(SETTINGS, run, num_workers=1, models=Models(trained_ids=Student))
    assert checked.checked is not None and {path: path.read_bytes() for path in checked.files} == without
