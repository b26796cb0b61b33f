"""GLM's sparse latent attention without the waste: same tokens, a fraction of the work per decode step.

transformers expands the whole cached history to full keys and values at every step, masks what the indexer did not
select, and scores every column even when all of them will be selected. Here a decode step

- scores nothing while the history is no longer than `index_topk` (all of it is selected whatever the scores);
- takes the selected latents out of the history first, when it is longer;
- never expands them: kv_b_proj is applied to the one query and to the one result instead of to T columns
  ("absorbed" attention, DeepSeek-V2, arXiv 2405.04434, section 2.1.2). With q.(Wk c) = (Wk' q).c and
  sum p (Wv c) = Wv (sum p c) the numbers are the same up to rounding.

For the embedded teacher, 64 slots and histories of about 120 columns, that is 1,427 output tokens per CPU second against
774. Prefill keeps the expanded form, which is cheaper where many queries share one expansion.

Two seams of transformers carry it: a registered attention function, and the attention module's `expand_kv`, which here
hands the latents over as they are. Under ZeRO-3 kv_b_proj is read outside its own forward pass, so whole decoder layers
must be gathered as one unit (deepspeed_engine.gather_by_layer).

Legend: B rows, H heads (of this rank), S queries, T columns, K selected columns, C latent dim, R rotary dim, N no-position dim.
"""

from types import MethodType

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import (
    GlmMoeDsaAttention,
    GlmMoeDsaIndexer,
    apply_rotary_pos_emb_interleave,
)

IMPLEMENTATION = "tracestill_latent"


def attention_for(model_type: str) -> str:
    """The attn_implementation to load a model of this type with. Boolean 4-D masks work in all of them."""
    return IMPLEMENTATION if model_type == "glm_moe_dsa" else "sdpa"


def install(model: PreTrainedModel) -> None:
    """Gives a model loaded with `attention_for` its other seam. Does nothing to other architectures."""
    for module in model.modules():
        if isinstance(module, GlmMoeDsaAttention):
            module.expand_kv = MethodType(keep_latents, module)
        elif isinstance(module, GlmMoeDsaIndexer):
            module.forward = MethodType(select, module)


def keep_latents(attention: GlmMoeDsaAttention, latents_B1TC: Tensor, rotary_B1TR: Tensor) -> tuple[Tensor, Tensor]:
    """In place of the expansion: rotary part and latents as one-headed "keys" and "values"."""
    return rotary_B1TR, latents_B1TC


def select(
    indexer: GlmMoeDsaIndexer,
    hidden_states: Tensor,
    q_resid: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    position_ids: Tensor,
    past_key_values: Cache | None = None,
) -> Tensor:
    """Selected columns [B, S, K]. Without a choice to make, all of them, and only the indexer's keys are computed, for
    the steps that will have one."""
    columns = attention_mask.shape[-1]
    if columns > indexer.index_topk:
        arguments = (hidden_states, q_resid, position_embeddings, attention_mask, position_ids, past_key_values)
        return GlmMoeDsaIndexer.forward(indexer, *arguments)
    if past_key_values is not None:
        cos, sin = position_embeddings
        keys_BS1D = indexer.k_norm(indexer.wk(hidden_states)).unsqueeze(2)
        rotated, passed = keys_BS1D.split([indexer.qk_rope_head_dim, indexer.head_dim - indexer.qk_rope_head_dim], dim=-1)
        _, rotated = apply_rotary_pos_emb_interleave(rotated, rotated, cos, sin, unsqueeze_dim=2)
        past_key_values.update_indexer(torch.cat([rotated, passed], dim=-1).squeeze(2), indexer.layer_idx)
    return torch.arange(columns, device=hidden_states.device).expand(*hidden_states.shape[:2], -1)


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
    assert isinstance(module, GlmMoeDsaAttention) and indices is not None
    if query_BHSD.shape[2] == 1:
        return absorbed_step(module, query_BHSD, rotary_B1TR, latents_B1TC, attention_mask, indices, scaling), None
    keys, values = GlmMoeDsaAttention.expand_kv(module, latents_B1TC, rotary_B1TR)
    if indices.shape[-1] < keys.shape[2]:
        selected_BST = torch.zeros(*indices.shape[:2], keys.shape[2], dtype=torch.bool, device=keys.device)
        attention_mask = attention_mask & selected_BST.scatter(-1, indices.long(), True).unsqueeze(1)
    return sdpa_attention_forward(module, query_BHSD, keys, values, attention_mask, scaling=scaling)


def absorbed_step(
    module: GlmMoeDsaAttention,
    query_BH1D: Tensor,
    rotary_B1TR: Tensor,
    latents_B1TC: Tensor,
    mask_B11T: Tensor,
    indices_B1K: Tensor,
    scaling: float,
) -> Tensor:
    """One query per row, in latent space. The history is read twice (scores, mix) and never expanded."""
    latents_BTC, rotary_BTR, mask_BT = latents_B1TC[:, 0], rotary_B1TR[:, 0], mask_B11T[:, 0, 0]
    if indices_B1K.shape[-1] < latents_BTC.shape[1]:
        picked_BK = indices_B1K[:, 0].long()
        latents_BTC = latents_BTC.gather(1, picked_BK[:, :, None].expand(-1, -1, latents_BTC.shape[-1]))
        rotary_BTR = rotary_BTR.gather(1, picked_BK[:, :, None].expand(-1, -1, rotary_BTR.shape[-1]))
        mask_BT = mask_BT.gather(1, picked_BK)
    nope = module.qk_nope_head_dim
    weight_HXC = module.kv_b_proj.weight.view(-1, nope + module.v_head_dim, module.kv_lora_rank)
    query_BHN, query_BHR = query_BH1D[:, :, 0].split([nope, module.qk_rope_head_dim], dim=-1)
    query_BHC = torch.einsum("bhn,hnc->bhc", query_BHN, weight_HXC[:, :nope])
    scores_BHT = query_BHC @ latents_BTC.transpose(1, 2) + query_BHR @ rotary_BTR.transpose(1, 2)
    scores_BHT = (scores_BHT * scaling).masked_fill(~mask_BT[:, None], float("-inf"))
    mixed_BHC = scores_BHT.softmax(-1, dtype=torch.float32).to(latents_BTC.dtype) @ latents_BTC
    return torch.einsum("bhc,hvc->bhv", mixed_BHC, weight_HXC[:, nope:])[:, None]


AttentionInterface.register(IMPLEMENTATION, latent_attention)
