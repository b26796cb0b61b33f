"""A divergence from the teacher's stored distribution, mixed with cross-entropy: (1 - w) x CE + w x t^2 x KL at temperature t.

The teacher's K likeliest tokens are a bucket each, with their true probabilities: log Z was stored over the full vocabulary, so
nothing is renormalised over K. All other tokens are one more bucket, the tail, which is what those leave of 1. The student's
logits fall into the same buckets. A divergence of buckets never exceeds that of the whole distributions, and equals it when K
is the vocabulary. Guessing how the tail is spread is what goes wrong: a uniform tail gave 0.29 nats where the truth was 0.78
(V = 154,880, K = 128, t = 2).

The student's tail is summed by itself, below its own largest logit, so it is exact however little the student leaves it; taken
as 1 minus the rest it would be rounding below 1e-7, and its logarithm nonsense.

Shape suffixes: C positions of a chunk, R rows of a block of them, V vocabulary, K kept logits, B = K + 1 buckets.
"""

import math
from typing import NamedTuple, Protocol

import torch

from train.objectives.rows import row_blocks
from train.objectives.targets import TeacherTargets


class Divergence(NamedTuple):
    """values_C: in nats. gradient_CB: of each with respect to the student's tempered bucket logits."""

    values_C: torch.Tensor
    gradient_CB: torch.Tensor


class BucketDivergence(Protocol):
    """Of log-probabilities by bucket, the tail last; -inf where a bucket does not exist."""

    def __call__(self, log_p_CB: torch.Tensor, log_q_CB: torch.Tensor) -> Divergence: ...


class Tail(NamedTuple):
    """Of the tempered logits outside the kept ones, per position: the largest, and the sum of exp(logit - best) as they are and
    as they were before they were tempered. Both sums are at least 1, or 0 where nothing is outside."""

    best_C1: torch.Tensor
    soft_sum_C1: torch.Tensor
    plain_sum_C1: torch.Tensor


def mixed(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    teacher: TeacherTargets | None,
    *,
    gradient: bool,
    divergence: BucketDivergence,
    weight: float,
    temperature: float,
) -> torch.Tensor:
    """A Function (train/objectives/__init__.py). Positions without stored logits count as cross-entropy in full."""
    assert teacher is not None, "only cross-entropy does without a teacher"
    kl_weight_C1 = teacher.has_N[:, None].to(logits_CV.dtype) * weight
    usable_CK = teacher.log_probs_NK.isfinite() & (teacher.ids_NK < logits_CV.shape[-1]) & teacher.has_N[:, None]
    ids_CK = torch.where(usable_CK, teacher.ids_NK, 0)
    wanted_C1 = logits_CV.gather(-1, targets_C[:, None]) * temperature
    kept_CK = _take_out(logits_CV, ids_CK, usable_CK)
    plain_CV = None if temperature in (1.0, 2.0) else torch.empty_like(logits_CV)
    tail = _soften(logits_CV, plain_CV, temperature)
    log_q_CB = torch.cat([kept_CK, tail.best_C1 + tail.soft_sum_C1.log()], -1).log_softmax(-1)
    plain_CB = torch.cat([kept_CK * temperature, tail.best_C1 * temperature + tail.plain_sum_C1.log()], -1)
    found = divergence(_teacher_buckets(teacher.log_probs_NK, usable_CK, log_q_CB), log_q_CB)
    if gradient:
        wants_CB = torch.softmax(plain_CB, -1) * (1 - kl_weight_C1)
        wants_soft_CB = found.gradient_CB * (kl_weight_C1 * temperature)
        # what a bucket is moved by is shared among its tokens as they share its probability
        plain_share_C1 = wants_CB[:, -1:] / tail.plain_sum_C1.clamp_min(1)
        soft_share_C1 = wants_soft_CB[:, -1:] / tail.soft_sum_C1.clamp_min(1)
        _spread(logits_CV, plain_CV, temperature, plain_share_C1, soft_share_C1)
        logits_CV.scatter_add_(-1, ids_CK, wants_CB[:, :-1] + wants_soft_CB[:, :-1])
        logits_CV.scatter_add_(-1, targets_C[:, None], kl_weight_C1 - 1)
    entropy_C1 = plain_CB.logsumexp(-1, keepdim=True) - wanted_C1
    return ((1 - kl_weight_C1) * entropy_C1 + kl_weight_C1 * temperature**2 * found.values_C[:, None]).sum()


