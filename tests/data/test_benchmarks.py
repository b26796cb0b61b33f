"""What of benchmark files and of the pipeline's own evaluation prompts counts as evaluation text."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from configs.errors import UnusableInput
from data.benchmarks import OWN, Item, boilerplate_sample, evaluation_items, find_benchmarks, read_benchmark
from data.curriculum import fact_rows
from data.decontaminate import scan
from data.ngram_index import build_index
from tests.data.make_run import make_prompt


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_text_fields_are_known_by_their_usual_names_and_ids_too(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mix.jsonl",
        {"id": 7, "question": "Why?", "answer": "So.", "subject": "none of it"},
        {"task_id": "HumanEval/0", "prompt": "def f():", "canonical_solution": "return 1", "test": "assert f()"},
        {"messages": [{"role": "user", "content": "Ask"}, {"role": "assistant", "content": "Say"}], "idx": None},
    )
    assert read_benchmark(path, "mix.jsonl") == [
        Item("mix.jsonl", "7", "question", "Why?"),
        Item("mix.jsonl", "7", "answer", "So.", is_question=False),
        Item("mix.jsonl", "HumanEval/0", "prompt", "def f():"),
        Item("mix.jsonl", "HumanEval/0", "canonical_solution", "return 1", is_question=False),
        Item("mix.jsonl", "3", "messages", "Ask"),
    ]


def test_named_fields_replace_the_usual_ones_and_lists_are_joined(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "Why?", "choices": ["one", "two"]})
    assert read_benchmark(path, "a.jsonl", ["choices"]) == [Item("a.jsonl", "1", "choices", "one\ntwo")]


def test_parquet_reads_as_jsonl_does(tmp_path: Path) -> None:
    rows = [{"id": "x", "question": "Why?", "answer": "So."}, {"id": "y", "question": "", "answer": "No."}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert read_benchmark(tmp_path / "b.parquet", "b") == read_benchmark(write(tmp_path / "b.jsonl", *rows), "b")


def test_rows_that_declare_themselves_training_are_no_evaluation_items(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", {"question": "a", "split": "train"}, {"question": "b", "split": "test"})
    assert [item.text for item in read_benchmark(path, "f.jsonl")] == ["b"]


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ('{"text": "a"}\n{"text"', [], r"benchmark x.jsonl line 2: not valid JSON"),
        ("[1]", [], "benchmark x.jsonl line 1: expected a JSON object, found list"),
        ('{"body": "a", "tag": "b"}', [], r"no evaluation text in any of the fields .*\(found: body, tag\); give the field"),
        ("", [], "no rows; expected at least one item"),
        ('{"body": "a"}', ["title"], r"benchmark x.jsonl: no field title \(found: body\)"),
    ],
)
def test_a_file_without_evaluation_text_is_refused_in_one_line(
    tmp_path: Path, content: str, fields: list[str], message: str
) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UnusableInput, match=message) as caught:
        read_benchmark(tmp_path / "x.jsonl", "x.jsonl", fields)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("PAR?")
    with pytest.raises(UnusableInput, match="benchmark x.parquet: not readable as Parquet"):
        read_benchmark(tmp_path / "x.parquet", "x.parquet")


def test_patterns_are_looked_up_beside_the_recipe_first(tmp_path: Path) -> None:
    beside, here = tmp_path / "recipe", tmp_path / "here"
    for folder, name in ((beside, "a.jsonl"), (beside, "b.parquet"), (here, "a.jsonl"), (here, "c.jsonl")):
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
    assert find_benchmarks(["c.jsonl", "*.jsonl", "b.*"], [beside, here]) == {
        "a.jsonl": beside / "a.jsonl",
        "b.parquet": beside / "b.parquet",
        "c.jsonl": here / "c.jsonl",
    }
    with pytest.raises(UnusableInput, match=r"benchmark d\*\.jsonl: no such file"):
        find_benchmarks(["d*.jsonl"], [beside, here])
    (here / "notes.txt").touch()
    with pytest.raises(UnusableInput, match=r"benchmark notes.txt: expected one of \.jsonl, \.parquet"):
        find_benchmarks(["notes.txt"], [beside, here])


def test_of_own_prompts_the_evaluation_questions_count_alone() -> None:
    asked = make_prompt("Tell me the metal mined in Fasosur.", split="eval")
    packed = dataclasses.replace(asked, prompt_id="p", provenance='{"files": []}')
    assert list(evaluation_items([make_prompt("Which metal is mined in Fasosur?"), asked, packed])) == [
        Item(OWN, asked.prompt_id, "prompt", "Tell me the metal mined in Fasosur."),
        Item(OWN, "p", "prompt", "Tell me the metal mined in Fasosur.", is_packed=True),
    ]


def test_boilerplate_is_learnt_from_an_even_sample_of_training_prompts_whatever_their_order() -> None:
    prompts = [make_prompt(f"What is {number}?", split="eval" if number % 3 == 0 else "train") for number in range(30)]
    sample = boilerplate_sample(prompts, 5)
    assert len(sample) == 5 and sample == boilerplate_sample(prompts[::-1], 5)
    assert set(sample) < {f"What is {number}?" for number in range(30) if number % 3}


def test_facts_split_by_phrasing_leak_by_their_phrasing_and_not_by_their_answer() -> None:
    """Every fact of the embedded recipe: no training question, with its answer, is a leak; every evaluation question is."""
    rows = list(fact_rows())
    sides = {split: [row for row in rows if row["split"] == split] for split in ("train", "eval")}
    index = build_index(evaluation_items([make_prompt(str(row["question"]), split="eval") for row in sides["eval"]]))
    train = [f"{row['question']} It is known for {row['answer']}." for row in sides["train"]]
    assert scan(index, train, [True] * len(train)) == []
    leaks = scan(index, [f"Someone asked: {row['question']}" for row in sides["eval"]])
    assert {hit.text for hit in leaks} == set(range(len(sides["eval"])))


def test_items_that_share_an_id_are_told_apart_by_their_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"id": identity, "question": "Why?"} for identity in ("a", "a", "b")))
    assert [item[1] for item in read_benchmark(path, "a.jsonl")] == ["a", "a (row 2)", "b"]
