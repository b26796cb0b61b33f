"""Cross-entropy of the tokens that are trained, and of no others, without ever holding their logits at once.

Shape suffixes: B rows, T tokens of a row, N supervised positions of the batch, D hidden width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel

from configs.errors import UnusableInput
from data.chat import IGNORE_INDEX

# Logits of one chunk, in elements. 4 M is 16 MiB in float32: 64 positions at V = 65,536, which measured best there.
CHUNK_ELEMENTS = 2**22


class Supervised(NamedTuple):
    """hidden_ND: final hidden states that predict a trained token; targets_N: the ids they must predict."""

    hidden_ND: torch.Tensor
    targets_N: torch.Tensor


def select_supervised(hidden_BTD: torch.Tensor, labels_BT: torch.Tensor) -> Supervised:
    """Position t predicts labels[t + 1]; positions whose next label is IGNORE_INDEX are left out."""
    targets_BT = labels_BT[:, 1:]
    chosen_BT = targets_BT != IGNORE_INDEX
    return Supervised(hidden_BTD[:, :-1][chosen_BT], targets_BT[chosen_BT])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a frozen head's input is known as soon as the logits are: softmax minus one-hot, times the head.

    Taking it in the forward pass needs two matrix products instead of the three of recomputation, and no logits survive
    their chunk.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        loss_sum = torch.zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32), device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            # bf16 logits carry 8 bits; the softmax over them is always taken in float32 (float64 stays float64).
            logits_CV = (hidden_ND[part] @ weight_VD.T).to(loss_sum.dtype)
            log_z_C = logits_CV.logsumexp(-1, keepdim=True)
            index_C = targets_N[part, None]
            loss_sum += (log_z_C - logits_CV.gather(-1, index_C)).sum()
            if gradient_ND is not None:
                error_CV = logits_CV.sub_(log_z_C).exp_()
                error_CV.scatter_add_(-1, index_C, torch.full_like(index_C, -1, dtype=error_CV.dtype))
                gradient_ND[part] = error_CV.to(weight_VD.dtype) @ weight_VD
        ctx.gradient_ND = gradient_ND  # type: ignore[attr-defined]
        return loss_sum

    @staticmethod
    def backward(ctx: FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient_ND = ctx.gradient_ND  # type: ignore[attr-defined]
        return None if gradient_ND is None else gradient_ND * grad_output.to(gradient_ND.dtype), None, None, None


def chunked_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """Cross-entropy in nats, SUMMED over the N positions; a float32 scalar (float64 for float64 input).

    weight_VD is the head and gets no gradient: it must be frozen. chunk: positions whose logits exist at once.
    """
    assert not weight_VD.requires_grad, "the head is trainable; this loss gives it no gradient"
    chunk = chunk or max(1, CHUNK_ELEMENTS // len(weight_VD))
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk)  # type: ignore[no-any-return]


class SupervisedLoss(nn.Module):
    """Body, then head and loss over the supervised positions. What the optimizer's engine wraps.

    `model` is the causal LM, plain or inside PEFT. Rows are right-padded and nothing is packed, so plain causal attention
    is already right: no real token can see the padding after it. Hence no attention mask is passed, and sdpa stays on
    its causal fast path.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def causal_lm(self) -> PreTrainedModel:
        causal_lm = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator]
        assert isinstance(causal_lm, PreTrainedModel)
        return causal_lm

    @property
    def head(self) -> nn.Linear:
        head = self.causal_lm.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Loss summed over supervised positions. A batch without one gives 0, still attached to the graph: every rank
        must run a backward pass for each micro-batch, or the others wait in a collective for ever."""
        hidden_BTD = self.causal_lm.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
        hidden_ND, targets_N = select_supervised(hidden_BTD, labels_BT)
        if not len(targets_N):
            return hidden_BTD.sum().float() * 0.0
        return chunked_cross_entropy(hidden_ND, self.head.weight, targets_N)


@torch.no_grad()
def check_head(loss: SupervisedLoss, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> None:
    """Passes when the loss agrees with the one from the model's own logits, tied heads and unusual ones included.

    Raises:
        UnusableInput: for models that change logits after the head (soft caps, logit scales) or add a bias to them.
    """
    logits_BTV = loss.causal_lm(input_ids=ids_BT, use_cache=False).logits.float()
    selected = select_supervised(logits_BTV, labels_BT)
    expected = nn.functional.cross_entropy(selected.hidden_ND, selected.targets_N, reduction="sum")
    found = loss(ids_BT, labels_BT)
    tolerance = 1e-4 if logits_BTV.dtype == loss.head.weight.dtype else 2e-2  # bf16 rounds the two paths' logits differently
    if not torch.isclose(found, expected, rtol=tolerance, atol=1e-3):
        kind = loss.causal_lm.config.model_type
        raise UnusableInput(
            f"student of type {kind}: loss {found:.4f} from body and head, {expected:.4f} from its own logits; "
            "expected a plain linear head (no soft cap, scale or bias); choose another base model"
        )
