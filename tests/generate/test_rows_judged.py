"""Rows that carry what their verifier needs: details, the check of references, rows that collide, and the documented examples."""

import json
import logging
import multiprocessing
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import generate.prompts
from configs.errors import UnusableInput
from configs.load import load_recipe
from configs.prompt_sources import DatasetsSource, JsonlSource, ParquetSource, PromptSource
from data.prompt_set import read_prompts, write_prompts
from data.records import Prompt
from data.run_config import open_run
from data.stage import Context, run_stage
from data.store import RunFolder
from data.verify import VERIFIERS, sandbox, self_check
from data.verify.runner import Item, judge
from data.verify.sandbox import SandboxUnavailable
from generate import references
from generate.prompts import PromptList, PromptStream, build_prompt_set
from generate.references import in_groups
from generate.sources import rows
from generate.sources.rows import Candidate
from generate.stages import PROMPTS
from tests.data.hostile import HOSTILE
from tests.data.make_run import make_prompt
from tests.data.test_verifiers import gym_prompts

NO_SANDBOX = ""
try:
    sandbox.require()
except SandboxUnavailable as unavailable:
    NO_SANDBOX = str(unavailable)
confined = pytest.mark.skipif(bool(NO_SANDBOX), reason=NO_SANDBOX)

ADD = "def add(a, b):\n    return a + b"
TESTS = {"language": "python", "kind": "function", "function": "add", "tests": [{"arguments": [3, 4], "expected": 7}]}
CITY = {"schema": {"type": "object", "required": ["city"]}}


def code_row(question: str = "add?", answer: str = ADD, **details: object) -> dict[str, object]:
    return {"question": question, "answer": answer, "verifier": "code", "details": TESTS | details, "split": "train"}


