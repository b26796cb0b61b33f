"""The base student is asked what it can produce, and a whole build follows from what it says."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from configs.errors import Refused, UnusableInput
from configs.load import load_recipe
from configs.schema import Data
from data.abstention import ABSTENTION, is_closed_book
from data.asking import Models
from data.build import Built, build
from data.dataset import load_dataset
from data.engine import Completion, Handout, Request
from data.run_config import open_run
from data.stage import Context
from data.stages import DATA, VERSIONED
from data.store import RunFolder, seal
from data.verification import verify_run
from tests.data.asked_run import ANSWERS, NUM_FACTS, Student, asked_run, fact, models_with, settings
from tests.data.make_run import commit_traces, make_prompt, make_run, make_trace, snapshot


def built(run: RunFolder, student: Student, wanted: Data | None = None, identity: str = "base", num_workers: int = 1) -> Built:
    made = build(wanted or settings(), run, num_workers=num_workers, models=models_with(student, identity))
    seal(run, run.dataset, stage="data", fingerprint="f", inputs={}, files=made.files, counts=dict(made.counts), seconds=0.0)
    return made


def rows_of(run: RunFolder) -> list[dict]:
    return [row for row in load_dataset(run)["train"].to_list() if row["task"] == "facts/metals"]


def test_rows_that_the_student_cannot_produce_say_so_once_a_prompt(tmp_path: Path) -> None:
    run, student = asked_run(tmp_path / "run"), Student()
    made = built(run, student)
    assert len(student.asked) == NUM_FACTS * 8 and (student.loads, student.closes) == (1, 1)
    rows = rows_of(run)
    kept = {row["messages"][0]["content"]: row for row in rows if not row["provenance"]}
    changed = {row["messages"][0]["content"]: row for row in rows if row["provenance"]}
    assert set(kept) == {fact(number).messages[0].get("content") for number in (0, 2, 4)}
    assert set(changed) == {fact(number).messages[0].get("content") for number in (1, 3, 5)}
    assert len(rows) == 2 * 3 + 3
    for row in changed.values():
        said = row["messages"][-1]
        assert (said["content"], said["reasoning_content"]) == (ABSTENTION, "")
        assert (row["reasoning_tokens"], row["answer_tokens"]) == (3, 5)
        why = json.loads(row["provenance"])
        assert why["student_asked"] == 8 and why["student_correct"] < 7 == why["min_correct"]
    assert not any(answer in json.dumps(list(changed.values())) for answer in ANSWERS)
    assert made.counts["relabelled"] == made.counts["by_task"]["facts/metals"]["relabelled"] == 3
    assert made.counts["rejected_by_reason"] == {"abstention_repeated": 3}
    assert made.counts["by_task"]["facts/metals"]["answer_tokens"] == 6 * 2 + 3 * 5
    replies = sorted(path for path in run.verdicts.glob("replies/*/*"))
    assert replies and set(replies) <= set(made.files)  # what was paid for is sealed
    parquet = pq.read_table(next(run.dataset.glob("parquet/train-*.parquet")))
    assert sorted(parquet["provenance"].to_pylist()) == sorted(load_dataset(run)["train"]["provenance"])


def test_a_view_that_lets_no_row_say_i_do_not_know_drops_them_all(tmp_path: Path) -> None:
    run = asked_run(tmp_path / "run")
    made = built(run, Student(), settings(abstention_share=0.0))
    assert made.counts["relabelled"] == 0 and made.counts["rejected_by_reason"] == {"abstention_repeated": 3, "abstention_cap": 3}


def test_the_student_is_asked_once_and_only_about_what_is_new(tmp_path: Path) -> None:
    run = asked_run(tmp_path / "run", num_facts=4)
    built(run, Student())
    before, again = snapshot(run), Student()
    built(run, again)
    assert (again.asked, again.loads) == ([], 0)
    assert {path: content for path, content in snapshot(run).items() if "manifest" not in path} == {
        path: content for path, content in before.items() if "manifest" not in path
    }
    other = Student()
    built(run, other, settings(abstention_samples=9))
    assert len(other.asked) == 4  # the ninth sample of each
    different = Student()
    built(run, different, identity="another base")
    assert len(different.asked) == 4 * 8
    warmer = Student()
    built(run, warmer, settings(abstention_temperature=0.9))
    assert len(warmer.asked) == 4 * 8


def test_traces_that_arrive_later_are_asked_about_later(tmp_path: Path) -> None:
    run = asked_run(tmp_path / "run", num_facts=4)
    built(run, Student(), num_workers=1)
    whole = asked_run(tmp_path / "whole", num_facts=5)
    run.prompts.joinpath("manifest.json").unlink()
    for path in whole.prompts.iterdir():
        run.prompts.joinpath(path.name).write_bytes(path.read_bytes())
    commit_traces(run, [make_trace(fact(4), ANSWERS[4], sample=sample, reasoning=f"I recall, {sample}") for sample in range(2)])
    student = Student()
    built(run, student)
    built(whole, Student())
    assert len(student.asked) == 8
    rows = [load_dataset(each)["train"].to_list() for each in (run, whole)]
    assert rows[0] == rows[1]


def test_the_bytes_are_the_same_whatever_the_number_of_processes(tmp_path: Path) -> None:
    made = []
    for name, workers in (("one", 1), ("three", 3)):
        run = asked_run(tmp_path / name, num_segments=5)
        built(run, Student(), num_workers=workers)
        left_out = ("/replies/", "manifest.json")  # named by the time at which the student spoke
        made.append({path: its for path, its in snapshot(run).items() if not any(part in path for part in left_out)})
    assert made[0] == made[1]


def test_a_run_without_closed_book_prompts_asks_nobody(tmp_path: Path) -> None:
    run = asked_run(tmp_path / "run", num_facts=0)
    student = Student()
    assert built(run, student).counts["relabelled"] == 0 and student.loads == 0
    build(settings(), run, models=Models())  # nor does it need anybody who could be asked


def test_a_failed_request_ends_the_build_and_is_asked_again(tmp_path: Path) -> None:
    run = asked_run(tmp_path / "run")
    with pytest.raises(UnusableInput, match=r"2 requests to the base student failed \(2 busy\)"):
        built(run, Student(fail=frozenset({3, 5})))
    assert not (run.dataset / "manifest.json").exists()
    student = Student()
    built(run, student)
    assert len(student.asked) == 2


def test_nobody_to_ask_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="abstention_share: null"):
        build(settings(), asked_run(tmp_path / "run"), models=Models())


KILLED = """
import sys
from pathlib import Path
import data.asking
from data.store import RunFolder
from tests.data.asked_run import Student
from tests.data.test_self_ask import built
data.asking.COMMIT_REPLIES = 10
built(RunFolder(Path(sys.argv[1])), Student(die_after=25))
"""


def test_replies_that_were_committed_survive_a_kill_and_no_row_differs(tmp_path: Path) -> None:
    run, untouched = asked_run(tmp_path / "run"), asked_run(tmp_path / "untouched")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run.root)], env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    assert killed.returncode == -signal.SIGKILL
    student = Student()
    built(run, student)
    assert len(student.asked) == NUM_FACTS * 8 - 20  # two commits of ten; five more were said and are said again
    built(untouched, Student())
    assert rows_of(run) == rows_of(untouched)


def test_a_damaged_reply_is_named_and_not_silently_paid_for_again(tmp_path: Path) -> None:
    run = asked_run(tmp_path / "run")
    built(run, Student())
    segment = next(run.verdicts.glob("replies/*/*.arrow"))
    segment.write_bytes(segment.read_bytes()[:-1])
    with pytest.raises(UnusableInput, match=segment.stem):
        built(run, Student())


@pytest.mark.parametrize(("text", "finish"), [("<think>hm</think>iron", "length"), ("<think>iron", "stop"), ("", "stop")])
def test_what_does_not_come_to_an_end_is_not_right(text: str, finish: str) -> None:
    from data.asking import Codec, Reply
    from data.self_ask import answer_of

    codec = Codec(lambda messages: (), lambda ids: "")
    assert answer_of(Reply("r", text, finish, 3, 0.1, 0.0), codec) == ""
    assert answer_of(Reply("r", "<think>hm</think> iron\n", "stop", 3, 0.1, 0.0), codec) == "iron"


def test_the_embedded_student_is_asked_through_its_own_engine_and_template(tmp_path: Path) -> None:
    from tracestill import _base_student

    run = asked_run(tmp_path / "run", num_facts=2)
    wanted = settings(abstention_samples=2, abstention_min_correct=1, abstention_max_tokens=64)
    made = build(wanted, run, models=Models(student=_base_student(load_recipe("embedded", []).recipe)))
    assert made.counts["relabelled"] == 2  # nobody has told it of these towns
    rows = [row for row in pq.read_table(run.dataset / "parquet").to_pylist() if row["provenance"]]
    assert [row["answer_tokens"] for row in rows] == [len(ABSTENTION) + 1] * 2  # bytes, and the end of turn


class Lazy(Student):
    """Ends before it has said everything, without a word."""

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        yield from itertools.islice(super().generate(requests, handout), 10)


def test_what_was_never_answered_is_no_wrong_answer(tmp_path: Path) -> None:
    run = asked_run(tmp_path / "run")
    with pytest.raises(UnusableInput, match=r"38 requests to the base student failed \(38 unanswered\)"):
        built(run, Lazy())
    student = Student()
    built(run, student)
    assert len(student.asked) == NUM_FACTS * 8 - 10


def test_replies_are_judged_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = asked_run(tmp_path / "whole"), asked_run(tmp_path / "cut")
    built(whole, Student())
    monkeypatch.setattr("data.self_ask.BATCH", 7)
    built(cut, Student())
    assert rows_of(whole) == rows_of(cut)


def test_a_damaged_reply_is_found_by_data_verify_and_a_whole_one_is_no_stray(tmp_path: Path) -> None:
    open_run(load_recipe("embedded"), tmp_path / "run")
    run = asked_run(tmp_path / "run")
    built(run, Student())
    (run.dataset / "manifest.json").unlink()  # as a build leaves it that asked and was killed
    assert not [path for path in verify_run(run).strays if "replies" in path.parts]
    segment = next(run.verdicts.glob("replies/*/*.arrow"))
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    with pytest.raises(UnusableInput, match=segment.stem):
        verify_run(run)


def test_the_card_says_which_rows_are_not_the_teachers(tmp_path: Path) -> None:
    run = asked_run(tmp_path / "run")
    built(run, Student())
    assert '3 rows say "I don\'t know" where the teacher answered' in (run.dataset / "README.md").read_text()


def test_prompts_that_only_a_model_can_grade_are_not_asked() -> None:
    assert is_closed_book(fact(0)) and not is_closed_book(replace(fact(0), verifier="llm_judge"))


@pytest.mark.parametrize("module", VERSIONED, ids=lambda module: module.__name__)
def test_another_version_of_a_column_is_another_stage(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe("embedded")
    context = Context(loaded, open_run(loaded, tmp_path / "run"), "embedded", (), Console(quiet=True))
    before = DATA.identity(context)
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    assert DATA.identity(context) != before


def test_a_licence_that_no_dataset_may_have_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    student = Student()
    with pytest.raises(Refused, match="CC0-1.0"):
        built(asked_run(tmp_path / "run"), student, settings().model_copy(update={"permitted_licences": ("MIT",)}))
    assert not student.asked


def test_a_licence_of_traces_that_the_view_turns_down_is_nobodys_business(tmp_path: Path) -> None:
    run, poem = RunFolder(tmp_path / "run"), replace(make_prompt("A poem?", "", verifier="", task="poems"), licence="GPL-3.0")
    facts = [fact(number) for number in range(2)]
    traces = [make_trace(prompt, prompt.answer, reasoning=f"I recall {prompt.answer}") for prompt in facts]
    make_run(run.root, [*facts, poem], [[*traces, make_trace(poem, "Roses")]])
    made = built(run, Student(), settings(abstention_share=0.5))
    assert made.counts["unjudged_by_reason"] == {"no_verifier": 1}
