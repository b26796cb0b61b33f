"""Tiny students of every shape that an export has to carry."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from data.chat import encode_conversation
from student.formats.base import Trained
from student.model import load_tokenizer

CONVERSATIONS = [
    [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "reasoning_content": "3+4=7", "content": "7"}],
    [
        {"role": "user", "content": "Spell <this> \u00e4\u00f6\u00fc \u2028 \U0001f680\n\n  twice"},
        {"role": "assistant", "reasoning_content": "", "content": "I don't know"},
    ],
]


def shapes() -> dict[str, PreTrainedConfig]:
    """Rows of 256 values, so that K-quants have their blocks; more embeddings than tokens, as padded vocabularies have."""
    common = {
        "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512, "eos_token_id": 258, "bos_token_id": None,
    }  # fmt: skip
    return {
        "llama": LlamaConfig(**common),
        "qwen2": Qwen2Config(**common),
        "qwen3, tied": Qwen3Config(**common, tie_word_embeddings=True),
    }


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Trained:
    tokenizer = tokenizer or load_tokenizer("embedded")
    return Trained(Path("base"), Path("adapter"), tokenizer, model, calibration(tokenizer))


def calibration(tokenizer: PreTrainedTokenizerBase) -> list[Sequence[int]]:
    return [encode_conversation(tokenizer, messages).ids for messages in CONVERSATIONS]


@torch.no_grad()
def relative_error(found_TV: torch.Tensor, model: PreTrainedModel, ids: Sequence[int]) -> float:
    """Root mean square of the difference over that of the model's own centred logits."""
    expected_TV = model(input_ids=torch.tensor([ids])).logits[0]
    spread = (expected_TV - expected_TV.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((found_TV - expected_TV).square().mean().sqrt() / spread)


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
    """Written out: the whole sequence again for every token."""
    said: list[int] = []
    while len(said) < max_new_tokens and (not said or said[-1] not in stop_ids):
        said.append(int(model(input_ids=torch.tensor([[*ids, *said]])).logits[0, -1].argmax()))
    return said