def write_lines(folder: Path, *lines: object, name: str = "p.jsonl") -> JsonlSource:
    (folder / name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return JsonlSource(path=name)


def build(folder: Path, *lines: object) -> PromptList:
    return build_prompt_set([write_lines(folder, *lines)], [], [folder])


def refusal(folder: Path, source: PromptSource) -> str:
    with pytest.raises(UnusableInput) as raised:
        build_prompt_set([source], [], [folder])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 450
    return str(raised.value)


# --- details -----------------------------------------------------------------------------------------------------


def test_details_are_the_same_text_however_they_are_written(tmp_path: Path) -> None:
    ways = (CITY, json.dumps(CITY), json.dumps(CITY, indent=4))
    lines = [{"question": f"{n}?", "verifier": "json_schema", "details": way, "split": "train"} for n, way in enumerate(ways)]
    assert {prompt.details for prompt in build(tmp_path, *lines).prompts} == {'{"schema":{"type":"object","required":["city"]}}'}


def test_details_keep_the_order_of_keys_and_their_unicode(tmp_path: Path) -> None:
    """`list(f({"b": 1, "a": 2}))` has another value once the keys are sorted."""
    [prompt] = build(tmp_path, {"question": "a", "verifier": "math", "answer": "1", "details": {"b": "ü", "a": [1.0, 2]},
                                "split": "train"}).prompts  # fmt: skip
    assert prompt.details == '{"b":"ü","a":[1.0,2]}'


@pytest.mark.parametrize(("details", "kept"), [([1, {"a": None}], '[1,{"a":null}]'), ("[]", "[]"), (" ", ""), ("", "")])
def test_a_list_is_kept_and_a_blank_text_is_none(tmp_path: Path, details: object, kept: str) -> None:
    [prompt] = build(
        tmp_path, {"question": "a", "answer": "1", "verifier": "exact", "details": details, "split": "train"}
    ).prompts
    assert prompt.details == kept


@pytest.mark.parametrize(
    ("details", "found"),
    [
        ("3", "details is int, expected a JSON object or list, or its JSON text"),
        ("true", "details is bool, expected"),
        ("null", "details is null, expected"),
        ('"some words"', "details is not valid JSON (Expecting value"),
        ('"null"', "details is null, expected"),
        (r'"{\"a\": 1, \"a\": 2}"', "details is not valid JSON (an object has a key twice)"),
        (r'"{\"a\": NaN}"', "details is not valid JSON (NaN is no JSON)"),
        ('{"a": NaN}', "details hold what JSON has no form for"),
        ('{"a": 1e999}', "details hold what JSON has no form for"),
        (r'"[\"\\ud800\"]"', "details hold text that is no valid Unicode"),
        (json.dumps("[" * 100_000), "details is not valid JSON (maximum recursion depth"),
    ],
)
def test_what_is_no_details_is_one_line_with_its_place(tmp_path: Path, details: str, found: str) -> None:
    fine = {"question": "a", "split": "train"}
    line = '{"question": "b", "answer": "1", "verifier": "exact", "details": ' + details + "}"
    assert f"p.jsonl line 2: {found}" in refusal(tmp_path, write_lines(tmp_path, fine, line))


def test_details_that_nobody_is_named_to_read_are_refused(tmp_path: Path) -> None:
    """With an answer and no verifier `exact` would be asked, and no program equals another letter by letter."""
    row = {key: value for key, value in code_row().items() if key != "verifier"}
    assert "p.jsonl line 1: details without a verifier; expected verifier to be one of" in refusal(
        tmp_path, write_lines(tmp_path, row)
    )


# --- other containers --------------------------------------------------------------------------------------------


def test_details_as_structs_are_refused_because_arrow_fills_in_what_was_never_said(tmp_path: Path) -> None:
    said = [{"kind": "function", "tests": [{"arguments": [1], "expected": None}]}, {"kind": "stdin", "setup": "x"}]
    table = pa.table({"question": ["a", "b"], "details": said, "verifier": ["code"] * 2})
    assert table.column("details").to_pylist()[0] == said[0] | {"setup": None}, "the null that was meant is no other than this"
    pq.write_table(table, tmp_path / "p.parquet")
    assert "p.parquet: column details is struct<" in refusal(tmp_path, ParquetSource(path="p.parquet"))
    datasets.Dataset(table).save_to_disk(str(tmp_path / "d"))
    assert "d: column details is struct<" in refusal(tmp_path, DatasetsSource(path="d"))


def test_details_as_text_are_the_same_prompt_in_every_container(tmp_path: Path) -> None:
    lines = [{"question": "city?", "verifier": "json_schema", "details": json.dumps(CITY), "split": "train"},
             {"question": "else?", "verifier": None, "details": None, "split": "train"}]  # fmt: skip
    table = pa.Table.from_pylist(lines)
    pq.write_table(table, tmp_path / "p.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "d"))
    write_lines(tmp_path, *({key: value for key, value in line.items() if value is not None} for line in lines))
    sources = (JsonlSource(path="p.jsonl"), ParquetSource(path="p.parquet"), DatasetsSource(path="d"))
    found = [
        [(prompt.prompt_id, prompt.details, prompt.verifier) for prompt in build_prompt_set([source], [], [tmp_path]).prompts]
        for source in sources
    ]
    assert found[0] == found[1] == found[2] and found[0][1][1:] == ("", "")


# --- what each verifier needs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"verifier": "exact"}, "verifier exact: no answer to compare with"),
        ({"verifier": "math"}, "verifier math: no answer to compare with"),
        ({"verifier": "code", "answer": ADD}, "verifier code: no details; expected tests"),
        (code_row(kind="guess"), "details hold no tests of code (KeyError('guess'))"),
        (code_row(language="rust"), "language 'rust', expected 'python'"),
        (code_row(tests=[]), "empty list of tests"),
        (code_row(kind="asserts", tests=[{"assert": "add(1, 2) == 3"}]), "dict where a test is text"),
        (code_row(kind="asserts", tests="assert add(1, 2) == 3"), "tests: expected a list"),
        (code_row(answer="", kind="asserts", tests=["assert True"]), "no `names`, and the reference defines none"),
        ({"verifier": "code", "details": [1]}, "details hold no tests of code"),
        ({"verifier": "json_schema"}, "verifier json_schema: no details; expected"),
        ({"verifier": "json_schema", "details": {"type": "object"}}, "details hold no schema"),
        ({"verifier": "json_schema", "details": {"schema": {"type": "thing"}}}, "the schema is invalid"),
        ({"verifier": "json_schema", "details": {"schema": {"$ref": "https://x.y/z"}}}, "points outside the schema"),
        ({"verifier": "json_schema", "details": CITY | {"equal": True}}, "no answer to compare with"),
        ({"verifier": "reasoning_gym", "answer": "1"}, "details hold no reasoning-gym entry"),
        ({"verifier": "reasoning_gym", "details": {"task": "chain_sum", "entry": {}}}, "no answer to compare with"),
        ({"verifier": "guess"}, "unknown verifier 'guess'; known: exact, math, reasoning_gym, json_schema, code, llm_judge"),
    ],
)
def test_what_a_verifier_misses_is_said_when_the_row_is_read(tmp_path: Path, row: dict[str, object], words: str) -> None:
    said = refusal(tmp_path, write_lines(tmp_path, {"question": "a", "split": "train"}, {"question": "b"} | row))
    assert said.startswith("p.jsonl line 2: ") and words in said


