"""Which evaluation items come from families that nothing was taught of: distilled models generalise worse than their scores."""

from collections.abc import Collection, Iterable
from typing import Literal

from data.prompt_set import PromptSet
from data.records import Prompt

ItemOrigin = Literal["unseen", "held_out"]
"""unseen: no training prompt came from the item's family. held_out: some did, though not this one."""


def family_of(task: str) -> str:
    """`facts/metals` and `facts/colours` are one family."""
    return task.partition("/")[0]


def families_of(tasks: Iterable[str]) -> frozenset[str]:
    return frozenset(map(family_of, tasks))


def unseen_families(trained: Iterable[str], evaluated: Iterable[str]) -> frozenset[str]:
    """Families among the evaluated tasks that none of the trained tasks belongs to."""
    return families_of(evaluated) - families_of(trained)


def origin_of(item: Prompt, trained_families: Collection[str]) -> ItemOrigin:
    """trained_families: of the training prompts of the same prompt set."""
    return "held_out" if family_of(item.task) in trained_families else "unseen"


def trained_families(prompts: PromptSet) -> frozenset[str]:
    """Families of the set's training prompts. Reads their tasks alone: a million prompts need not fit into memory."""
    index = prompts.index("train")
    return families_of(index.tasks[code] for code in set(index.task_codes_N.tolist()))
