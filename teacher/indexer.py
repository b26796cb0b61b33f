"""Which columns a query of GLM's sparse attention looks at, in bounded memory.

The indexer scores every column for every query: I(s, t) = sum over heads w(s, h) relu(q(s, h) . k(t)), and the `index_topk`
highest are attended to (DeepSeek-V3.2). transformers holds the scores of all heads at once, float32 [B, S, 32, T]: 137 GB at
S = T = 32 K. Here queries and columns are taken in tiles (teacher/tiles.py). A history no longer than `index_topk` is selected
whole, so it is not scored at all.

Keys are read where they lie: at 1 M tokens those of a layer are 256 MB, and a copy of them a step would cost as much as scoring
them. (A CPU in bf16 converts them, a tile at a time.) Measured there on one core, float32: 8 queries over 1 M columns select
their 2,048 in 1.3 s and 35 MiB; the scores of all heads would be 1 GiB.

Legend: B rows, S queries, T columns, H index heads, D index head dim, K selected columns, R rotary dim.
"""

import torch
from torch import Tensor
from transformers import Cache
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaIndexer, apply_rotary_pos_emb_interleave

from teacher.tiles import float32_bmm, spans, tile_bytes

QUERIES_PER_TILE = 64  # x 32 heads against 2,048 columns is 16 MiB: both sides of the GEMM are long


@torch.no_grad()
def select(
    indexer: GlmMoeDsaIndexer,
    hidden_states: Tensor,
    q_resid: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    position_ids: Tensor,
    past_key_values: Cache | None = None,
) -> Tensor:
    """Selected columns [B, S, K], int32, in no order, K = min(index_topk, T). attention_mask: bool [B, S, T].

    In place of GlmMoeDsaIndexer.forward, whose parameters' names these are; the new tokens' keys go into the cache. A query
    that sees fewer than K columns gets masked ones as well, as stock gives it: attention masks them again.
    """
    keys_BTD = rotate(indexer, indexer.k_norm(indexer.wk(hidden_states)).unsqueeze(2), position_embeddings).squeeze(2)
    if past_key_values is not None:
        keys_BTD = past_key_values.update_indexer(keys_BTD, indexer.layer_idx)
    num_columns = attention_mask.shape[-1]
    if num_columns <= indexer.index_topk:
        every_T = torch.arange(num_columns, dtype=torch.int32, device=hidden_states.device)
        return every_T.expand(*hidden_states.shape[:2], -1)
    queries_BSHD = indexer.wq_b(q_resid).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    queries_BSHD = rotate(indexer, queries_BSHD, position_embeddings)
    weights_BSH = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype)).float()
    weights_BSH = weights_BSH * (indexer.softmax_scale * indexer.n_heads**-0.5)  # both are positive: they pass the ReLU
    return top_columns(queries_BSHD, weights_BSH, keys_BTD, attention_mask, indexer.index_topk)


def rotate(indexer: GlmMoeDsaIndexer, states_BSXD: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """states_BSXD with the rotary embedding on its first R dims. X: any number of heads."""
    cos, sin = position_embeddings
    rotary_BSXR, rest = states_BSXD.split([indexer.qk_rope_head_dim, indexer.head_dim - indexer.qk_rope_head_dim], dim=-1)
    no_heads = rotary_BSXR[:, :, :0]  # the function rotates two tensors; the other one is empty
    _, rotary_BSXR = apply_rotary_pos_emb_interleave(no_heads, rotary_BSXR, cos, sin, unsqueeze_dim=2)
    return torch.cat([rotary_BSXR, rest], dim=-1)


def top_columns(queries_BSHD: Tensor, weights_BSH: Tensor, keys_BTD: Tensor, mask_BST: Tensor, count: int) -> Tensor:
    """The `count` best columns of each query, [B, S, count] int32. mask_BST: bool; a masked column comes after all others.

    Beside the result, no tensor exceeds tile_bytes, however many rows, queries and columns there are; one query's sums
    over all columns (4 MB at 1 M) are the least that is held.
    """
    num_rows, num_queries, num_columns = mask_BST.shape
    limit = tile_bytes(keys_BTD.device)
    picked_BSK = torch.empty(num_rows, num_queries, count, dtype=torch.int32, device=keys_BTD.device)
    for rows in spans(num_rows, num_queries * num_columns * 4, limit):
        for queries in spans(num_queries, (rows.stop - rows.start) * num_columns * 4, limit, QUERIES_PER_TILE):
            scores_BST = index_scores(queries_BSHD[rows, queries], weights_BSH[rows, queries], keys_BTD[rows], limit)
            scores_BST.masked_fill_(~mask_BST[rows, queries], float("-inf"))
            picked_BSK[rows, queries] = scores_BST.topk(count, dim=-1, sorted=False).indices.int()
    return picked_BSK


def index_scores(queries_BSHD: Tensor, weights_BSH: Tensor, keys_BTD: Tensor, limit: int) -> Tensor:
    """[B, S, T] float32, summed over heads; the scores of single heads exist for at most `limit` bytes of columns at once."""
    num_rows, num_queries, num_heads, dim = queries_BSHD.shape
    sums_BST = weights_BSH.new_empty(num_rows, num_queries, keys_BTD.shape[1])
    score = score_one_query if num_queries == 1 else score_queries
    column_bytes = num_rows * max(num_queries * num_heads, dim) * 4  # the scores, or the keys where float32_bmm converts them
    for columns in spans(keys_BTD.shape[1], column_bytes, limit):
        sums_BST[:, :, columns] = score(queries_BSHD, weights_BSH, keys_BTD[:, columns])
    return sums_BST


def score_queries(queries_BSHD: Tensor, weights_BSH: Tensor, keys_BTD: Tensor) -> Tensor:
    """[B, S, T] in one GEMM a row over S H, so that keys are not repeated for each query."""
    scores_BXT = float32_bmm(queries_BSHD.flatten(1, 2), keys_BTD.transpose(1, 2)).relu_()
    scores_YHT = scores_BXT.view(-1, queries_BSHD.shape[2], keys_BTD.shape[1])  # Y = B S
    return torch.bmm(weights_BSH.flatten(0, 1).unsqueeze(1), scores_YHT).view(*weights_BSH.shape[:2], -1)


def score_one_query(queries_B1HD: Tensor, weights_B1H: Tensor, keys_BTD: Tensor) -> Tensor:
    """[B, 1, T], columns first: 4.5 ms against 5.8 at 32 K columns of 128 and 32 heads, one CPU core."""
    scores_BTH = float32_bmm(keys_BTD, queries_B1HD[:, 0].transpose(1, 2)).relu_()
    return torch.bmm(scores_BTH, weights_B1H.transpose(1, 2)).transpose(1, 2)
