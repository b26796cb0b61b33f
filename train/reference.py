"""Gradients computed slowly and obviously, for the fast ones to equal: one document at a time, whole logits, autograd, float64.

Nothing of train/losses.py, train/objectives/ or train/attention.py is in it. `.double()` alone would not do: rotary embeddings
take their angles and RMS norms their means in float32 whatever the model's type, and gradients are then 2.3e-6 off.

A training in float32 is as far from this as its arithmetic: an angle at position p is off by up to p x 6e-8, so that 1e-5 of a
gradient can be asked for with documents of a few hundred tokens, not with 65,536.

Shape suffixes: T tokens of a row or a document, N supervised positions, D width, K kept logits, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from configs.errors import UnusableInput
from configs.training import CrossEntropy, Objective, ReverseKl
from data.chat import IGNORE_INDEX
from student.adapter_files import trainable
from train.batches import Batch
from train.objectives.reverse_kl import TAIL_FLOOR


class Reference(NamedTuple):
    """loss: nats, mean over supervised positions. gradients: of that mean, float64, by the names of `trainable`."""

    loss: float
    gradients: dict[str, torch.Tensor]


def reference_gradients(model: nn.Module, rows: Sequence[Batch], objective: Objective) -> Reference:
    """The gradients that a step over `rows` must have. The model, plain or inside PEFT, is left as it is; dropout is off.

    Raises UnusableInput for a norm or rotary embedding that is not the usual one: float64 would not be float64.
    """
    exact = in_float64(model)
    total, tokens = 0.0, 0
    for document in documents_in(rows):
        logits_TV = exact(input_ids=document.ids_1T, use_cache=False).logits[0]
        loss_sum = document_loss(logits_TV, document, objective)
        if loss_sum.requires_grad:
            loss_sum.backward()
        total += loss_sum.item()
        tokens += int((document.targets_1T != IGNORE_INDEX).sum())
    gradients = {name: parameter.grad for name, parameter in trainable(exact).items()}
    return Reference(total / tokens, {name: grad / tokens for name, grad in gradients.items() if grad is not None})


def documents_in(rows: Sequence[Batch]) -> Iterator[Batch]:
    """Each document of the packed rows as a row of its own."""
    for row in rows:
        starts = (row.position_ids_1T[0] == 0).nonzero()[:, 0].tolist()
        taken = 0
        for start, stop in zip(starts, [*starts[1:], row.ids_1T.shape[1]], strict=True):
            ids_1T, targets_1T, position_ids_1T = (tensor[:, start:stop] for tensor in row[:3])
            trained = int((targets_1T != IGNORE_INDEX).sum())
            teacher = None if row.teacher is None else row.teacher.part(slice(taken, taken + trained))
            taken += trained
            yield Batch(ids_1T, targets_1T, position_ids_1T, teacher)


# --- loss, a position at a time ----------------------------------------------------------------------------------


def document_loss(logits_TV: torch.Tensor, document: Batch, objective: Objective) -> torch.Tensor:
    """Nats, summed over the document's supervised positions; a constant zero without any."""
    loss_sum = logits_TV.new_zeros(())
    places = (document.targets_1T[0] != IGNORE_INDEX).nonzero()[:, 0].tolist()
    for number, place in enumerate(places):
        logits_V, target = logits_TV[place], document.targets_1T[0, place]
        entropy = -logits_V.log_softmax(-1)[target]
        teacher = document.teacher
        if isinstance(objective, CrossEntropy) or teacher is None or not teacher.has_N[number]:
            loss_sum = loss_sum + entropy
            continue
        divergence = bucket_divergence(logits_V, teacher.ids_NK[number], teacher.log_probs_NK[number], objective)
        loss_sum = loss_sum + (1 - objective.weight) * entropy + objective.weight * objective.temperature**2 * divergence
    return loss_sum


def bucket_divergence(
    logits_V: torch.Tensor, ids_K: torch.Tensor, log_probs_K: torch.Tensor, objective: Objective
) -> torch.Tensor:
    """Between teacher and student over the kept tokens that the student has, and one bucket of everything else."""
    assert not isinstance(objective, CrossEntropy)
    vocabulary = len(logits_V)
    kept = [(int(i), float(value)) for i, value in zip(ids_K, log_probs_K, strict=True) if value > -torch.inf and i < vocabulary]
    ids = [i for i, _ in kept]
    others = torch.ones(vocabulary, dtype=torch.bool)
    others[ids] = False
    p_K = torch.tensor([value for _, value in kept], dtype=logits_V.dtype).exp()
    q_V = (logits_V / objective.temperature).softmax(-1)
    p = torch.cat([p_K, (1 - p_K.sum()).clamp_min(0)[None]])
    q = torch.cat([q_V[ids], q_V[others].sum()[None]])
    if not others.any():
        p, q = p[:-1], q[:-1]
    if isinstance(objective, ReverseKl):
        floor = torch.zeros_like(p)
        floor[-1:] = TAIL_FLOOR if others.any() else 0.0
        return (q * (q / p.clamp_min(floor)).log()).sum()
    present = p > 0
    return (p[present] * (p[present] / q[present]).log()).sum()


# --- a model that really computes in float64 ---------------------------------------------------------------------


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of the model in evaluation mode on the CPU, every computation of which is in float64, with attention by sdpa."""
    exact = copy.deepcopy(model).cpu()
    for module in exact.modules():
        if type(module).__name__.endswith("RMSNorm"):
            _replace(module, _rms_norm, torch.randn(3, len(module.weight)))  # type: ignore[arg-type]
        elif type(module).__name__.endswith("RotaryEmbedding"):
            _replace(module, _rotary, torch.randn(1, 3, 4), torch.arange(3)[None])
    for parameter in exact.parameters():
        parameter.grad = None
    causal_lm = exact.get_base_model() if hasattr(exact, "get_base_model") else exact  # type: ignore[operator]
    assert isinstance(causal_lm, PreTrainedModel)
    causal_lm.set_attn_implementation("sdpa")
    return exact.double().eval()


def _replace(module: nn.Module, forward: object, *example: torch.Tensor) -> None:
    """Gives the module another forward, which must do to the example what its own did."""
    example = tuple(one.to(next(module.parameters(), one).dtype) if one.is_floating_point() else one for one in example)
    expected = module(*example)
    module.forward = MethodType(forward, module)  # type: ignore[arg-type]
    found = module(*example)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    if not all(torch.allclose(one.float(), other.float(), rtol=2e-2, atol=2e-2) for one, other in pairs):  # bf16 models too
        raise UnusableInput(f"{type(module).__name__} is not the usual one: no float64 reference of this model can be computed")


def _rms_norm(self: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    epsilon = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    return self.weight * hidden_TD * torch.rsqrt(hidden_TD.pow(2).mean(-1, keepdim=True) + epsilon)  # type: ignore[operator]


@torch.no_grad()
def _rotary(self: nn.Module, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Named as transformers names them: some models pass them by name."""
    angles_1TD = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)  # type: ignore[union-attr]
    angles_1TD = torch.cat((angles_1TD, angles_1TD), dim=-1)
    scaling = self.attention_scaling
    return angles_1TD.cos() * scaling, angles_1TD.sin() * scaling  # type: ignore[operator]