def test_brackets_too_deep_for_the_parser_are_one_line_of_complaint(tmp_path: Path) -> None:
    row = code_row(answer="x = " + "(" * 5_000 + ")" * 5_000, kind="asserts", tests=["assert x"])
    assert "p.jsonl line 1: verifier code: " in refusal(tmp_path, write_lines(tmp_path, row))


def test_a_schema_tests_or_a_judge_may_do_without_a_reference(tmp_path: Path) -> None:
    lines = [
        {"question": "a", "verifier": "json_schema", "details": CITY},
        {"question": "b", "verifier": "code", "details": TESTS},
        {"question": "c", "verifier": "llm_judge"},
        {"question": "d", "verifier": "llm_judge", "answer": "because"},
    ]
    found = build(tmp_path, *(line | {"split": "train"} for line in lines))
    assert [prompt.verifier for prompt in found.prompts] == ["json_schema", "code", "llm_judge", "llm_judge"]
    assert not found.left_out


# --- references held against themselves --------------------------------------------------------------------------


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that does what its answer says, in real workers, with a deadline that tests can wait for."""
    monkeypatch.setitem(VERIFIERS, "hostile", HOSTILE["hostile"])
    monkeypatch.setattr(rows, "JUDGES", (*rows.JUDGES, "hostile"))
    monkeypatch.setattr(generate.prompts, "TIMEOUT_S", 1.0)


def mixed_rows() -> list[dict[str, object]]:
    """Good and bad references of every verifier that runs without a sandbox, mixed."""
    good, bad = (gym_prompts(task, 1)[0] for task in ("letter_counting", "rush_hour"))
    return [
        {"question": "1?", "answer": "1/2", "verifier": "math"},
        {"question": "2?", "answer": "to be, or not to be", "verifier": "math"},
        {"question": "3?", "answer": "iron"},
        {"question": "4?", "answer": "..."},
        {"question": "5?", "answer": '{"city": 1}', "verifier": "json_schema", "details": CITY},
        {"question": "6?", "answer": '{"town": 1}', "verifier": "json_schema", "details": CITY},
        {"question": "7?", "answer": "to be, or not to be", "verifier": "math"},
        {"question": "8?", "answer": bad.answer, "verifier": "reasoning_gym", "details": bad.details},
        {"question": "9?", "answer": good.answer, "verifier": "reasoning_gym", "details": good.details},
        {"question": "10?", "answer": "anything", "verifier": "llm_judge"},
        {"question": "11?", "answer": "not judged", "verifier": ""},
    ]


def test_references_that_fail_their_own_verifier_are_left_out_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that pass are those of which the slow check says so, one by one."""
    lines = [row | {"split": "train"} for row in mixed_rows()]
    monkeypatch.setattr(references, "ROWS_AT_ONCE", 3)
    with caplog.at_level(logging.WARNING):
        found = build(tmp_path, *lines)
    assert [prompt.messages[0].get("content") for prompt in found.prompts] == ["1?", "3?", "5?", "9?", "10?", "11?"]
    assert found.left_out == {"fails_self_check": 5}
    places = "line 2 (math), p.jsonl line 4 (exact), p.jsonl line 6 (json_schema), p.jsonl line 7 (math), p.jsonl line 8"
    assert f"rows left out: 5, because their reference does not pass their own verifier: p.jsonl {places}" in caplog.text
    monkeypatch.setattr(references.References, "passing", lambda self, candidates, leave_out: candidates)
    everything = build(tmp_path, *lines).prompts
    assert len(everything) == len(lines)
    assert found.prompts == [prompt for prompt in everything if prompt.verifier == "llm_judge" or self_check(prompt)]


