"""Accuracy by depth of evaluated models: figures by hand, and long suites from the documented recipe to gates and tables."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest
from rich.console import Console

from configs.evaluation import Gate
from configs.load import load_recipe
from data.depth import is_middle, places_of
from data.prompt_set import read_prompts
from data.records import FinishReason, Prompt
from data.report import write_report
from data.run_config import open_run
from data.split import is_held_out
from data.stage import Context, run_stage
from data.store import read_json, read_table, table_bytes, write_bytes, write_json
from generate.stages import PROMPTS
from student.card import depth_table, gather, render_card
from student.compare import compare_models
from student.depth import accuracy_by_depth, depth_rows
from student.folders import resolve
from student.gates import Evaluated, judge
from student.grades import Grade, GradedItem, is_length, length_name
from student.model import load_tokenizer
from student.results import read_depths, read_evaluated
from student.scoring import measure
from student.stages import Target, evaluate, gate_rows
from student.targets import TargetSpec
from tests.generate.test_documents import prose
from tests.student.test_card import FINDINGS
from tests.student.test_evaluate import ScriptedEngine, thoughtful

C, I, P, NA, U = Grade.CORRECT, Grade.INCORRECT, Grade.PARTIAL, Grade.NOT_ATTEMPTED, Grade.UNGRADED  # noqa: E741
DOCUMENTS, BUGS = "documents/two-facts", "repository/find-planted-bug"

# --- by hand -----------------------------------------------------------------------------------------------------

ENDS = [((0.05, 0.95), C), ((0.2999, 0.75), C), ((0.0, 0.7), C), ((0.15, 1.0), NA)]
MIDDLE = [((0.05, 0.45), C), ((0.3, 0.95), I), ((0.6999, 0.05), P), ((0.95, 0.55), NA)]


def graded(rows: list[tuple[tuple[float, ...], Grade]], task: str = DOCUMENTS) -> list[GradedItem]:
    return [
        GradedItem(task, None, grade, 4, 6, "stop", f"{task} {number}", depths=depths, context_tokens=9_000)
        for number, (depths, grade) in enumerate(rows)
    ]


def evaluated(items: list[GradedItem]) -> Evaluated:
    return Evaluated(measure(items), items)


def test_figures_of_a_fixture_equal_those_computed_by_hand() -> None:
    """3 of 4 at the ends, 1 of 4 in the middle; Wilson's and Newcombe's intervals by the formulas, in 40 digits."""
    figures = accuracy_by_depth([*graded([*ENDS, *MIDDLE, ((0.5,), U)]), GradedItem("sums", None, C, 4, 6, "stop")])
    assert figures is not None and list(figures) == [DOCUMENTS]
    found = figures[DOCUMENTS]
    assert (found["traces"], found["unjudged"]) == (8, 1)
    assert found["ends"]["accuracy"] == pytest.approx(3 / 4, abs=1e-9)
    assert found["ends"]["interval"] == pytest.approx((0.3006418425824, 0.9544127391903), abs=1e-9)
    assert found["middle"]["accuracy"] == pytest.approx(1 / 4, abs=1e-9)
    assert found["middle"]["interval"] == pytest.approx((0.0455872608097, 0.6993581574176), abs=1e-9)
    assert found["lost_in_the_middle"] == pytest.approx(1 / 2, abs=1e-9)
    assert found["lost_in_the_middle_interval"] == pytest.approx((-0.1354884005830, 0.7890832680848), abs=1e-9)
    tenths = {round(10 * row["low"]): (row["correct"], row["traces"]) for row in found["by_depth"]}
    assert tenths == {0: (3, 4), 1: (0, 1), 2: (1, 1), 3: (0, 1), 4: (1, 1), 5: (0, 1), 6: (0, 1), 7: (2, 2), 9: (1, 4)}


def test_tables_show_ends_middle_and_what_is_lost_of_each_model_that_has_them() -> None:
    student = accuracy_by_depth(graded([*ENDS, *MIDDLE, ((0.5,), U)]))
    base = accuracy_by_depth(graded(MIDDLE))
    assert [tuple(row) for row in depth_rows([None, student, base])] == [
        (f"{DOCUMENTS}, ends", ["", "75.0 % (30.1 to 95.4) of 4", ""]),
        (f"{DOCUMENTS}, middle", ["", "25.0 % (4.6 to 69.9) of 4", "25.0 % (4.6 to 69.9) of 4"]),
        (f"{DOCUMENTS}, lost in the middle", ["", "+50.0 points (-13.5 to 78.9)", ""]),
        (f"{DOCUMENTS}, ungraded", ["", "1", ""]),
    ]
    assert depth_rows([None, None]) == []


def test_a_gate_may_be_about_the_middle_alone() -> None:
    student, base = evaluated(graded([*ENDS, *MIDDLE])), evaluated(graded([(depths, I) for depths, _ in [*ENDS, *MIDDLE]]))
    gates = {
        "accuracy in middle": Gate(min=0.25),
        "accuracy above base in middle": Gate(min=0.3),
        "accuracy in ends": Gate(min=0.75),
    }
    rows = judge(gates, student=student, base=base)
    assert [(row.value, row.passed) for row in rows] == [(0.25, True), (0.25, False), (0.75, True)]
    [row] = judge({"accuracy in middle": Gate(min=0.0)}, student=evaluated(graded(ENDS)))
    assert row.value is None and not row.passed


def test_slices_are_told_only_of_prompts_with_places() -> None:
    [one] = graded([((0.05, 0.45), C)])
    assert one.slices == ("documents", "two-facts", "middle", "16k")
    assert GradedItem("facts/metals", True, C, 4, 6, "stop").slices == ("facts", "metals")


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(1, "1k"), (1024, "1k"), (1025, "2k"), (8_192, "8k"), (8_193, "16k"), (200_000, "256k"), (524_289, "1M"), (1 << 20, "1M")],
)
def test_lengths_are_powers_of_two_from_above(tokens: int, name: str) -> None:
    assert length_name(tokens) == name and is_length(name)


def test_middle_and_ends_share_out_all_attempts() -> None:
    """Against the slow way, on 300 attempts at random depths."""
    rng = random.Random(3)
    rows = [
        (tuple(round(rng.random(), rng.choice((1, 4))) for _ in range(rng.choice((1, 2)))), rng.choice((C, I, U)))
        for _ in range(300)
    ]
    figures = accuracy_by_depth(graded(rows))
    assert figures is not None
    found = figures[DOCUMENTS]
    middle = [grade for depths, grade in rows if any(3_000 <= round(10_000 * depth) < 7_000 for depth in depths) and grade != U]
    ends = [grade for depths, grade in rows if all(not 3_000 <= round(10_000 * depth) < 7_000 for depth in depths) and grade != U]
    assert (found["middle"]["correct"], found["middle"]["traces"]) == (middle.count(C), len(middle))
    assert (found["ends"]["correct"], found["ends"]["traces"]) == (ends.count(C), len(ends))


# --- from the recipe to the gates --------------------------------------------------------------------------------

BUDGET = 6_000


class Finished(NamedTuple):
    """A run whose three models have answered; prompts of both sides."""

    context: Context
    training: list[Prompt]
    items: list[Prompt]


def documented_suites() -> str:
    """The YAML of docs/evaluation.md, for prompts of fewer tokens."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    block = text.partition("## Long contexts, by depth\n\n")[2].partition("\n\n")[0]
    return "\n".join(line.removeprefix("    ") for line in block.splitlines()).replace("32000", str(BUDGET)).replace("2048", "64")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("long")
    (root / "recipes" / "books").mkdir(parents=True)
    for number in range(4):
        (root / "recipes" / "books" / f"b{number}.txt").write_text(prose(number, 60))
    (root / "project").mkdir()
    for number in range(240):
        lines = "".join(f"    if value > {number + line}:\n        value = value + {line}\n" for line in range(4))
        (root / "project" / f"module{number}.py").write_text(f"def step(value):\n{lines}    return value\n")
    recipe = root / "recipes" / "long.yaml"
    taught = "{type: documents, paths: [books/*.txt], budget_tokens: 6000, count: 8, seed: 11, licence: MIT}"
    models = "teacher: {model: embedded, licence: MIT}\nstudent: {model: embedded, licence: MIT}\n"
    recipe.write_text(f"name: long\n{models}generate:\n  prompts: [{taught}]\n{documented_suites()}\n")
    loaded = load_recipe(str(recipe))
    context = Context(loaded, open_run(loaded, root / "run"), str(recipe), (), Console(quiet=True))
    run_stage(PROMPTS, context)
    items = read_prompts(context.run, "eval")
    evaluate(context, opener(items), lambda count: None)
    return Finished(context, read_prompts(context.run, "train"), items)


