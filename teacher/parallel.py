"""A layout's degrees: what they must divide, and how DeepSpeed is told of them. Imports no DeepSpeed."""

from typing import Any, Literal, NamedTuple

from transformers import PretrainedConfig

from configs.errors import UnusableInput
from teacher.families import HEAD, family_of

Dtype = Literal["fp32", "bf16"]


class Parallel(NamedTuple):
    """Degrees of the layout. expert: ranks that share the experts. tensor: ranks that share one layer's dense matrices;
    they work on the same requests. zero_stage: 3 slices dense weights over all ranks, 0 replicates them."""

    expert: int = 1
    tensor: int = 1
    zero_stage: Literal[0, 3] = 3


def zero_config(dtype: Dtype, parallel: Parallel) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that HfDeepSpeedConfig may see. It would misread the parallel sections, and
    no torch dtype object may stand in it. Threshold 0: the default keeps small parameters whole on each rank, which
    hides, on small models, every fault of ranks that step apart.

    Without ZeRO the bf16 section stays off: the weights are loaded in bf16 anyway, and with it DeepSpeed wants an
    optimizer as soon as experts are parallel (an assertion in its engine)."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bf16" and parallel.zero_stage == 3},
        "zero_optimization": {"stage": parallel.zero_stage, "stage3_param_persistence_threshold": 0},
    }


def parallel_config(parallel: Parallel, model_type: str) -> dict[str, Any]:
    """The sections that only `deepspeed.initialize` gets.

    Every family goes under AutoEP's preset for DeepSeek-V3 with its own routing spelt out: all keep router and experts in
    the same places, AutoEP has no name for GLM, and its presets for Qwen3-MoE and Mixtral raise TypeError under
    transformers 5.23 (they re-hook the output recorders of a registry whose `get` has lost its second argument).
    """
    sections: dict[str, Any] = {}
    if parallel.expert == parallel.tensor == 1:
        return sections
    family = family_of(model_type)
    if parallel.expert > 1:
        routing = {"preset_model": "deepseek_v3", "score_func": family.scores, "route_norm": family.normalised}
        if not family.has_shared_experts:
            routing |= {"num_experts_attr": "num_local_experts", "has_shared_experts": False}
        sections["expert_parallel"] = {"enabled": True, "autoep_size": parallel.expert} | routing
    if parallel.tensor > 1:
        slices = [("column", family.column), ("row", family.row), ("skip", family.whole)]
        specs = [{"patterns": list(patterns), "partition_type": kind} for kind, patterns in slices]
        head = {"patterns": [HEAD], "partition_type": "column", "gather_output": True}
        partition = {"use_default_specs": False, "layer_specs": [*specs, head]}
        sections["tensor_parallel"] = {"autotp_size": parallel.tensor, "partition_config": partition}
    return sections


def check_layout(parallel: Parallel, config: PretrainedConfig, world: int, ranks_per_node: int) -> None:
    """Raises UnusableInput when the degrees do not fit the ranks, the experts or what DeepSpeed can do.

    AutoEP and AutoTP both group neighbouring ranks: expert groups are [0, expert), [expert, 2 expert), ..., tensor groups
    likewise. So tensor groups stay inside a node when they tile it; expert groups may span tensor groups and nodes.
    """
    num_experts = int(getattr(config, "num_local_experts", 0) or 0)  # transformers' common name for all families
    for name, degree in (("expert_parallel", parallel.expert), ("tensor_parallel", parallel.tensor)):
        if world % degree:
            raise UnusableInput(f"layout.{name} {degree}: does not divide the {world} ranks; expected a divisor of {world}")
    if parallel.expert > 1 and (num_experts == 0 or num_experts % parallel.expert):
        raise UnusableInput(f"layout.expert_parallel {parallel.expert}: does not divide the model's {num_experts} experts")
    if ranks_per_node % parallel.tensor:
        raise UnusableInput(
            f"layout.tensor_parallel {parallel.tensor}: does not divide the {ranks_per_node} ranks of a node; a layer's slices "
            "are summed at every matrix and must not cross the network"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (heads := int(getattr(config, name, 0) or 0)) % parallel.tensor:
            raise UnusableInput(
                f"layout.tensor_parallel {parallel.tensor}: does not divide the model's {name} {heads}; expected a divisor"
            )