@pytest.mark.usefixtures("hostile")
def test_a_reference_that_hangs_or_kills_its_verifier_costs_its_own_row_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = ("right", "sleep", "two", "die", "right too")
    lines = [{"question": f"{a}?", "answer": a, "verifier": "hostile", "split": "train"} for a in answers]
    found = build(tmp_path, *lines)
    assert [prompt.answer for prompt in found.prompts] == ["right", "right too"]
    assert found.left_out == {"fails_self_check": 3} and "p.jsonl line 2 (hostile)" in caplog.text
    assert not multiprocessing.active_children(), "workers end with the iteration"


def test_a_set_that_is_empty_because_of_its_references_names_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnusableInput, match="the prompt set is empty"):
        build(tmp_path, *({"question": f"{n}?", "answer": "!", "split": "train"} for n in range(14)))
    assert "rows left out: 14" in caplog.text and "p.jsonl line 10 (exact) and 4 more" in caplog.text


def test_no_process_is_started_for_rows_of_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.verify.runner._Worker", None)
    assert len(build(tmp_path, *({"question": f"{n}?", "answer": "x", "split": "train"} for n in range(9))).prompts) == 9


def test_a_bad_reference_does_not_stand_in_the_way_of_the_same_question_with_a_good_one(tmp_path: Path) -> None:
    found = build(tmp_path, *({"question": "a", "answer": answer, "split": "train"} for answer in ("?!", "iron", "iron")))
    assert [prompt.answer for prompt in found.prompts] == ["iron"]
    assert found.left_out == {"fails_self_check": 1, "duplicate": 1}


def test_rows_wait_in_groups_that_are_bounded_in_number_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(references, "CHARACTERS_AT_ONCE", 20)
    sizes = [1, 2, 3, 4, 5, 30, 6, 7, 8, 1, 1, 1, 1, 1]
    candidates = [Candidate(make_prompt("q" * size, ""), str(number)) for number, size in enumerate(sizes)]
    groups = list(in_groups(iter(candidates)))
    assert [candidate for group in groups for candidate in group] == candidates
    assert [[len(c.prompt.messages[0].get("content", "")) for c in group] for group in groups] == [
        [1, 2, 3, 4], [5], [30], [6, 7], [8, 1, 1, 1], [1, 1],
    ]  # fmt: skip


@confined
def test_code_that_fails_its_own_tests_is_left_out(tmp_path: Path) -> None:
    found = build(tmp_path, code_row("fine?"), code_row("wrong?", answer="def add(a, b):\n    return a * b"))
    assert [prompt.messages[0].get("content") for prompt in found.prompts] == ["fine?"]
    assert found.left_out == {"fails_self_check": 1}


