"""The trace's own next token: -log softmax(logits)[target].

Shape suffixes: C positions of a chunk, R rows of a block of them, V vocabulary.
"""

import torch

from train.objectives.rows import row_blocks
from train.objectives.targets import TeacherTargets


def cross_entropy(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, teacher: TeacherTargets | None = None, *, gradient: bool
) -> torch.Tensor:
    """A Function (train/objectives/__init__.py) at temperature 1. Its gradient is softmax minus one-hot; no teacher is asked.

    The exponential is taken once, below each row's largest logit, and divided by its sum where a gradient is wanted:
    log-sum-exp and a second exponential were half as much again.
    """
    wanted_C1 = logits_CV.gather(-1, targets_C[:, None])
    best_C1, sum_C1 = torch.empty_like(wanted_C1), torch.empty_like(wanted_C1)
    for block in row_blocks(logits_CV):
        logits_RV = logits_CV[block]
        torch.amax(logits_RV, -1, keepdim=True, out=best_C1[block])
        logits_RV.sub_(best_C1[block]).exp_()
        torch.sum(logits_RV, -1, keepdim=True, out=sum_C1[block])
        if gradient:
            logits_RV.mul_(sum_C1[block].reciprocal())
    if gradient:
        logits_CV.scatter_add_(-1, targets_C[:, None], torch.full_like(wanted_C1, -1.0))
    return (sum_C1.log() + best_C1 - wanted_C1).sum()
