"""Families that nothing was taught of, from the prompt set alone."""

from pathlib import Path

import pytest

from data.prompt_set import PromptSet
from data.records import Prompt, Split
from data.store import RunFolder
from student.unseen import families_of, origin_of, trained_families, unseen_families
from tests.data.make_run import make_prompt, seal_prompts


def of_task(task: str, split: Split = "eval") -> Prompt:
    return make_prompt(f"{task} {split}?", split=split, task=task)


@pytest.mark.parametrize(
    ("trained", "evaluated", "unseen"),
    [
        ([], ["a"], {"a"}),
        (["a"], ["a"], set()),
        (["facts/metals"], ["facts/colours", "sums"], {"sums"}),
        (["facts"], ["facts/metals"], set()),
        (["factsheet"], ["facts/metals"], {"facts"}),
        (["a", "b"], [], set()),
    ],
)
def test_a_family_is_unseen_when_no_trained_task_belongs_to_it(
    trained: list[str], evaluated: list[str], unseen: set[str]
) -> None:
    assert unseen_families(trained, evaluated) == unseen
    assert {task.split("/")[0] for task in evaluated if origin_of(of_task(task), families_of(trained)) == "unseen"} == unseen


def test_what_was_taught_is_read_from_the_training_side_alone(tmp_path: Path) -> None:
    """Evaluation items stand in the same file; their tasks are not taught."""
    run = RunFolder(tmp_path)
    seal_prompts(run, [of_task("sums", "train"), of_task("facts/metals", "train"), of_task("sums"), of_task("words")], 2)
    with PromptSet.open(run) as prompts:
        assert trained_families(prompts) == {"sums", "facts"}
        items = list(prompts.iterate("eval"))
        assert [origin_of(item, trained_families(prompts)) for item in items] == ["held_out", "unseen"]
