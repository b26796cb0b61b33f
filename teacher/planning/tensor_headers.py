"""The size of a model whose family has no formula: counted from the headers of its safetensors files, which name and
shape every tensor without reading one."""

import json
import struct
from math import prod
from pathlib import Path

from configs.errors import UnusableInput
from teacher.planning.architecture import Architecture, Config, Parts, counted, routed_experts
from teacher.planning.attention_size import Grouped


def count_headers(folder: Path, config: Config, where: str) -> Architecture:
    """A tensor is a routed expert's when `.experts.` is in its name. The cache is taken to be that of grouped-query attention.

    Raises:
        UnusableInput: no weights in the folder, or a config.json without the shape of the attention.
    """
    sizes = {name: size for path in sorted(folder.glob("*.safetensors")) for name, size in tensor_sizes(path).items()}
    if not sizes:
        raise UnusableInput(
            f"{where}: model_type {config.get('model_type')!r} has no size formula and the folder no *.safetensors to count; "
            "add the weights"
        )
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    parts = Parts(other=sum(sizes.values()) - routed, routed_experts=routed)
    return counted(config, where, lambda config: _architecture(config, parts))


def tensor_sizes(path: Path) -> dict[str, int]:
    """Elements of each tensor of a safetensors file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (struct.error, ValueError) as error:
        raise UnusableInput(f"{path}: not a safetensors file (no readable header); download it again") from error
    return {name: prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _architecture(config: Config, parts: Parts) -> Architecture:
    layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    num_experts = routed_experts(config) if parts.routed_experts else 0
    # Not knowing which layers are sparse, one layer stands for all of them: the products are what counts.
    expert = parts.routed_experts // num_experts if num_experts else 0
    return Architecture(
        model_type=str(config.get("model_type", "")),
        layers=layers,
        hidden=hidden,
        vocabulary=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        attention=Grouped(heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or max(1, hidden // heads)),
        parts=parts,
        layer_dense=parts.other // layers,
        sparse_layers=1 if num_experts else 0,
        num_experts=num_experts,
        experts_per_token=config.get("num_experts_per_tok", num_experts),
        expert=expert,
        expert_hidden=config.get("moe_intermediate_size") or config.get("intermediate_size", 0),
    )