def test_without_a_sandbox_the_set_ends_with_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACESTILL_SANDBOX_PYTHON", "/usr/bin/no-such-python")  # read by the worker, which is a new process
    run, stream = RunFolder(tmp_path / "run"), PromptStream([write_lines(tmp_path, code_row())], [], [tmp_path])
    with pytest.raises(UnusableInput, match="^sandbox: "):
        write_prompts(run, stream)
    assert not list(run.prompts.iterdir()) and not multiprocessing.active_children()


# --- rows that ask the same --------------------------------------------------------------------------------------


def test_two_rows_with_one_question_and_other_tests_are_told_not_merged_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = {"schema": {"type": "array"}}
    lines = [
        {"question": "a", "verifier": "json_schema", "details": details, "split": "train"} for details in (CITY, other, CITY)
    ]
    found = build(tmp_path, *lines)
    assert [json.loads(prompt.details) for prompt in found.prompts] == [CITY]
    assert found.left_out == {"judged_otherwise": 1, "duplicate": 1}
    assert "rows left out: 1, because an earlier row asks the same, and is judged by another" in caplog.text
    assert "p.jsonl line 2" in caplog.text


def test_what_judges_is_no_part_of_a_prompts_identity(tmp_path: Path) -> None:
    """A trace answers what was asked; a test mended afterwards must not make it the trace of another prompt."""
    [one] = build(tmp_path, {"question": "a", "verifier": "json_schema", "details": CITY, "split": "train"}).prompts
    [other] = build(tmp_path, {"question": "a", "verifier": "llm_judge", "answer": "b", "split": "train"}).prompts
    assert one.prompt_id == other.prompt_id


def test_another_answer_in_another_file_is_told_by_its_own_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = write_lines(tmp_path, {"question": "a", "answer": "1", "split": "train"})
    second = write_lines(tmp_path, {"question": "a", "answer": "2", "split": "train"}, name="q.jsonl")
    found = build_prompt_set([first, second], [], [tmp_path])
    assert [prompt.answer for prompt in found.prompts] == ["1"] and found.left_out == {"judged_otherwise": 1}
    assert "q.jsonl line 1" in caplog.text


# --- the documented rows, through the stage ----------------------------------------------------------------------


def staged(folder: Path, *lines: object) -> Context:
    """The prompts stage over these rows, both sides of the split."""
    write_lines(folder, *lines)
    source = f"[{{type: jsonl, path: {folder / 'p.jsonl'}}}]"
    words = (f"generate.prompts={source}", f"evaluate.suites={source}")
    loaded = load_recipe("embedded", list(words))
    return Context(loaded, open_run(loaded, folder / "run"), "embedded", words, Console(quiet=True))


def documented_rows() -> list[str]:
    text = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text()
    return [line.strip() for line in text.splitlines() if line.startswith('    {"question": ')]


ANSWERS = {
    "math": (r"It is \boxed{1.25}.", r"It is \boxed{\frac{4}{5}}."),
    "code": ("```python\ndef add(x, y):\n    return y + x\n```", "```python\ndef add(x, y):\n    return 7 - x * 0 + y\n```"),
    "json_schema": ('```json\n{"city": "Lyon", "country": "France"}\n```', '{"city": "Paris", "country": "France"}'),
}


@confined
def test_the_documented_rows_go_through_the_stage_and_judge_right_from_wrong(tmp_path: Path) -> None:
    lines = documented_rows()
    assert sorted(str(json.loads(line)["verifier"]) for line in lines) == ["code", "json_schema", "llm_judge", "math"]
    context = staged(tmp_path, {"question": "for training", "split": "train"}, *lines)
    run_stage(PROMPTS, context)
    prompts = {prompt.verifier: prompt for prompt in read_prompts(context.run)}
    assert len(prompts) == 5 and prompts["llm_judge"].answer
    asked: list[tuple[Prompt, tuple[str, str]]] = [(prompts[name], answers) for name, answers in ANSWERS.items()]
    items = [Item(prompt, answer) for prompt, answers in asked for answer in answers]
    assert [found.verdict for found in judge(items, timeout_s=60.0, num_workers=1)] == ["pass", "fail"] * 3
