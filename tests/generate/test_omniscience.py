"""Closed-book facts in the columns of AA-Omniscience: what becomes of a row, and the words that refuse one."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.prompt_sources import JsonlSource, OmniscienceSource
from data.records import Prompt
from data.verify import VERIFIERS, exact, self_check
from generate.prompts import PromptList, build_prompt_set, source_hashes

FACTS = [
    {"question": "Who founded Lorn?", "answer": "Ash, the elder", "domain": "history", "aliases": ["Ash", "Ash of Lorn"]},
    {"question": "Which metal melts first?", "answer": "mercury", "domain": "chemistry", "topic": "metals"},
    {"question": "Who will win in 2090?", "answer": "", "domain": "history", "answerable": False},
]
HEADER = ["question", "answer", "domain", "topic", "aliases", "answerable"]


def write_csv(path: Path, *rows: dict[str, object]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, HEADER)
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"aliases": "|".join(row.get("aliases", []))})  # type: ignore[arg-type]


def build(folder: Path, **changes: object) -> PromptList:
    (folder / "train.jsonl").write_text('{"question": "2+2?", "answer": "4", "split": "train"}')
    source = OmniscienceSource.model_validate({"path": "facts.jsonl"} | changes)
    return build_prompt_set([JsonlSource(path="train.jsonl")], [source], [folder])


def items(folder: Path, *rows: object, **changes: object) -> list[Prompt]:
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [prompt for prompt in build(folder, **changes).prompts if prompt.split == "eval"]


def test_every_row_of_a_suite_is_a_closed_book_item_of_its_domain(tmp_path: Path) -> None:
    found = items(tmp_path, *FACTS)
    assert [(item.task, item.known, item.answer, item.verifier) for item in found] == [
        ("facts/history", True, "Ash, the elder", "exact"),
        ("facts/chemistry", True, "mercury", "exact"),
        ("facts/history", False, "I don't know", "exact"),
    ]
    assert all(self_check(item) and "I don't know" in item.messages[0].get("content", "") for item in found)
    assert found[0].prompt_version.startswith("answer-or-decline@")


def test_csv_and_jsonl_of_the_same_facts_are_the_same_prompts(tmp_path: Path) -> None:
    by_lines = items(tmp_path, *FACTS)
    write_csv(tmp_path / "facts.csv", *FACTS)
    by_cells = [prompt for prompt in build(tmp_path, path="facts.csv").prompts if prompt.split == "eval"]
    assert [item.prompt_id for item in by_cells] == [item.prompt_id for item in by_lines]
    assert [(one.details, one.known, one.task) for one in by_cells] == [(one.details, one.known, one.task) for one in by_lines]


@pytest.mark.parametrize(
    ("said", "score"),
    [("Ash, the elder", 1.0), (" ash. ", 1.0), ("ASH OF LORN", 1.0), ("Bram", 0.0), ("", 0.0), ("Ash or Bram", 0.0),
     ("I don't know", 0.0)],
)  # fmt: skip
def test_an_alias_is_as_right_as_the_answer(tmp_path: Path, said: str, score: float) -> None:
    [item] = items(tmp_path, FACTS[0])
    assert VERIFIERS["exact"].score(item, said) == score


@pytest.mark.parametrize("details", ["[1]", '{"aliases"', '{"aliases": 3}', '{"aliases": [3, ""]}', '["aliases"]', "{}", "9"])
def test_details_of_another_form_hold_no_alias_and_break_nothing(tmp_path: Path, details: str) -> None:
    [item] = items(tmp_path, FACTS[1])
    odd = dataclasses.replace(item, details=details)
    assert [exact.score(odd, said) for said in ("mercury", "", "3", "aliases")] == [1.0, 0.0, 0.0, 0.0]


def test_a_template_of_ones_own_may_show_domain_and_topic_but_never_the_answer(tmp_path: Path) -> None:
    (tmp_path / "ask.md").write_text("[{{ domain }}{{ topic }}] {{ question }} Or say: not known")
    found = items(tmp_path, *FACTS[:2], template="ask.md")
    assert found[1].messages[0].get("content", "") == "[chemistrymetals] Which metal melts first? Or say: not known"
    (tmp_path / "ask.md").write_text("{{ question }} {{ answer }}")
    with pytest.raises(UnusableInput, match=r"template ask: unknown variable 'answer'"):
        items(tmp_path, *FACTS, template="ask.md")


def test_a_judge_may_be_named_and_what_nobody_knows_stays_exact(tmp_path: Path) -> None:
    assert [item.verifier for item in items(tmp_path, *FACTS, verifier="llm_judge")] == ["llm_judge", "llm_judge", "exact"]


def test_a_row_may_name_its_own_side(tmp_path: Path) -> None:
    assert len(items(tmp_path, FACTS[0], FACTS[1] | {"split": "train"})) == 1
    assert build(tmp_path).left_out == {"not_held_out": 1}


def test_the_file_decides_the_set(tmp_path: Path) -> None:
    items(tmp_path, *FACTS)
    source = OmniscienceSource(path="facts.jsonl")
    before = source_hashes([source], [tmp_path])
    assert set(before) == {"facts.jsonl", "template answer-or-decline"}
    items(tmp_path, FACTS[0])
    assert source_hashes([source], [tmp_path]) != before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": ""}, "question is missing or empty, expected a text"),
        ({"question": 3}, "question is int, expected a text"),
        ({"answer": None}, "answer is missing or empty"),
        ({"domain": " "}, "domain is missing or empty"),
        ({"answer": "I don't know."}, 'the answer "I don\'t know." declines; expected a fact, or answerable false'),
        ({"answerable": "maybe"}, "answerable is 'maybe', expected true or false"),
        ({"answerable": False}, "answerable is false and the answer is 'mercury'; expected an empty answer"),
        ({"answerable": False, "answer": "", "aliases": ["Hg"]}, "aliases of an answer that nobody can know"),
        ({"aliases": ["Hg", 3]}, "aliases is ['Hg', 3], expected a list of texts"),
        ({"aliases": "[3"}, "aliases is not valid JSON"),
        ({"aliases": ["..."]}, "details hold aliases that are no list of texts"),
        ({"aliases": ["I don't know"]}, "an alias stands beside or is a way to decline"),
        ({"split": "test"}, "split 'test', expected train or eval"),
        ({"difficulty": 3}, "unknown column 'difficulty'; known columns: question, answer, domain, topic"),
    ],
)
def test_a_row_that_is_no_fact_is_one_line_with_file_and_line(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(UnusableInput) as raised:
        items(tmp_path, FACTS[0], FACTS[1] | change)
    assert str(raised.value).startswith("facts.jsonl line 2: ") and said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question,answer\na,b\n", "facts.csv line 1: no column 'domain'; expected a header with question, answer, domain"),
        ("question,answer,domain,answer\n", "facts.csv line 1: column 'answer' stands twice"),
        ('question,answer,domain\n"a\nb",c,d\ne,f\n', "facts.csv line 4: 2 cells, expected 3 as in the header"),
        ('question,answer,domain\na,b,"c\n', "facts.csv line 2: not valid CSV"),
        ("question,answer,domain\na,,c\n", "facts.csv line 2: answer is missing or empty"),
        ("", "facts.csv line 1: no column 'question'"),
        (b"question,answer,domain\n\xff,b,c\n", "not UTF-8"),
    ],
)
def test_a_damaged_table_is_one_line_with_file_and_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    (tmp_path / "facts.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UnusableInput) as raised:
        build(tmp_path, path="facts.csv")
    assert str(raised.value).startswith("facts.csv") and said in str(raised.value) and "\n" not in str(raised.value)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "facts.txt").write_text("a")
    with pytest.raises(UnusableInput, match=r"facts\.txt: expected a file that ends in \.jsonl or \.csv"):
        build(tmp_path, path="facts.txt")
