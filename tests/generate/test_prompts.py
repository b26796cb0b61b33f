"""Prompt sources: what is read, which side it falls on, and what is refused with which words."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.load import RECIPES, load_recipe
from configs.prompt_sources import JsonlSource, ReasoningGymSource
from data.curriculum import Row, fact_rows, unseen_rows
from data.split import is_held_out
from generate.prompts import PromptList, build_prompt_set
from student.unseen import unseen_families

SUMS = ReasoningGymSource(
    task="chain_sum", params={"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3}, count=30, seed=5
)


def rows(folder: Path, *lines: object) -> JsonlSource:
    (folder / "p.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return JsonlSource(path="p.jsonl")


def build(folder: Path, *lines: object) -> PromptList:
    return build_prompt_set([rows(folder, *lines)], [], [folder])


def test_reasoning_gym_items_fall_on_the_side_their_text_says(tmp_path: Path) -> None:
    found = build_prompt_set([SUMS], [SUMS.model_copy(update={"count": 10})], [tmp_path])
    sides = {split: [p for p in found.prompts if p.split == split] for split in ("train", "eval")}
    assert len(sides["train"]) == 30 and len(sides["eval"]) == 10
    for item in found.prompts:
        assert is_held_out(item.messages[0].get("content", "")) == (item.split == "eval")
    assert len({item.prompt_id for item in found.prompts}) == 40


def test_the_same_spec_gives_the_same_prompts(tmp_path: Path) -> None:
    assert build_prompt_set([SUMS], [], [tmp_path]).prompts == build_prompt_set([SUMS], [], [tmp_path]).prompts


def test_the_embedded_facts_are_split_by_phrasing_and_by_place() -> None:
    source = JsonlSource(path="embedded/facts.jsonl")
    found = build_prompt_set([source], [source], [RECIPES]).prompts
    known = {
        split: {p.messages[0].get("content", "") for p in found if p.known and p.split == split} for split in ("train", "eval")
    }
    unknown = {split: [p for p in found if p.known is False and p.split == split] for split in ("train", "eval")}
    assert len(known["eval"]) >= 100 and len(unknown["eval"]) >= 200
    assert not known["train"] & known["eval"]

    def places(prompts: list) -> set[str]:
        return {word.strip("?.,'s") for p in prompts for word in p.messages[0]["content"].split()[1:] if word[0].isupper()}

    assert not places(unknown["train"]) & places(unknown["eval"])
    assert all(p.answer == "I don't know" for side in unknown.values() for p in side)


@pytest.mark.parametrize(("name", "made"), [("facts", fact_rows), ("unseen", unseen_rows)])
def test_a_shipped_file_is_what_the_curriculum_writes(name: str, made: Callable[[], Iterator[Row]]) -> None:
    lines = (RECIPES / "embedded" / f"{name}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(made())


def test_the_embedded_recipe_asks_for_at_least_300_items_with_twins_and_families_that_nobody_distils() -> None:
    recipe = load_recipe("embedded").recipe
    found = build_prompt_set(recipe.generate.prompts, recipe.evaluate.prompt_suites, [RECIPES]).prompts
    items = [p for p in found if p.split == "eval"]
    assert len(items) >= 300
    unseen = unseen_families((p.task for p in found if p.split == "train"), (p.task for p in items))
    assert unseen == {"elsewhere", "pieces"}
    twins = Counter(p.task.partition("/")[0] for p in items if p.twin_of)
    assert twins == {"chain_sum": 16, "spell_backward": 16, "letter_counting": 16, "facts": 36}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a", ', "p.jsonl line 2: not valid JSON"),
        ("[1]", "p.jsonl line 2: expected a JSON object, found list"),
        ({"question": "a", "anwser": "b"}, "p.jsonl line 2: unknown key 'anwser'"),
        ({"answer": "b"}, "p.jsonl line 2: expected either question or messages"),
        ({"question": " "}, "p.jsonl line 2: empty question"),
        ({"question": "a", "answer": 3}, "p.jsonl line 2: answer is int, expected a string"),
        ({"question": "a", "split": "test"}, "p.jsonl line 2: split 'test', expected train or eval"),
        ({"question": "a", "answer": "b", "verifier": "guess"}, "p.jsonl line 2: unknown verifier 'guess'"),
        ({"messages": [{"role": "user"}]}, "p.jsonl line 2: each message needs a role and a content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "p.jsonl line 2: the last message is the assistant's"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(UnusableInput) as raised:
        build(tmp_path, {"question": "fine", "split": "train"}, line)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_an_empty_prompt_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="the prompt set is empty"):
        build(tmp_path, {"question": "only held back", "split": "eval"})
    with pytest.raises(UnusableInput, match="the prompt set is empty"):
        build_prompt_set([], [], [tmp_path])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"prompt file nowhere\.jsonl"):
        build_prompt_set([JsonlSource(path="nowhere.jsonl")], [], [tmp_path])


def test_one_text_on_both_sides_is_refused(tmp_path: Path) -> None:
    source = rows(tmp_path, {"question": "twice", "split": "train"}, {"question": " twice ", "split": "eval"})
    with pytest.raises(UnusableInput, match="is also a training prompt"):
        build_prompt_set([source], [source], [tmp_path])


def test_duplicates_are_counted_not_kept(tmp_path: Path) -> None:
    found = build(tmp_path, {"question": "a", "split": "train"}, {"question": "a", "split": "train"})
    assert len(found.prompts) == 1 and found.left_out == {"duplicate": 1}


def test_a_task_with_too_few_distinct_items_says_so(tmp_path: Path) -> None:
    tiny = ReasoningGymSource(
        task="chain_sum", params={"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}, count=50
    )
    with pytest.raises(UnusableInput, match="distinct train items"):
        build_prompt_set([tiny], [], [tmp_path])


def test_an_unknown_task_or_parameter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="reasoning_gym nonsense"):
        build_prompt_set([ReasoningGymSource(task="nonsense", count=1)], [], [tmp_path])
    with pytest.raises(UnusableInput, match="reasoning_gym chain_sum"):
        build_prompt_set([ReasoningGymSource(task="chain_sum", params={"digits": 3}, count=1)], [], [tmp_path])
