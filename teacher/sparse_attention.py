"""GLM's sparse latent attention without the waste: the same tokens, a fraction of the work and of the memory.

transformers expands the whole cached history to full keys and values at every pass and masks what the indexer
(teacher/indexer.py) did not select. Here a pass takes one of two forms.

*Absorbed*: each query's selected latents are gathered and never expanded. kv_b_proj is applied to the query and to the result
instead of to the columns (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): with q.(Wk c) = (Wk' q).c and sum p (Wv c) =
Wv (sum p c) the numbers are the same up to rounding. Every decode step takes it, and long prefill.

*Expanded*: keys and values of the history, once for all queries of the pass, unselected columns masked. Prefill takes it
while the history is short; `gathering_is_cheaper` holds the arithmetic.

Both work in tiles of bounded bytes (teacher/tiles.py). At 1 M tokens, expanding alone would be 68 GB a layer of GLM-5.2.

Two seams of transformers carry this: a registered attention function, and the attention module's `expand_kv`, which here hands
the latents over as they are. Under ZeRO-3 kv_b_proj is read outside its own forward pass, so whole decoder layers must be
gathered as one unit (deepspeed_engine.gather_by_layer).

Legend: B rows, S queries of a row, Q queries of all rows, H heads (of this rank), T columns, K columns that a query reads,
C latent dim, R rotary dim, N no-position dim, D = N + R query dim, V value dim.
"""

from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaAttention, GlmMoeDsaIndexer

from teacher.indexer import select
from teacher.tiles import float32_bmm, spans, tile_bytes

IMPLEMENTATION = "tracestill_latent"

CPU_GATHER_PRICE, GPU_GATHER_PRICE = 32, 800
"""Multiply-adds in the time that one gathered element takes. CPU: fitted to where the forms cross on one core in float32, at a
quarter of GLM-5.2's width: 256 queries at 6,500 columns (6,300 by the rule), 64 queries at 4,800 (3,300). GPU, calculated only:
an H200 reads, writes and twice reads 2 bytes at 4.8 TB/s in the time of 800 multiply-adds at 495 T/s."""


def attention_for(model_type: str) -> str:
    """The attn_implementation to load a model of this type with. Boolean 4-D masks work in all of them."""
    return IMPLEMENTATION if model_type == "glm_moe_dsa" else "sdpa"


def install(model: PreTrainedModel) -> None:
    """Gives a model loaded with `attention_for` its other seams. Does nothing to other architectures."""
    for module in model.modules():
        if isinstance(module, GlmMoeDsaAttention):
            module.expand_kv = MethodType(keep_latents, module)
        elif isinstance(module, GlmMoeDsaIndexer):
            module.forward = MethodType(select, module)


def keep_latents(attention: GlmMoeDsaAttention, latents_B1TC: Tensor, rotary_B1TR: Tensor) -> tuple[Tensor, Tensor]:
    """In place of the expansion: rotary part and latents as one-headed "keys" and "values"."""
    return rotary_B1TR, latents_B1TC


class Projection(NamedTuple):
    """kv_b_proj of this rank's heads, as views: from a latent to the position-free part of a key, and to a value."""

    key_HNC: Tensor
    value_HVC: Tensor

    @staticmethod
    def of(module: GlmMoeDsaAttention) -> "Projection":
        head_dim = module.qk_nope_head_dim + module.v_head_dim
        weight_HXC = module.kv_b_proj.weight.view(-1, head_dim, module.kv_lora_rank)
        return Projection(*weight_HXC.split([module.qk_nope_head_dim, module.v_head_dim], dim=1))

    def of_heads(self, heads: slice) -> "Projection":
        return Projection(self.key_HNC[heads], self.value_HVC[heads])


class History(NamedTuple):
    """What attention reads. latents_BTC, rotary_BTR: views of the cache. mask_BST: bool, True where a query may look.
    indices_BSK: the columns each query has selected; as many as there are when there was no choice to make."""

    latents_BTC: Tensor
    rotary_BTR: Tensor
    mask_BST: Tensor
    indices_BSK: Tensor

    @property
    def is_selective(self) -> bool:
        return self.indices_BSK.shape[-1] < self.latents_BTC.shape[1]


