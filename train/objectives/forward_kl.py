"""KL(teacher || student): the student is charged wherever the teacher goes and it does not, so it covers all the teacher does.

Source: Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network", section 2.
Shape suffixes: C positions of a chunk, B buckets (the teacher's kept tokens, and all others as one).
"""

import torch

from train.objectives.mixed import Divergence


def forward_kl(log_p_CB: torch.Tensor, log_q_CB: torch.Tensor) -> Divergence:
    """sum p (log p - log q) over buckets, p the teacher's and q the student's; a bucket that the teacher leaves empty adds
    nothing. As a bucket's logit moves it changes by q sum(p) - p; sum(p) is 1 but for the stored logits' rounding."""
    p_CB = log_p_CB.exp()
    values_C = torch.where(p_CB > 0, p_CB * (log_p_CB - log_q_CB), 0.0).sum(-1)
    return Divergence(values_C, log_q_CB.exp() * p_CB.sum(-1, keepdim=True) - p_CB)
