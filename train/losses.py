"""The loss of the tokens that are trained, and of no others, without ever holding their logits at once.

Shape suffixes: T tokens of a row, N supervised positions of it, C positions of a chunk, D width of a product, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel

from configs.errors import UnusableInput
from configs.training import Objective
from data.chat import IGNORE_INDEX
from train.batches import Batch
from train.objectives import CROSS_ENTROPY, ChunkLoss, chunk_loss
from train.objectives.targets import TeacherTargets

# Logits of one chunk, in elements. 4 M is 16 MiB in float32: 64 positions at V = 65,536, which measured best there.
CHUNK_ELEMENTS = 2**22
CHECKED_POSITIONS = 64
"""That check_head compares: of a long row, the model's own logits would be tens of gigabytes."""


class Supervised(NamedTuple):
    """hidden_ND: final hidden states that predict a trained token; targets_N: the ids they must predict."""

    hidden_ND: torch.Tensor
    targets_N: torch.Tensor


def select_supervised(hidden_1TD: torch.Tensor, targets_1T: torch.Tensor) -> Supervised:
    """Position t predicts targets[t]; positions whose target is IGNORE_INDEX are left out."""
    chosen_1T = targets_1T != IGNORE_INDEX
    return Supervised(hidden_1TD[chosen_1T], targets_1T[chosen_1T])


# --- head and loss, chunk by chunk -------------------------------------------------------------------------------


class Product(NamedTuple):
    """One addend of the logits: inputs_ND @ weight_VD.T. A plain head is one; with LoRA on it there are two of different D."""

    inputs_ND: torch.Tensor
    weight_VD: torch.Tensor


class _Swept(NamedTuple):
    """gradients: of the products' inputs and weights in turn; None where it was not wanted."""

    loss_sum: torch.Tensor
    gradients: list[torch.Tensor | None]


def _sweep(
    products: Sequence[Product],
    targets_N: torch.Tensor,
    teacher: TeacherTargets | None,
    loss: ChunkLoss,
    chunk: int,
    wanted: Sequence[bool],
) -> _Swept:
    """Loss and wanted gradients (wanted: as in _Swept), with the logits of one chunk at a time in one buffer.

    bf16 logits carry 8 bits: they are widened to float32 before anything is summed over them (float64 stays float64), and a
    weight's gradient is added up in that.
    """
    inputs_ND, weight_VD = products[0]
    dtype = torch.promote_types(inputs_ND.dtype, torch.float32)
    loss_sum = torch.zeros((), dtype=dtype, device=inputs_ND.device)
    buffer_CV = inputs_ND.new_empty(min(chunk, len(targets_N)), len(weight_VD), dtype=dtype)
    tensors = [tensor for product in products for tensor in product]
    gradients = [
        torch.zeros_like(tensor, dtype=dtype if index % 2 else tensor.dtype) if is_wanted else None
        for index, (tensor, is_wanted) in enumerate(zip(tensors, wanted, strict=True))
    ]
    for start in range(0, len(targets_N), chunk):
        part = slice(start, start + chunk)
        logits_CV = _logits(products, part, buffer_CV[: len(targets_N[part])], 1 / loss.temperature)
        loss_sum += loss.function(logits_CV, targets_N[part], teacher and teacher.part(part), gradient=any(wanted))
        for index, product in enumerate(products):
            error_CV = logits_CV.to(product.weight_VD.dtype) if any(wanted[2 * index : 2 * index + 2]) else logits_CV
            if (gradient_ND := gradients[2 * index]) is not None:
                torch.mm(error_CV, product.weight_VD, out=gradient_ND[part])
            if (gradient_VD := gradients[2 * index + 1]) is not None:
                gradient_VD += error_CV.T @ product.inputs_ND[part]
    return _Swept(loss_sum, gradients)


def _logits(products: Sequence[Product], part: slice, buffer_CV: torch.Tensor, scale: float) -> torch.Tensor:
    """The scaled sum of the products in the buffer. Written there at once where nothing has to be widened: fresh memory for each
    chunk costs as much as the exponential."""
    for index, (inputs_ND, weight_VD) in enumerate(products):
        if inputs_ND.dtype == buffer_CV.dtype:
            torch.addmm(buffer_CV, inputs_ND[part], weight_VD.T, beta=min(index, 1), alpha=scale, out=buffer_CV)
        elif index == 0:
            buffer_CV.copy_(inputs_ND[part] @ weight_VD.T).mul_(scale)
        else:
            buffer_CV.add_(inputs_ND[part] @ weight_VD.T, alpha=scale)
    return buffer_CV