def latent_attention(
    module: nn.Module,
    query_BHSD: Tensor,
    rotary_B1TR: Tensor,
    latents_B1TC: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    indices: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention output [B, S, H, V]. attention_mask: bool [B, 1, S, T]. indices: selected columns [B, S, K]."""
    assert isinstance(module, GlmMoeDsaAttention) and indices is not None and attention_mask.dtype == torch.bool
    history = History(latents_B1TC[:, 0], rotary_B1TR[:, 0], attention_mask[:, 0], indices)
    projection = Projection.of(module)
    if query_BHSD.shape[2] == 1 or (history.is_selective and gathering_is_cheaper(query_BHSD, projection, history)):
        return absorbed_attention(query_BHSD, projection, history, scaling), None
    return expanded_attention(query_BHSD, projection, history, scaling), None


def gathering_is_cheaper(query_BHSD: Tensor, projection: Projection, history: History) -> bool:
    """Whether S queries cost less over K gathered latents each than over the T columns' shared expansion. Always when one head's
    expansion does not fit in a tile.

    Multiply-adds of a row:  expanded  T H (N + V) C + S T H (D + V),
                             gathered  S H (N + V) C + S K H (2 C + R) + S K (C + R) x the price of a gathered element.
    GLM-5.2, 2,048 queries or more: breaks even at about 5,000 columns on a CPU and 28,000 to 32,000 on a GPU. With 8 of its 64
    heads a GPU expands up to 190,000, where the tile ends it: a gather serves all heads, an expansion its own.
    """
    _, num_heads, num_queries, query_dim = query_BHSD.shape
    _, num_columns, latent_dim = history.latents_BTC.shape
    value_dim, rotary_dim, num_picked = projection.value_HVC.shape[1], history.rotary_BTR.shape[-1], history.indices_BSK.shape[-1]
    if num_columns * expanded_bytes(query_BHSD, projection) > tile_bytes(query_BHSD.device):
        return True
    price = CPU_GATHER_PRICE if query_BHSD.device.type == "cpu" else GPU_GATHER_PRICE
    projections = num_heads * (query_dim - rotary_dim + value_dim) * latent_dim
    expanded = num_columns * (projections + num_queries * num_heads * (query_dim + value_dim))
    per_column = num_heads * (2 * latent_dim + rotary_dim) + price * (latent_dim + rotary_dim)
    return num_queries * (projections + num_picked * per_column) < expanded


def expanded_bytes(query_BHSD: Tensor, projection: Projection) -> int:
    """Of one head and column: the two products, and the key joined from its parts."""
    dims = projection.key_HNC.shape[1] + projection.value_HVC.shape[1] + query_BHSD.shape[-1]
    return dims * query_BHSD.element_size()


def absorbed_attention(query_BHSD: Tensor, projection: Projection, history: History, scaling: float) -> Tensor:
    """[B, S, H, V] in latent space, as many queries at a time as a tile holds the gathered latents or the scores of."""
    num_rows, num_heads, num_queries, _ = query_BHSD.shape
    latent_dim, rotary_dim, num_picked = (
        part.shape[-1] for part in (history.latents_BTC, history.rotary_BTR, history.indices_BSK)
    )
    bytes_each = num_picked * max(latent_dim + rotary_dim, num_heads) * 4  # 4 also in bf16: float32_bmm may convert
    query_QHD = query_BHSD.transpose(1, 2).flatten(0, 1)
    output_QHV = query_QHD.new_empty(*query_QHD.shape[:2], projection.value_HVC.shape[1])
    for queries in spans(len(query_QHD), bytes_each, tile_bytes(query_QHD.device)):
        columns = gather_columns(history, queries) if history.is_selective else all_columns(history, queries)
        output_QHV[queries] = attend_latents(query_QHD[queries], projection, columns, scaling)
    return output_QHV.unflatten(0, (num_rows, num_queries))


class Columns(NamedTuple):
    """What each of Q queries reads."""

    latents_QKC: Tensor
    rotary_QKR: Tensor
    mask_QK: Tensor


def all_columns(history: History, queries: slice) -> Columns:
    """Views, for one query a row."""
    return Columns(history.latents_BTC[queries], history.rotary_BTR[queries], history.mask_BST[queries, 0])


def gather_columns(history: History, queries: slice) -> Columns:
    """Copies of what the queries have selected; queries: of the rows' queries, one row after the other."""
    num_queries = history.indices_BSK.shape[1]
    index_Q1 = torch.arange(queries.start, queries.stop, device=history.indices_BSK.device)[:, None]
    row_Q1, query_Q1 = index_Q1 // num_queries, index_Q1 % num_queries
    picked_QK = history.indices_BSK[row_Q1[:, 0], query_Q1[:, 0]].long()
    mask_QK = history.mask_BST[row_Q1, query_Q1, picked_QK]
    return Columns(take(history.latents_BTC, row_Q1, picked_QK), take(history.rotary_BTR, row_Q1, picked_QK), mask_QK)


def take(states_BTX: Tensor, row_Q1: Tensor, picked_QK: Tensor) -> Tensor:
    """states_BTX[row, picked], [Q, K, X], by index_select from the cache's storage seen as one table of vectors.

    index_select copies whole vectors: 0.16 ms for 2,048 of 128 floats, where indexing with two tensors takes 0.58 and gather
    0.92. The table is no copy: a cache view's rows lie a whole number of columns apart.
    """
    dim = states_BTX.shape[-1]
    if states_BTX.stride()[1:] != (dim, 1) or states_BTX.stride(0) % dim:
        states_BTX = states_BTX.contiguous()
    columns_apart = states_BTX.stride(0) // dim
    last_row = (states_BTX.shape[0] - 1) * columns_apart
    table_YX = states_BTX.as_strided((last_row + states_BTX.shape[1], dim), (dim, 1))
    return table_YX.index_select(0, (row_Q1 * columns_apart + picked_QK).flatten()).view(*picked_QK.shape, dim)


def attend_latents(query_QHD: Tensor, projection: Projection, columns: Columns, scaling: float) -> Tensor:
    """[Q, H, V]. Scores and softmax in float32. A query that may look nowhere (padding) gets some mean, never NaN, which
    would spread from its latents to every later token: 0 x NaN is NaN."""
    latents_QKC, rotary_QKR, mask_QK = columns
    rotary_dim = rotary_QKR.shape[-1]
    query_QHN, query_QHR = query_QHD.split([query_QHD.shape[-1] - rotary_dim, rotary_dim], dim=-1)
    query_QHC = torch.einsum("qhn,hnc->qhc", query_QHN, projection.key_HNC)
    scores_QHK = float32_bmm(query_QHC, latents_QKC.transpose(1, 2)).add_(float32_bmm(query_QHR, rotary_QKR.transpose(1, 2)))
    scores_QHK.mul_(scaling).masked_fill_(~mask_QK[:, None], torch.finfo(torch.float32).min)
    mixed_QHC = torch.bmm(scores_QHK.softmax(-1).to(latents_QKC.dtype), latents_QKC)
    return torch.einsum("qhc,hvc->qhv", mixed_QHC, projection.value_HVC)


def expanded_attention(query_BHSD: Tensor, projection: Projection, history: History, scaling: float) -> Tensor:
    """[B, S, H, V] over keys and values of all columns: groups of rows, of heads, of queries, each as large as fits a tile."""
    num_rows, num_heads, num_queries, _ = query_BHSD.shape
    limit, num_columns = tile_bytes(query_BHSD.device), history.latents_BTC.shape[1]
    head_bytes = num_columns * expanded_bytes(query_BHSD, projection)
    output_BSHV = query_BHSD.new_empty(num_rows, num_queries, num_heads, projection.value_HVC.shape[1])
    for rows in spans(num_rows, num_heads * head_bytes, limit):
        rows_at_once = rows.stop - rows.start
        for heads in spans(num_heads, rows_at_once * head_bytes, limit):
            keys_BHTD, values_BHTV = expand(projection.of_heads(heads), history.latents_BTC[rows], history.rotary_BTR[rows])
            score_bytes = rows_at_once * (heads.stop - heads.start) * num_columns * 4  # without a fused kernel they all exist
            for queries in spans(num_queries, score_bytes, limit):
                query, mask = query_BHSD[rows, heads, queries], readable(history, rows, queries)
                mixed_BHSV = nn.functional.scaled_dot_product_attention(query, keys_BHTD, values_BHTV, mask, scale=scaling)
                output_BSHV[rows, queries, heads] = mixed_BHSV.transpose(1, 2)
    return output_BSHV


def expand(projection: Projection, latents_BTC: Tensor, rotary_BTR: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, H, T, D] and values [B, H, T, V]; the rotary part of a key is the same for all heads."""
    nope_BHTN = torch.einsum("btc,hnc->bhtn", latents_BTC, projection.key_HNC)
    rotary_BHTR = rotary_BTR[:, None].expand(-1, nope_BHTN.shape[1], -1, -1)
    return torch.cat([nope_BHTN, rotary_BHTR], dim=-1), torch.einsum("btc,hvc->bhtv", latents_BTC, projection.value_HVC)


def readable(history: History, rows: slice, queries: slice) -> Tensor:
    """bool [B, 1, S, T] of these rows and queries: allowed by the mask, and selected."""
    mask_BST = history.mask_BST[rows, queries]
    if history.is_selective:
        selected_BST = torch.zeros(mask_BST.shape, dtype=torch.bool, device=mask_BST.device)
        mask_BST = mask_BST & selected_BST.scatter_(-1, history.indices_BSK[rows, queries].long(), True)
    return mask_BST[:, None]


AttentionInterface.register(IMPLEMENTATION, latent_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)  # boolean; with it transformers' own `generate` works too
