"""Students small enough to measure, of every family that a plan counts, with sizes that no power of two divides."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_config(family: str, *, layers: int = 3, kv_heads: int = 2, **others: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        family, vocab_size=101, hidden_size=36, intermediate_size=50, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=kv_heads, max_position_embeddings=512, **({"head_dim": 10} if family == "qwen3" else {}), **others,
    )  # fmt: skip