def opener(items: list[Prompt]):  # noqa: ANN201
    """The teacher is always right, the base never, the student outside the middle but for one item of documents."""
    by_text = {item.messages[-1].get("content", ""): item for item in items}
    slip = min(item.prompt_id for item in items if item.task == DOCUMENTS and not in_the_middle(item))
    tokenizer = load_tokenizer("embedded")

    def open_target(context: Context, name: str) -> Target:
        def say(text: str) -> tuple[str, FinishReason]:
            item = by_text[text]
            at_ends = not in_the_middle(item) and item.prompt_id != slip
            return thoughtful(item.answer if name == "teacher" or (name == "student" and at_ends) else "nobody knows")

        spec = TargetSpec(name, name, "local", resolve("embedded"))
        return Target(spec, ScriptedEngine(tokenizer, say), tokenizer, name)

    return open_target


def in_the_middle(item: Prompt) -> bool:
    return is_middle(places_of(item.evidence).depths)


def test_the_documented_suites_make_held_out_items(finished: Finished) -> None:
    assert Counter(item.task for item in finished.items) == {DOCUMENTS: 42, BUGS: 20}
    assert all(item.split == "eval" and item.evidence and item.verifier == "exact" for item in finished.items)
    held_out = {path for path in (f"module{number}.py" for number in range(240)) if is_held_out(path)}
    assert {json.loads(item.provenance)["focus"] for item in finished.items if item.task == BUGS} <= held_out
    for item in finished.items:
        assert BUDGET / 2 < places_of(item.evidence).total_tokens <= BUDGET