def _as_products(tensors: Sequence[torch.Tensor]) -> list[Product]:
    return [Product(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]


class _FrozenHead(torch.autograd.Function):
    """The gradient of a frozen head's input is known as soon as the logits are: their own, times the head.

    Taking it in the forward pass needs two matrix products instead of the three of recomputation, and no logits survive
    their chunk.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx,
        targets_N: torch.Tensor,
        teacher: TeacherTargets | None,
        loss: ChunkLoss,
        chunk: int,
        wanted: Sequence[bool],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        loss_sum, ctx.gradients = _sweep(_as_products(tensors), targets_N, teacher, loss, chunk, wanted)  # type: ignore[attr-defined]
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients: list[torch.Tensor | None] = ctx.gradients  # type: ignore[attr-defined]
        return None, None, None, None, None, *(one if one is None else one * grad_output.to(one.dtype) for one in gradients)


class _TrainedHead(torch.autograd.Function):
    """A trained head's gradient is as large as the head, so it is not kept from forward to backward: the backward pass
    computes each chunk's logits again, and both gradients from them."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx,
        targets_N: torch.Tensor,
        teacher: TeacherTargets | None,
        loss: ChunkLoss,
        chunk: int,
        wanted: Sequence[bool],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(targets_N, *tensors)  # type: ignore[attr-defined]
        ctx.again = teacher, loss, chunk, wanted  # type: ignore[attr-defined]
        return _sweep(_as_products(tensors), targets_N, teacher, loss, chunk, [False] * len(tensors)).loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        targets_N, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
        gradients = _sweep(_as_products(tensors), targets_N, *ctx.again).gradients  # type: ignore[attr-defined]
        scaled = [one if one is None else one.mul_(grad_output.to(one.dtype)) for one in gradients]
        return (
            None,
            None,
            None,
            None,
            None,
            *(one if one is None else one.to(of.dtype) for one, of in zip(scaled, tensors, strict=True)),
        )


def chunked_loss(
    products: Sequence[Product],
    targets_N: torch.Tensor,
    loss: ChunkLoss,
    teacher: TeacherTargets | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Loss in nats, SUMMED over the N positions; a float32 scalar (float64 for float64 input). Every input and weight that
    requires a gradient gets one. teacher None is cross-entropy, whatever the loss.

    chunk: positions whose logits exist at once; None: as many as CHUNK_ELEMENTS allows.
    """
    assert teacher is None or len(teacher.has_N) == len(targets_N), f"{len(teacher.has_N)} targets of {len(targets_N)} positions"
    chunk = chunk or max(1, CHUNK_ELEMENTS // len(products[0].weight_VD))
    loss = CROSS_ENTROPY if teacher is None else loss
    tensors = [tensor for product in products for tensor in product]
    wanted = [tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors]
    function = _TrainedHead if any(wanted[1::2]) else _FrozenHead
    return function.apply(targets_N, teacher, loss, chunk, wanted, *tensors)  # type: ignore[no-any-return]


# --- the head as it stands in the model --------------------------------------------------------------------------


def unwrapped_head(head: nn.Module) -> nn.Module:
    """The layer that computes: the trained copy where PEFT's modules_to_save has wrapped one."""
    if not isinstance(head, ModulesToSaveWrapper):
        return head
    is_plain = head.disable_adapters or not head.active_adapters
    return head.original_module if is_plain else head.modules_to_save[head.active_adapters[0]]


def head_products(head: nn.Module, hidden_ND: torch.Tensor) -> list[Product]:
    """What adds up to the logits of a linear head: frozen, trained whole, or with LoRA on it.

    Raises:
        UnusableInput: for a head that is no sum of products: a bias, DoRA.
    """
    if not isinstance(head, LoraLinear):
        return [Product(hidden_ND, _plain(head).weight)]
    products = [Product(hidden_ND, _plain(head.get_base_layer()).weight)]
    for adapter in _adapters(head):
        low, high = head.lora_A[adapter], _plain(head.lora_B[adapter])
        inputs_ND = head.lora_dropout[adapter](hidden_ND.to(high.weight.dtype))
        products.append(Product(low(inputs_ND) * head.scaling[adapter], high.weight))
    return products


def head_weights(head: nn.Module) -> list[nn.Parameter]:
    """The weights of head_products. They are read outside their own layer's forward pass, so ZeRO-3 must be told of them."""
    if not isinstance(head, LoraLinear):
        return [_plain(head).weight]  # type: ignore
    return [_plain(layer).weight for layer in (head.get_base_layer(), *(head.lora_B[adapter] for adapter in _adapters(head)))]  # type: ignore


def _adapters(head: LoraLinear) -> list[str]:
    """Those that add to the logits."""
    active = [] if head.disable_adapters or head.merged else [name for name in head.active_adapters if name in head.lora_A]
    if any(name in head.lora_variant for name in active):
        raise UnusableInput("student.lora: DoRA on the head; take lm_head out of targets, or name it in modules_to_save instead")
    return active


def _plain(layer: nn.Module) -> nn.Linear:
    if not isinstance(layer, nn.Linear) or layer.bias is not None:
        raise UnusableInput(f"student's head: {layer}; expected a linear layer without bias; choose another base model")
    return layer


class SupervisedLoss(nn.Module):
    """Body, then head and loss over the supervised positions. What the optimizer's engine wraps.

    `model` is the causal LM, plain or inside PEFT. Rows are packed: position_ids that start again at 0 are all that keeps a
    document from its neighbours, so there is no mask and no cache (train/attention.py). chunk: as of chunked_loss.
    """

    def __init__(self, model: nn.Module, objective: Objective, *, chunk: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        self.chunk_loss = chunk_loss(objective)

    @property
    def causal_lm(self) -> PreTrainedModel:
        causal_lm = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator]
        assert isinstance(causal_lm, PreTrainedModel)
        return causal_lm

    @property
    def head(self) -> nn.Module:
        return unwrapped_head(self.causal_lm.get_output_embeddings())  # type: ignore

    def forward(
        self,
        ids_1T: torch.Tensor,
        targets_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        teacher: TeacherTargets | None = None,
    ) -> torch.Tensor:
        """Loss in nats, summed over supervised positions; teacher None: cross-entropy. A row without any gives 0, still
        attached to the graph: every rank must run a backward pass for each micro-batch, or the others wait for ever."""
        body = self.causal_lm.get_decoder()
        hidden_1TD = body(input_ids=ids_1T, position_ids=position_ids_1T, use_cache=False).last_hidden_state
        hidden_ND, targets_N = select_supervised(hidden_1TD, targets_1T)
        return chunked_loss(head_products(self.head, hidden_ND), targets_N, self.chunk_loss, teacher, self.chunk)


@torch.no_grad()
def check_head(loss: SupervisedLoss, batch: Batch) -> None:
    """Passes when the cross-entropy of the row's first supervised positions agrees with the one from the model's own logits,
    tied heads and unusual ones included. Every objective stands on those logits.

    Raises:
        UnusableInput: for models that change logits after the head (soft caps, logit scales) or add a bias to them.
    """
    places_N = (batch.targets_1T[0] != IGNORE_INDEX).nonzero()[:CHECKED_POSITIONS, 0]
    targets_1T = torch.full_like(batch.targets_1T, IGNORE_INDEX)
    targets_1T[0, places_N] = batch.targets_1T[0, places_N]
    logits_NV = loss.causal_lm(
        input_ids=batch.ids_1T, position_ids=batch.position_ids_1T, use_cache=False, logits_to_keep=places_N
    ).logits[0]
    expected = nn.functional.cross_entropy(logits_NV.float(), targets_1T[0, places_N], reduction="sum")
    found = loss(batch.ids_1T, targets_1T, batch.position_ids_1T)
    tolerance = 1e-4 if logits_NV.dtype == torch.float32 else 2e-2  # bf16 rounds the two paths' logits differently
    if not torch.isclose(found, expected, rtol=tolerance, atol=1e-3):
        kind = loss.causal_lm.config.model_type
        raise UnusableInput(
            f"student of type {kind}: loss {found:.4f} from body and head, {expected:.4f} from its own logits; "
            "expected a plain linear head (no soft cap, scale or bias); choose another base model"
        )
