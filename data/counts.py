"""How many traces became what: the figures that a dataset's manifest carries and the ledger adds up."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

import pyarrow as pa

from data.select import Decision, reasons


class TaskCounts(TypedDict):
    """Traces of one task; rows and tokens are those of the kept ones."""

    completed: int
    kept: int
    rejected: int
    unjudged: int
    train_rows: int
    validation_rows: int
    prompt_tokens: int
    reasoning_tokens: int
    answer_tokens: int


class Counts(TaskCounts):
    """The same over all tasks; prompts: how many different ones the kept traces answer; reasons most frequent first."""

    prompts: int
    rejected_by_reason: dict[str, int]
    unjudged_by_reason: dict[str, int]
    by_task: dict[str, TaskCounts]


def count(tasks: Sequence[str], decisions: Sequence[Decision], splits: Mapping[str, pa.Table]) -> Counts:
    """tasks: of each decision's trace, in the same order. splits: the dataset's rows."""
    fates: dict[str, Counter[str]] = {task: Counter() for task in sorted(set(tasks))}
    for task, decision in zip(tasks, decisions, strict=True):
        fates[task][decision.fate] += 1
    return {
        **_task_counts(sum(fates.values(), Counter()), splits),
        "prompts": len({prompt_id for table in splits.values() for prompt_id in table["prompt_id"].to_pylist()}),
        "rejected_by_reason": reasons(decisions, "rejected"),
        "unjudged_by_reason": reasons(decisions, "unjudged"),
        "by_task": {task: _task_counts(counter, _of_task(splits, task)) for task, counter in fates.items()},
    }


def _of_task(splits: Mapping[str, pa.Table], task: str) -> dict[str, pa.Table]:
    return {
        split: table.filter(pa.array([its_task == task for its_task in table["task"].to_pylist()], pa.bool_()))
        for split, table in splits.items()
    }


def _task_counts(fates: Counter[str], splits: Mapping[str, pa.Table]) -> TaskCounts:
    def total(column: str) -> int:
        return sum(sum(table[column].to_pylist()) for table in splits.values())

    return {
        "completed": fates.total(),
        "kept": fates["kept"],
        "rejected": fates["rejected"],
        "unjudged": fates["unjudged"],
        "train_rows": splits["train"].num_rows,
        "validation_rows": splits["validation"].num_rows,
        "prompt_tokens": total("prompt_tokens"),
        "reasoning_tokens": total("reasoning_tokens"),
        "answer_tokens": total("answer_tokens"),
    }