def test_no_question_of_one_side_is_on_the_other_though_both_read_the_same_texts(finished: Finished) -> None:
    def asked(prompt: Prompt) -> str:
        return "Which code" + prompt.messages[-1].get("content", "").rpartition("Which code")[2].strip()

    def books(prompts: list[Prompt]) -> set[str]:
        return {file["sha256"] for prompt in prompts for file in json.loads(prompt.provenance)["files"]}

    items = [item for item in finished.items if item.task == DOCUMENTS]
    assert {asked(item) for item in items}.isdisjoint(map(asked, finished.training)) and len(set(map(asked, items))) == 42
    taught = "".join(prompt.messages[-1].get("content", "") for prompt in finished.training)
    for item in items:  # not among the decoys of a training prompt either
        assert all(place["fact"] not in taught for place in json.loads(item.evidence)["places"])
    assert books(items) == books(finished.training)


def test_a_student_that_is_right_only_outside_the_middle_has_lost_what_is_computed_by_hand(finished: Finished) -> None:
    """Of the grid's 42 pairs 18 have no place in the middle; one of these the student got wrong: 17/18 - 0/24."""
    run = finished.context.run
    student, teacher, base = (read_depths(run, name) for name in ("student", "teacher", "base"))
    assert student is not None and teacher is not None and base is not None and list(student) == [DOCUMENTS, BUGS]
    found = student[DOCUMENTS]
    assert (found["ends"]["correct"], found["ends"]["traces"]) == (17, 18)
    assert (found["middle"]["correct"], found["middle"]["traces"]) == (0, 24)
    assert found["lost_in_the_middle"] == pytest.approx(17 / 18, abs=1e-9)
    assert found["lost_in_the_middle_interval"] == pytest.approx((0.6998049462529, 0.9901248090217), abs=1e-9)
    assert teacher[DOCUMENTS]["lost_in_the_middle"] == base[DOCUMENTS]["lost_in_the_middle"] == 0.0
    middle = sum(in_the_middle(item) for item in finished.items if item.task == BUGS)
    assert 0 < middle < 20 and student[BUGS]["ends"]["correct"] == student[BUGS]["ends"]["traces"] == 20 - middle
    assert student[BUGS]["lost_in_the_middle"] == 1.0
    rows = gate_rows(finished.context)
    assert [(row.metric, row.value, row.passed) for row in rows] == [
        ("accuracy in middle", 0.0, False), ("accuracy above base in middle", 0.0, True),
    ]  # fmt: skip
    graded = read_evaluated(run, "student")
    assert graded is not None and graded.metrics.slices["8k"].num_items == 62
    places = [places_of(item.evidence) for item in finished.items]
    assert [(one.depths, one.context_tokens) for one in graded.items] == [tuple(one) for one in places]


