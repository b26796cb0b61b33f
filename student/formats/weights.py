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
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    if len(tokenizer) > (rows := embedding.num_embeddings):
        raise UnusableInput(
            f"export: the tokenizer has {len(tokenizer)} ids, the embedding {rows} rows; use the base's own tokenizer"
        )
    with torch.device("meta"):
        rounded = type(model)(copy.deepcopy(model.config))
    rounded.load_state_dict({name: tensor.to(DTYPES[dtype]) for name, tensor in model.state_dict().items()}, assign=True)
    rounded.tie_weights()
    rounded.generation_config = generation_config(tokenizer)
    rounded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)  # safetensors writes 0600, and servers run as somebody else


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Stops and padding only: every server reads eos from here, and a dialect has more than one stop. No sampling
    defaults, so that greedy requests stay greedy."""
    stops = list(dialect_of(tokenizer).stop_ids(tokenizer))
    return GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id)
