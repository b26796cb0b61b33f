"""Random models small enough for a test: a GLM mixture of experts and a dense Qwen3."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 96

# 32 index heads: with few, many index scores are exactly zero (ReLU), and which of the tied columns are selected
# changes with padding. index_topk 16 is below the tests' lengths, so that the selection really selects.
GLM = {
    "model_type": "glm_moe_dsa", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "n_shared_experts": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "routed_scaling_factor": 1.5, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1, "index_n_heads": 32, "index_head_dim": 16,
    "index_topk": 16, "indexer_types": ["full", "shared", "full"], "max_position_embeddings": 256,
}  # fmt: skip
QWEN = {
    "model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
# The other architectures that AutoEP knows. Two key-value heads, so that tensor parallelism 2 slices them one each.
DEEPSEEK = {
    "model_type": "deepseek_v3", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "n_shared_experts": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "q_lora_rank": 24,
    "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
}  # fmt: skip
QWEN_MOE = {
    "model_type": "qwen3_moe", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "mlp_only_layers": [0], "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "sliding_window": None, "max_position_embeddings": 256,
}  # fmt: skip
CONFIGS = {"glm": GLM, "qwen": QWEN, "deepseek": DEEPSEEK, "qwen-moe": QWEN_MOE, "mixtral": MIXTRAL}


def save_random_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """Weights with a standard deviation of 0.2: at the usual 0.02 a random model says one token for ever."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**CONFIGS[kind], initializer_range=0.2, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.uniform_(-0.1, 0.1)
    model.save_pretrained(folder)
    return folder
