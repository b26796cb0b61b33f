"""What a teacher weighs and whether it fits: arithmetic over its config.json and the recipe's layout. Nothing is loaded.

Parameter counts follow the modules of transformers' `glm_moe_dsa`; its default configuration gives 743.9 B parameters,
41.8 B active. Other architectures are counted from the headers of their safetensors files.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from configs.errors import UnusableInput
from configs.schema import DeepSpeedEngine, HttpEngine, Teacher
from teacher.folders import model_folder, read_config_json

GPU_BYTES = {"h100": 80e9, "h200": 141e9, "b200": 180e9}
USABLE_SHARE = 0.92
"""What weights and cache may take of a GPU; the rest is the CUDA context, NCCL's buffers and fragmentation."""
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}


class Parameters(NamedTuple):
    """routed: all routed experts. dense: everything else. active: what one token is multiplied with."""

    dense: int
    routed: int
    active: int

    @property
    def total(self) -> int:
        return self.dense + self.routed


class Plan(NamedTuple):
    """Bytes are per GPU (per rank on CPU). left_bytes: for cache and activations; None where the device has no known
    size. cache_bytes_per_token: of one request, all layers, in the compute dtype; latents are not split by tensor
    parallelism, so each of its ranks holds them all."""

    model: str
    total_parameters: int
    active_parameters: int
    ranks: int
    weight_bytes: int
    left_bytes: int | None
    cache_bytes_per_token: int
    fits: bool | None


def glm_parameters(config: Mapping[str, Any]) -> Parameters:
    """Of a complete `glm_moe_dsa` configuration (as transformers saves it)."""
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    q_lora, kv_lora, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    queries = hidden * q_lora + q_lora + q_lora * heads * (nope + rope)
    keys_values = hidden * (kv_lora + rope) + kv_lora + kv_lora * heads * (nope + value)
    attention = queries + keys_values + heads * value * hidden
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
    indexer = q_lora * index_heads * index_dim + hidden * index_dim + 2 * index_dim + hidden * index_heads
    num_full, num_sparse = config["indexer_types"].count("full"), config["mlp_layer_types"].count("sparse")
    expert = 3 * hidden * config["moe_intermediate_size"]
    sparse = hidden * config["n_routed_experts"] + expert * config["n_shared_experts"]
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    dense = (
        embeddings
        + hidden
        + layers * (attention + 2 * hidden)
        + num_full * indexer
        + num_sparse * sparse
        + (layers - num_sparse) * 3 * hidden * config["intermediate_size"]
    )
    routed = num_sparse * config["n_routed_experts"] * expert
    return Parameters(dense, routed, dense + num_sparse * config["num_experts_per_tok"] * expert)


def header_parameters(folder: Path, config: Mapping[str, Any]) -> Parameters:
    """From the shapes in the safetensors headers; a tensor is a routed expert's when `.experts.` is in its name."""
    dense = routed = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                size = _product(entry["shape"])
                dense, routed = (dense, routed + size) if ".experts." in name else (dense + size, routed)
    if dense + routed == 0:
        raise UnusableInput(f"{folder}: no weights and not a glm_moe_dsa configuration; expected *.safetensors to count")
    experts = config.get("n_routed_experts") or config.get("num_experts") or config.get("num_local_experts") or 1
    share = config.get("num_experts_per_tok", experts) / experts
    return Parameters(dense, routed, dense + int(routed * share))


def cache_values_per_token(config: Mapping[str, Any]) -> int:
    """Numbers kept per token of one request: latents and rotary keys on every layer, indexer keys on the full ones; for
    other architectures keys and values of grouped-query attention."""
    layers = config["num_hidden_layers"]
    if config.get("model_type") == "glm_moe_dsa":
        return (
            layers * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
            + config["indexer_types"].count("full") * config["index_head_dim"]
        )
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * layers * config.get("num_key_value_heads", heads) * head_dim


def weight_bytes_per_rank(
    parameters: Parameters, *, ranks: int, expert: int, tensor: int, zero_stage: int, bytes_per_weight: int
) -> int:
    """Experts are spread over `expert` ranks. Dense weights are cut by tensor parallelism, and by ZeRO-3 over all ranks."""
    dense_cut = ranks if zero_stage == 3 else tensor
    return -(-parameters.routed * bytes_per_weight // expert) + -(-parameters.dense * bytes_per_weight // dense_cut)


def plan_teacher(teacher: Teacher) -> Plan:
    """Raises UnusableInput when the model's folder or configuration cannot be read, or the teacher is not ours to place."""
    engine = teacher.engine
    if isinstance(engine, HttpEngine):
        raise UnusableInput("teacher.engine http: the server places its own weights; plan needs engine type deepspeed or local")
    folder = model_folder(teacher.model)
    config = read_config_json(folder)
    parameters = glm_parameters(config) if config.get("model_type") == "glm_moe_dsa" else header_parameters(folder, config)
    sharded = isinstance(engine, DeepSpeedEngine)
    ranks = engine.processes * teacher.hardware.nodes if isinstance(engine, DeepSpeedEngine) else 1
    weight_bytes = weight_bytes_per_rank(
        parameters,
        ranks=ranks,
        expert=teacher.layout.expert_parallel if sharded else 1,
        tensor=teacher.layout.tensor_parallel if sharded else 1,
        zero_stage=teacher.layout.zero_stage if sharded else 0,
        bytes_per_weight=WEIGHT_BYTES[engine.dtype],
    )
    gpu_bytes = GPU_BYTES.get(teacher.hardware.gpu)
    left_bytes = None if gpu_bytes is None else int(gpu_bytes * USABLE_SHARE) - weight_bytes
    return Plan(
        model=teacher.model,
        total_parameters=parameters.total,
        active_parameters=parameters.active,
        ranks=ranks,
        weight_bytes=weight_bytes,
        left_bytes=left_bytes,
        cache_bytes_per_token=cache_values_per_token(config) * WEIGHT_BYTES[engine.dtype],
        fits=None if left_bytes is None else left_bytes > 0,
    )


def plan_table(plan: Plan) -> Table:
    """One figure a row: it fits a terminal of 80 columns."""
    table = Table("teacher", plan.model, show_edge=False)
    table.add_row("parameters", _human(plan.total_parameters, ""))
    table.add_row("active per token", _human(plan.active_parameters, ""))
    table.add_row("ranks", str(plan.ranks))
    table.add_row("weights per rank", _human(plan.weight_bytes, "B"))
    table.add_row("left per rank", "unknown" if plan.left_bytes is None else _human(plan.left_bytes, "B"))
    table.add_row("cache per token", _human(plan.cache_bytes_per_token, "B"))
    table.add_row("fits", {None: "unknown", True: "yes", False: "no"}[plan.fits])
    return table


def _product(shape: list[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _human(value: float, unit: str) -> str:
    """Three or four figures with a decimal prefix: 743.9 G."""
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:.4g} {prefix}{unit}".strip()
        value /= 1000
    return f"{value:.4g} T{unit}"
