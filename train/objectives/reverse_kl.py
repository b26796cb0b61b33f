"""KL(student || teacher): the student is charged wherever it goes and the teacher does not, so it keeps to what the teacher
finds likely.

Source: Gu, Dong, Wei, Huang 2023, "MiniLLM: knowledge distillation of large language models", section 2.
Shape suffixes: C positions of a chunk, B buckets (the teacher's kept tokens, and all others as one).
"""

import math

import torch

from train.objectives.mixed import Divergence

TAIL_FLOOR = 2.0**-20
"""Least share of the teacher's that the tail is held to have. The tail is what the kept probabilities leave of 1, and those are
known to some 1e-6 (half-precision logits): nothing smaller is told from zero, and against zero this divergence is infinite."""


def reverse_kl(log_p_CB: torch.Tensor, log_q_CB: torch.Tensor) -> Divergence:
    """sum q (log q - log p) over buckets, q the student's and p the teacher's; the last bucket is the tail. As a bucket's
    logit moves it changes by q (log q - log p - sum). A bucket that the student cannot reach adds nothing."""
    log_p_CB = torch.cat([log_p_CB[:, :-1], log_p_CB[:, -1:].clamp_min(math.log(TAIL_FLOOR))], -1)
    q_CB = log_q_CB.exp()
    ratio_CB = torch.where(q_CB > 0, log_q_CB - log_p_CB, 0.0)
    values_C = (q_CB * ratio_CB).sum(-1)
    return Divergence(values_C, q_CB * (ratio_CB - values_C[:, None]))
