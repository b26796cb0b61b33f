"""What building with another view would change, before anything is built: values only, over columns.

N completed traces, the same ones under both views, in any order
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Taken(NamedTuple):
    """What one view makes of the traces. reasons_N: int, positions in `words`, whose first is "": kept. tokens_N: int64, training
    tokens of the row. relabelled_N: bool, kept as "I don't know"."""

    reasons_N: np.ndarray
    words: tuple[str, ...]
    tokens_N: np.ndarray
    relabelled_N: np.ndarray

    @property
    def kept_N(self) -> np.ndarray:
        return self.reasons_N == 0


class Groups(NamedTuple):
    """prompt_codes_N, task_codes_N: int64; the latter are positions in `tasks`."""

    prompt_codes_N: np.ndarray
    task_codes_N: np.ndarray
    tasks: Sequence[str]


class TaskDifference(NamedTuple):
    """Rows and training tokens of one task under either view, and the rows that only one of them has."""

    task: str
    current_rows: int
    other_rows: int
    gained_rows: int
    lost_rows: int
    current_tokens: int
    other_tokens: int


@dataclass(frozen=True, slots=True)
class Difference:
    """What building with the other view would change. Tokens of a row that both keep can differ too: relabelled, it is shorter.

    gained_by_reason: rows that only the other view has, by the reason for which the current one turns them down. lost_by_reason:
    rows that only the current one has, by the other's reason. relabelled: rows that become "I don't know", current and other.
    prompts: with at least one row. by_task: every task with a row in either, by name.
    """

    current_rows: int
    other_rows: int
    gained_rows: int
    lost_rows: int
    current_tokens: int
    other_tokens: int
    current_prompts: int
    other_prompts: int
    current_relabelled: int
    other_relabelled: int
    gained_by_reason: dict[str, int]
    lost_by_reason: dict[str, int]
    gained_tasks: tuple[str, ...]
    lost_tasks: tuple[str, ...]
    by_task: tuple[TaskDifference, ...]


def what_if(groups: Groups, current: Taken, other: Taken) -> Difference:
    """Rows, tokens and tasks gained and lost."""
    gained_N, lost_N = other.kept_N & ~current.kept_N, current.kept_N & ~other.kept_N
    tasks = tuple(_task_differences(groups, current, other))
    return Difference(
        current_rows=int(current.kept_N.sum()),
        other_rows=int(other.kept_N.sum()),
        gained_rows=int(gained_N.sum()),
        lost_rows=int(lost_N.sum()),
        current_tokens=int(current.tokens_N[current.kept_N].sum()),
        other_tokens=int(other.tokens_N[other.kept_N].sum()),
        current_prompts=len(np.unique(groups.prompt_codes_N[current.kept_N])),
        other_prompts=len(np.unique(groups.prompt_codes_N[other.kept_N])),
        current_relabelled=int(current.relabelled_N.sum()),
        other_relabelled=int(other.relabelled_N.sum()),
        gained_by_reason=_by_reason(current, gained_N),
        lost_by_reason=_by_reason(other, lost_N),
        gained_tasks=tuple(each.task for each in tasks if not each.current_rows),
        lost_tasks=tuple(each.task for each in tasks if not each.other_rows),
        by_task=tasks,
    )


def _task_differences(groups: Groups, current: Taken, other: Taken) -> list[TaskDifference]:
    def rows(chosen_N: np.ndarray) -> np.ndarray:
        return np.bincount(groups.task_codes_N[chosen_N], minlength=len(groups.tasks))

    def tokens(taken: Taken) -> np.ndarray:
        total = np.zeros(len(groups.tasks), np.int64)
        np.add.at(total, groups.task_codes_N[taken.kept_N], taken.tokens_N[taken.kept_N])
        return total

    kept = (current.kept_N, other.kept_N)
    figures = (rows(kept[0]), rows(kept[1]), rows(kept[1] & ~kept[0]), rows(kept[0] & ~kept[1]), tokens(current), tokens(other))
    each = (
        TaskDifference(task, *(int(figure[code]) for figure in figures))
        for code, task in enumerate(groups.tasks)
        if figures[0][code] or figures[1][code]
    )
    return sorted(each)


def _by_reason(taken: Taken, chosen_N: np.ndarray) -> dict[str, int]:
    """Why this view turns the chosen traces down; most frequent first, then by name."""
    counted = Counter(taken.words[code] for code in taken.reasons_N[chosen_N].tolist())
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))
