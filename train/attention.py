"""Attention that keeps the documents of a packed row apart. transformers knows it by the name DOCUMENTS.

position_ids that start again at 0 are the only boundary there is. Each document is attended by itself: on a CPU one call of
scaled_dot_product_attention a document, on a GPU one flash kernel over all of them. No mask is ever built, so cost and memory
follow the sum of squared lengths, not the square of the row: at T = 4,096 with 12 documents 0.32 s and 184 MiB for forward and
backward, where a masked sdpa took 1.04 s and 310 MiB. What cannot be kept apart, or would be ignored in silence, is refused.

Shape suffixes: T tokens of a packed row, H query heads, G key and value heads, D width of a head, M documents, V vocabulary.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from configs.errors import UnusableInput

DOCUMENTS = "tracestill_documents"

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
"""Chunked attention would be attended in full without a word; recurrent and linear layers carry state over a boundary."""
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_WIDTH = 256
"""The widest head of torch's flash kernel (torch 2.13)."""
UNKNOWN_TERMS = ("softcap", "s_aux", "position_bias")
"""Arguments by which models ask for soft caps, attention sinks and additive biases."""

PROBE_TOKENS = 64
PROBE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
"""Of the largest logit. Products over another number of rows are summed in another order: 6e-7 measured in float32."""
PROBE_TOLERANCE_HALF = 5e-2
"""bf16 keeps 8 bits: 4e-3 a rounding, some 32 layers deep. A leak moves the logits of a trained model by more."""


class Documents(NamedTuple):
    """lengths: in tokens, in order. bounds_M1: int32 on the row's device, where each document starts, and the row's end."""

    lengths: list[int]
    bounds_M1: torch.Tensor


def documents_of(position_ids_1T: torch.Tensor) -> Documents:
    """The documents of a packed row. Waits for the device, which is why LastDocuments asks once a pass and not once a layer."""
    if position_ids_1T.ndim != 2 or len(position_ids_1T) != 1:
        raise UnusableInput(f"position_ids of shape {tuple(position_ids_1T.shape)}; expected one packed row, [1, T]")
    starts_M = (position_ids_1T[0] == 0).nonzero()[:, 0]
    bounds = [*starts_M.tolist(), position_ids_1T.shape[1]]
    if bounds[0] != 0:
        raise UnusableInput("position_ids: the row begins in mid-document; expected 0 first (a model that generates needs sdpa)")
    lengths = [stop - start for start, stop in pairwise(bounds)]
    return Documents(lengths, torch.tensor(bounds, dtype=torch.int32, device=position_ids_1T.device))


class LastDocuments:
    """The documents of the row that was asked for last, found once for all layers.

    Layers of one pass are given the same tensor object, and so is a layer that activation checkpointing computes again.
    """

    def __init__(self, find: Callable[[torch.Tensor], Documents]) -> None:
        self.find = find
        self._row: weakref.ref[torch.Tensor] | None = None
        self._version = 0
        self._found: Documents | None = None

    def __call__(self, position_ids_1T: torch.Tensor) -> Documents:
        version = 0 if position_ids_1T.is_inference() else position_ids_1T._version  # a buffer that is written to is another row
        if self._found is None or self._row is None or self._row() is not position_ids_1T or self._version != version:
            self._found = self.find(position_ids_1T)
            self._row, self._version = weakref.ref(position_ids_1T), version
        return self._found


# --- attention ---------------------------------------------------------------------------------------------------


