"""The teacher's stored distributions at the supervised positions of a packed row.

Shape suffixes: N supervised positions, K kept logits.
"""

from typing import NamedTuple

import torch


class TeacherTargets(NamedTuple):
    """ids_NK: int64, the teacher's likeliest. log_probs_NK: float32, theirs at the objective's temperature over the FULL
    vocabulary, so that exp() sums to at most 1 (what is missing is the tail); -inf where a slot is unused. has_N: bool; False
    is a position without stored logits, which is trained by cross-entropy alone.

    The N rows are the positions of the packed row whose target is not IGNORE_INDEX, in order.
    """

    ids_NK: torch.Tensor
    log_probs_NK: torch.Tensor
    has_N: torch.Tensor

    def part(self, rows: slice) -> "TeacherTargets":
        return TeacherTargets(self.ids_NK[rows], self.log_probs_NK[rows], self.has_N[rows])

    def to(self, device: torch.device | str) -> "TeacherTargets":
        return TeacherTargets(self.ids_NK.to(device), self.log_probs_NK.to(device), self.has_N.to(device))
