"""How many traces became what: the figures that a dataset's manifest carries and the ledger adds up."""

from typing import TypedDict

import numpy as np
import pyarrow as pa

from data.select import REJECTED, UNDECIDED, Decisions, coded, reasons

TOKENS = ("prompt_tokens", "reasoning_tokens", "answer_tokens")


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
    relabelled: int
    """Kept ones that say "I don't know" where their trace said something else."""


class Counts(TaskCounts):
    """The same over all tasks; prompts: how many different ones the kept traces answer; reasons most frequent first."""

    prompts: int
    rejected_by_reason: dict[str, int]
    unjudged_by_reason: dict[str, int]
    by_task: dict[str, TaskCounts]


def count(facts: pa.Table, decisions: Decisions, splits_N: np.ndarray, relabelled_N: np.ndarray) -> Counts:
    """facts: of the decisions' traces, in the same order, relabelled ones with their rows' tokens. splits_N: 0 train, 1
    validation, -1 neither."""
    codes_N, tasks = coded(facts["task"])
    by_task = {
        task: _task_counts(facts, decisions, splits_N, relabelled_N, codes_N == code)
        for code, task in enumerate(tasks)
        if (codes_N == code).any()
    }
    kept = facts["prompt_id"].filter(pa.array(decisions.kept_N))
    return {
        **_task_counts(facts, decisions, splits_N, relabelled_N, np.ones(len(codes_N), bool)),
        "prompts": len(kept.unique()),
        "rejected_by_reason": reasons(decisions, "rejected"),
        "unjudged_by_reason": reasons(decisions, "unjudged"),
        "by_task": by_task,
    }


def _task_counts(
    facts: pa.Table, decisions: Decisions, splits_N: np.ndarray, relabelled_N: np.ndarray, mine_N: np.ndarray
) -> TaskCounts:
    kept_N = mine_N & decisions.kept_N
    prompt, reasoning, answer = (int(facts[name].to_numpy()[kept_N].sum()) for name in TOKENS)
    return {
        "completed": int(mine_N.sum()),
        "kept": int(kept_N.sum()),
        "rejected": int((decisions.fates_N[mine_N] == REJECTED).sum()),
        "unjudged": int((decisions.fates_N[mine_N] == UNDECIDED).sum()),
        "train_rows": int((splits_N[mine_N] == 0).sum()),
        "validation_rows": int((splits_N[mine_N] == 1).sum()),
        "prompt_tokens": prompt,
        "reasoning_tokens": reasoning,
        "answer_tokens": answer,
        "relabelled": int((relabelled_N & kept_N).sum()),
    }
