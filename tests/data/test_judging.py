"""The same questions are asked once about each segment, whoever asks and however often they were stopped."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.filters import FinishReasonFilter
from configs.progress import Count
from configs.schema import Data
from data import judging
from data.build import build
from data.look import Look
from data.panel import Question, Said
from data.store import RunFolder, segments
from tests.data.make_run import build_and_seal, commit_traces, make_prompt, make_run, make_trace, seal_prompts, snapshot

PROMPTS = [make_prompt(f"What is {number} + 1?", str(number + 1), task=f"sums/{number % 2}") for number in range(6)]


def traces_of(sample: int) -> list:
    return [make_trace(prompt, prompt.answer, sample=sample, reasoning=f"{sample}: {prompt.answer}") for prompt in PROMPTS]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """(question, traces) of everything that is asked in this process."""
    seen: list[tuple[str, int]] = []
    panel = judging.Panel

    class Listening(panel):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            self.questions = {name: _heard(name, question, seen) for name, question in self.questions.items()}

    monkeypatch.setattr(judging, "Panel", Listening)
    yield seen


def _heard(name: str, question: Question, seen: list[tuple[str, int]]) -> Question:
    def ask(look: Look) -> Said:
        seen.append((name, len(look)))
        return question.ask(look)

    return Question(question.key, question.schema, ask)


def test_a_second_build_asks_about_new_segments_only(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    run = make_run(tmp_path, PROMPTS, [traces_of(0), traces_of(1)], requests=18)
    build(Data(), run)
    assert {number for _, number in asked} == {6} and len(asked) == 2 * len({name for name, _ in asked})
    asked.clear()
    build(Data(), run)
    assert asked == []
    commit_traces(run, traces_of(2))
    built = build(Data(), run)
    assert len(asked) == len({name for name, _ in asked}) and built.counts["kept"] == 18


def test_another_setting_asks_only_the_question_that_it_changes(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    run = make_run(tmp_path, PROMPTS, [traces_of(0)])
    build(Data(), run)
    asked.clear()
    build(Data(filters=(FinishReasonFilter(),)), run)
    assert asked == [("filters", 6)]


def test_an_incremental_build_leaves_the_bytes_of_a_whole_one(tmp_path: Path) -> None:
    grown, whole = (make_run(tmp_path / name, PROMPTS, [traces_of(0)], requests=12) for name in ("grown", "whole"))
    build(Data(), grown)
    for run in (grown, whole):
        commit_traces(run, traces_of(1))
    build(Data(), grown)
    build(Data(), whole)
    assert snapshot(grown) == snapshot(whole)


def test_the_number_of_processes_shows_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "INLINE_SEGMENTS", 0)
    monkeypatch.setattr("data.dataset.INLINE_BYTES", 0)
    found = []
    for num_workers in (1, 3):
        run = make_run(tmp_path / str(num_workers), PROMPTS, [traces_of(sample) for sample in range(5)])
        build(Data(), run, num_workers=num_workers)
        found.append(snapshot(run))
    assert found[0] == found[1]


def test_a_damaged_note_of_an_earlier_build_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, PROMPTS, [traces_of(0)])
    build(Data(), run)
    wanted = snapshot(run)
    for path in (tmp_path / "work" / "judged").rglob("*.arrow"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    build(Data(), run)
    assert snapshot(run) == wanted and "its traces are judged again" in caplog.text


def test_what_was_judged_before_a_damaged_segment_is_kept(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    run = make_run(tmp_path, PROMPTS, [traces_of(0), traces_of(1)])
    second = segments(run.traces)[1].path
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{second.name}: sha256"):
        build(Data(), run)
    asked.clear()
    second.write_bytes(whole)
    build(Data(), run)
    assert [number for _, number in asked] == [6] * len(asked) and len(asked) == len({name for name, _ in asked})


def test_progress_counts_segments_and_ends_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path, PROMPTS, [traces_of(0), traces_of(1)])
    told: list[Count] = []
    build(Data(), run, told.append)
    judging_counts = [count for count in told if (count.note, count.unit) == ("judging", "segments")]
    assert [(count.done, count.total) for count in judging_counts] == [(1, 2), (2, 2)]
    assert told[-1].done == told[-1].total


def test_superseded_and_aborted_copies_are_in_no_column(tmp_path: Path) -> None:
    first = [make_trace(PROMPTS[0], finish="abort"), make_trace(PROMPTS[1], PROMPTS[1].answer)]
    again = [make_trace(PROMPTS[0], PROMPTS[0].answer), make_trace(PROMPTS[1], "a later copy")]
    run = RunFolder(tmp_path)
    seal_prompts(run, PROMPTS, 2)
    for traces in (first, again):
        commit_traces(run, traces)
    counts = build_and_seal(run, Data(validation_share=0.0)).counts
    assert (counts["completed"], counts["kept"]) == (2, 2)
