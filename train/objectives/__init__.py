"""What a trained position is worth, and which way its logits should go: one file an objective, no autograd in any.

An objective sees the logits of a few positions, gives their summed loss in nats, and turns those logits into its gradient in
place, in closed form: [C, V] is large, and every pass over it costs (train/losses.py calls it, a chunk at a time, and owns the
matrix products around it).

    cross_entropy.py    the trace's own next token
    forward_kl.py       KL(teacher || student) over buckets
    reverse_kl.py       KL(student || teacher) over buckets
    mixed.py            logits to buckets, a divergence over them mixed with cross-entropy, and back to a gradient of logits
    targets.py          what the teacher said; rows.py: in what pieces the processor takes a chunk

Shape suffixes: C positions of a chunk, N supervised positions of a row, V vocabulary, K kept logits, B = K + 1 buckets.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple, Protocol

import torch

from configs.training import CrossEntropy, Objective
from train.objectives.cross_entropy import cross_entropy
from train.objectives.forward_kl import forward_kl
from train.objectives.mixed import mixed
from train.objectives.reverse_kl import reverse_kl
from train.objectives.targets import TeacherTargets


class Function(Protocol):
    """Loss in nats SUMMED over the chunk's positions. logits_CV: float32 or float64, divided by the temperature; overwritten with
    the gradient of the sum with respect to the logits themselves when asked for, else with nothing of use. targets_C: int64.
    teacher: of the same positions; only cross-entropy does without."""

    def __call__(
        self, logits_CV: torch.Tensor, targets_C: torch.Tensor, teacher: TeacherTargets | None, *, gradient: bool
    ) -> torch.Tensor: ...


class ChunkLoss(NamedTuple):
    """function: on logits / temperature. The matrix product that makes the logits divides them for nothing; a pass of its own was
    a quarter of what a divergence adds."""

    function: Function
    temperature: float


OBJECTIVES: Mapping[str, Function] = {  # type: ignore
    "cross_entropy": cross_entropy,
    "forward_kl": partial(mixed, divergence=forward_kl),
    "reverse_kl": partial(mixed, divergence=reverse_kl),
}
CROSS_ENTROPY = ChunkLoss(cross_entropy, 1.0)
"""Of any objective, where there is no teacher."""


def chunk_loss(objective: Objective) -> ChunkLoss:
    """The objective as a recipe states it."""
    chosen = OBJECTIVES[objective.type]
    if isinstance(objective, CrossEntropy):
        return ChunkLoss(chosen, 1.0)
    return ChunkLoss(partial(chosen, weight=objective.weight, temperature=objective.temperature), objective.temperature)  # type: ignore
