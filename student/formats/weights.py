"""Weights as transformers stores them, with all that a server reads beside them."""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.exports import DtypeName
from data.chat import dialect_of
from student.model import DTYPES


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: DtypeName) -> None:
    """Weights in `dtype`, tokenizer with its chat template, and the stops a server needs, all on disk. `model` stays as it is."""
    require_rows(model, tokenizer)
    rounded = empty_copy(model)
    rounded.load_state_dict({name: tensor.to(DTYPES[dtype]) for name, tensor in model.state_dict().items()}, assign=True)
    save_model(rounded, tokenizer, folder)


def empty_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same model on the meta device: load_state_dict(..., assign=True) fills it without a second copy."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def require_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UnusableInput where the tokenizer has ids that the embedding has no row for."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    if len(tokenizer) > (rows := embedding.num_embeddings):
        raise UnusableInput(
            f"export: the tokenizer has {len(tokenizer)} ids, the embedding {rows} rows; use the base's own tokenizer"
        )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights as they stand (a tied head once), tokenizer with its chat template, and the stops a server needs, all on disk."""
    model.tie_weights()
    model.generation_config = generation_config(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)  # safetensors writes 0600, and servers run as somebody else


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Stops and padding only: every server reads eos from here, and a dialect has more than one stop. No sampling
    defaults, so that greedy requests stay greedy."""
    stops = list(dialect_of(tokenizer).stop_ids(tokenizer))
    return GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id)