def attend(
    query_1HTD: torch.Tensor, key_1GTD: torch.Tensor, value_1GTD: torch.Tensor, documents: Documents,
    *, scale: float | None = None, window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention inside each document; [1, T, H, D of the values], as transformers wants it. H is a multiple of G.

    window: a token sees itself and the window - 1 before it. scale: of the products, 1 / sqrt(D) by default.
    """
    if _has_flash(query_1HTD, value_1GTD):
        return _attend_on_gpu(query_1HTD, key_1GTD, value_1GTD, documents, scale, window)
    # split, not slices: the backward pass of each slice would fill a whole row with zeros
    pieces = zip(*(tensor.split(documents.lengths, dim=2) for tensor in (query_1HTD, key_1GTD, value_1GTD)), strict=True)
    attended = [_attend_one(query, key, value, scale, window) for query, key, value in pieces]
    return torch.cat(attended, dim=2).transpose(1, 2)


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
) -> torch.Tensor:
    """One document, [1, H, length, D]."""
    gqa = query.shape[1] != key.shape[1]
    length = query.shape[2]
    if window is None or length <= window:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
    blocks = []
    for start in range(0, length, window):  # a block of queries sees two blocks of keys at most: memory stays linear in length
        stop, first = min(start + window, length), max(0, start - window + 1)
        behind = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(first, stop, device=query.device)
        seen, keys, values = (behind >= 0) & (behind < window), key[:, :, first:stop], value[:, :, first:stop]
        blocks.append(
            scaled_dot_product_attention(query[:, :, start:stop], keys, values, attn_mask=seen, scale=scale, enable_gqa=gqa)
        )
    return torch.cat(blocks, dim=2)


def _has_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    width = query.shape[-1]
    return query.is_cuda and query.dtype in FLASH_DTYPES and width == value.shape[-1] and width <= FLASH_HEAD_WIDTH


def _attend_on_gpu(
    query_1HTD: torch.Tensor, key_1GTD: torch.Tensor, value_1GTD: torch.Tensor, documents: Documents,
    scale: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    bounds_M1, longest = documents.bounds_M1, max(documents.lengths)
    query_THD, key_TGD, value_TGD = (tensor[0].transpose(0, 1) for tensor in (query_1HTD, key_1GTD, value_1GTD))
    attended_THD = varlen_attn(
        query_THD, key_TGD, value_TGD, bounds_M1, bounds_M1, longest, longest, scale=scale,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=query_1HTD.shape[1] != key_1GTD.shape[1],
    )  # fmt: skip
    assert isinstance(attended_THD, torch.Tensor)
    return attended_THD[None]


# --- as transformers calls it ------------------------------------------------------------------------------------


def attend_documents(
    module: torch.nn.Module, query_1HTD: torch.Tensor, key_1GTD: torch.Tensor, value_1GTD: torch.Tensor,
    attention_mask: torch.Tensor | None, *, documents: Documents, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, is_causal: bool | None = None, **others: object,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """attend, with a model's other wishes granted or refused. Raises UnusableInput."""
    _refuse_mask(attention_mask)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    terms = {"attention dropout": dropout, "attention in both directions": not causal}
    terms |= {name: others.get(name) is not None for name in UNKNOWN_TERMS}
    if wanted := [name for name, is_wanted in terms.items() if is_wanted]:
        raise UnusableInput(f"{type(module).__name__} asks for {wanted[0]}, which {DOCUMENTS} does not have; choose another base")
    if key_1GTD.shape[2] != query_1HTD.shape[2]:
        raise UnusableInput(
            f"{DOCUMENTS}: {query_1HTD.shape[2]} queries and {key_1GTD.shape[2]} keys; expected a whole row without a cache: "
            "switch the model to sdpa before it generates"
        )
    return attend(query_1HTD, key_1GTD, value_1GTD, documents, scale=scaling, window=sliding_window), None


class DocumentAttention:
    """attend_documents with the documents found from position_ids."""

    def __init__(self) -> None:
        self.documents = LastDocuments(documents_of)

    def __call__(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, *, position_ids: torch.Tensor | None = None, **others: object,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        documents = self.documents(given_positions(module, position_ids))
        return attend_documents(module, query, key, value, attention_mask, documents=documents, **others)  # type: ignore[arg-type]


def given_positions(module: torch.nn.Module, position_ids: torch.Tensor | None) -> torch.Tensor:
    if position_ids is None:
        raise UnusableInput(f"{type(module).__name__} is given no position_ids, so documents look like one; choose another base")
    return position_ids


def no_mask(attention_mask: torch.Tensor | None = None, use_vmap: bool = False, **_: object) -> None:
    """What transformers makes of a mask for DOCUMENTS: nothing. Raises UnusableInput for one that would have had an effect.

    Without a function of its own transformers drops every 2-D mask in silence.
    """
    _refuse_mask(attention_mask)
    if use_vmap:
        raise UnusableInput(f"the model lays a pattern of its own over its causal mask, which {DOCUMENTS} would ignore")


def _refuse_mask(attention_mask: torch.Tensor | None) -> None:
    if attention_mask is not None:
        raise UnusableInput(
            f"{DOCUMENTS} was given an attention mask of shape {tuple(attention_mask.shape)}; expected none: packed rows have no "
            "padding, and position_ids hold the boundaries"
        )


# --- switching a model to it, and proving it ---------------------------------------------------------------------


def use_documents(model: PreTrainedModel, *, name: str = DOCUMENTS, attention: Callable[..., object] | None = None) -> None:
    """The model attends document by document from now on, under `name` (`attention` stands in for DocumentAttention).

    Raises:
        UnusableInput: for a model whose layers cannot be kept apart, or that does not take its attention from transformers.
    """
    config = model.config.get_text_config()
    student = f"student of type {config.model_type}"
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES):
        raise UnusableInput(f"{student}: layers of type {others[0]}; expected {' or '.join(sorted(LAYER_TYPES))}")
    if dropout := getattr(config, "attention_dropout", 0.0):
        raise UnusableInput(f"{student}: attention_dropout {dropout} in its config.json; expected 0")
    AttentionInterface.register(name, attention or DocumentAttention())
    AttentionMaskInterface.register(name, no_mask)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UnusableInput(f"{student} has an attention of its own; expected one that transformers can switch")


@torch.no_grad()
def check_isolation(model: PreTrainedModel, documents: Sequence[Sequence[int]]) -> float:
    """The largest difference between logits of two documents packed into one row and alone, as a share of the largest logit.

    documents: token ids of at least one, of which the first PROBE_TOKENS are tried; the first two are packed, or one twice.
    Leaves the model as it was. Takes the implementation as it finds it.

    Raises:
        UnusableInput: where the difference is more than rounding: a token saw another document.
    """
    first, second = (torch.tensor(list(ids[:PROBE_TOKENS])) for ids in (documents[0], documents[-1 if len(documents) < 2 else 1]))
    was_training = model.training
    model.eval()
    try:
        alone_TV = torch.cat([_logits(model, [ids]) for ids in (first, second)])
        packed_TV = _logits(model, [first, second])
    finally:
        model.train(was_training)
    difference = ((packed_TV - alone_TV).abs().max() / alone_TV.abs().max()).item()
    tolerance = PROBE_TOLERANCE.get(model.dtype, PROBE_TOLERANCE_HALF)
    if not difference <= tolerance:
        kind = model.config.model_type
        raise UnusableInput(
            f"attention {model.config._attn_implementation} of {kind}: packed documents see each other (logits differ by "
            f"{difference:.1g} of the largest from unpacked ones, expected at most {tolerance:g}); choose another base model"
        )
    return difference


def _logits(model: PreTrainedModel, documents: Sequence[torch.Tensor]) -> torch.Tensor:
    """[T, V], float32 or wider, of the documents in one row."""
    row_1T = torch.cat(list(documents))[None].to(model.device)
    positions_1T = torch.cat([torch.arange(len(ids)) for ids in documents])[None].to(model.device)
    logits_TV = model(input_ids=row_1T, position_ids=positions_1T, use_cache=False).logits[0]
    return logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