def _take_out(logits_CV: torch.Tensor, ids_CK: torch.Tensor, usable_CK: torch.Tensor) -> torch.Tensor:
    """The kept logits, -inf where a slot is not usable. They are -inf in logits_CV afterwards, where only the tail is left."""
    kept_CK = logits_CV.gather(-1, ids_CK).masked_fill_(~usable_CK, -math.inf)
    # an unusable slot points at token 0, which may be another's or the tail's: the least of it and +inf is itself
    out_CK = torch.where(usable_CK, -math.inf, math.inf).to(logits_CV.dtype)
    logits_CV.scatter_reduce_(-1, ids_CK, out_CK, "amin")
    return kept_CK


def _teacher_buckets(log_probs_CK: torch.Tensor, usable_CK: torch.Tensor, log_q_CB: torch.Tensor) -> torch.Tensor:
    """log p by bucket: the usable slots, and what they leave of 1, which rounding may have made less than nothing. A token
    that the student does not have (its vocabulary may be padded to less) is in the tail; without a tail it is nowhere."""
    log_p_CK = log_probs_CK.to(log_q_CB.dtype).masked_fill(~usable_CK, -math.inf)
    log_tail_C1 = (1 - log_p_CK.exp().sum(-1, keepdim=True)).clamp_min(0).log()
    return torch.cat([log_p_CK, log_tail_C1.masked_fill(log_q_CB[:, -1:] == -math.inf, -math.inf)], -1)


def _soften(rest_CV: torch.Tensor, plain_CV: torch.Tensor | None, temperature: float) -> Tail:
    """exp(rest - best) in place of rest_CV, and that of the untempered logits in plain_CV when there is one. At temperature 2
    none is needed: it is the square of the former, and one exponential serves both."""
    sums = [rest_CV.new_empty(len(rest_CV), 1) for _ in range(3)]
    tail = Tail(*sums)
    for block in row_blocks(rest_CV):
        rest_RV, best_R1 = rest_CV[block], tail.best_C1[block]
        torch.amax(rest_RV, -1, keepdim=True, out=best_R1)
        best_R1.masked_fill_(best_R1 == -math.inf, 0)  # nothing is outside: exp(-inf - 0) is 0
        rest_RV.sub_(best_R1)
        if plain_CV is not None:
            torch.mul(rest_RV, temperature, out=plain_CV[block]).exp_()
            torch.sum(plain_CV[block], -1, keepdim=True, out=tail.plain_sum_C1[block])
        torch.sum(rest_RV.exp_(), -1, keepdim=True, out=tail.soft_sum_C1[block])
        if temperature == 1.0:
            tail.plain_sum_C1[block] = tail.soft_sum_C1[block]
        elif plain_CV is None:
            tail.plain_sum_C1[block] = torch.linalg.vector_norm(rest_RV, dim=-1, keepdim=True).square_()
    return tail


def _spread(
    soft_CV: torch.Tensor, plain_CV: torch.Tensor | None, temperature: float, plain_C1: torch.Tensor, soft_C1: torch.Tensor
) -> None:
    """plain_C1 x the untempered exponentials + soft_C1 x soft_CV, in place of soft_CV."""
    for block in row_blocks(soft_CV):
        soft_RV = soft_CV[block]
        if plain_CV is not None:
            soft_RV.mul_(soft_C1[block]).add_(plain_CV[block].mul_(plain_C1[block]))
        elif temperature == 1.0:
            soft_RV.mul_(plain_C1[block] + soft_C1[block])
        else:
            soft_RV.mul_(torch.mul(soft_RV, plain_C1[block]).add_(soft_C1[block]))