def test_comparison_and_card_show_it(finished: Finished) -> None:
    context = finished.context
    compared = compare_models(context, ["teacher", "base"], opener(finished.items))
    lines = {line.partition("  ")[0]: line for line in compared.text.splitlines()}
    for text in ("100.0 % (86.2 to 100.0) of 24", "0.0 % (0.0 to 13.8) of 24"):
        assert text in lines[f"{DOCUMENTS}, middle"]
    assert lines[f"{DOCUMENTS}, lost in the middle"].count("+0.0 points") == 2
    assert "accuracy in middle" in lines  # what a gate is about: all tasks, the ungraded too
    assert read_json(compared.path.with_suffix(".json"))["accuracy_by_depth"]["base"][BUGS]["middle"]["correct"] == 0
    assert read_json(compared.path.with_suffix(".json"))["lm_eval"] == {}
    metrics = {
        name: one.metrics for name in ("teacher", "base", "student") if (one := read_evaluated(context.run, name)) is not None
    }
    facts = gather(context.run, context.recipe, metrics, gate_rows(context))
    card = render_card(facts, FINDINGS)
    row = next(line for line in card.splitlines() if line.startswith(f"| {DOCUMENTS}, lost"))
    assert row.split(" | ")[1:] == ["+0.0 points (-17.6 to 13.8)", "+0.0 points (-13.8 to 17.6)", "+94.4 points (70.0 to 99.0) |"]
    assert card.count(depth_table(facts.depths)) == 1
    assert "of documents, find-planted-bug, repository, two-facts alone" in card  # lengths and depths are no tasks


def test_rows_and_figures_of_an_earlier_version_are_read(finished: Finished, tmp_path: Path) -> None:
    """Which had neither columns nor figures of places."""
    run = finished.context.run
    figures = read_json(run.evaluation / "student.json")
    rows = read_table(run.evaluation / "student.arrow", sha256=figures["rows_sha256"])
    content = table_bytes(rows.drop_columns(["depths", "context_tokens"]))
    assert isinstance(rows.schema.field("depths").type, pa.ListType)
    write_bytes(tmp_path / "student.arrow", content)
    del figures["accuracy_by_depth"]
    write_json(tmp_path / "student.json", figures | {"rows_sha256": hashlib.sha256(content).hexdigest()})
    earlier = read_evaluated(run, "student", tmp_path)
    now = read_evaluated(run, "student")
    assert earlier is not None and now is not None and len(earlier.items) == 62
    assert all(item.depths == () and item.context_tokens == 0 for item in earlier.items)
    assert [item.grade for item in earlier.items] == [item.grade for item in now.items]
    assert accuracy_by_depth(earlier.items) is None
    assert json.loads(json.dumps(accuracy_by_depth(now.items))) == read_depths(run, "student")  # tuples are lists there


def test_the_report_shows_every_model_on_the_same_long_prompts(finished: Finished) -> None:
    shown = write_report(finished.context.run).read_text()
    section = shown[shown.index("<h2>Held-out items by depth</h2>") :].partition("<h2>")[2].partition("<h2>")[0]
    assert section.count('aria-label="accuracy by depth"') == 2 and section.count("<tr>") == 2 * (1 + 3)
    assert "+94.4 points (+70.0 to +99.0)" in section and f"<h3>{BUGS}</h3>" in section
