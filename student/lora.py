"""LoRA on the student: which layers it is on, how it starts, and when folding it into the weight is quicker.

What PEFT 0.21 does to a head and an embedding that share one tensor, measured on a tied Qwen3 (logits of order 10):
- both in modules_to_save with ensure_weight_tying: one weight is trained, saved, loaded and merged, and the tie holds;
- both without it, or one alone: each gets a copy of its own, the tie is gone, and only a warning says so;
- an adapter on both: the merged logits are 23 off (each is added to the tensor that they share), with ensure_weight_tying 7, and
  then even the reloaded adapter is 4 off.
So the first is what happens here, and the others are refused.
"""

import re
from collections.abc import Sequence
from types import MethodType
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from configs.errors import UnusableInput
from configs.training import Lora
from data.records import digest
from student.adapter_files import trainable

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of experts."""
ROUTER_TYPE = re.compile(r"Router|Gate$")
"""Class names of modules whose linear layers choose experts. The gated MLP's `gate_proj` is a layer of an MLP."""


class Targets(NamedTuple):
    """names: last components (or longer endings) of module names. excluded: full names that end so and are not meant."""

    names: list[str]
    excluded: list[str]


# --- which layers ------------------------------------------------------------------------------------------------


def linear_names(model: PreTrainedModel, besides: Sequence[str] = ()) -> Targets:
    """Every linear layer but the output head, the routers of an MoE, and those that `besides` names: `down_proj`, `q_proj`, ...

    Found by module type, so that any architecture works. Fused experts (3-D parameters, no nn.Linear) are not in it.
    """
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    excluded = {name for name, module in layers.items() if module is head or is_router(model, name) or is_named(name, besides)}
    names = {name.rpartition(".")[2] for name in layers.keys() - excluded}
    if not names:
        raise UnusableInput(f"{model.config.model_type}: no nn.Linear layer besides the head; LoRA has nothing to adapt")
    return Targets(sorted(names), sorted(name for name in excluded if name.rpartition(".")[2] in names))


def is_router(model: PreTrainedModel, name: str) -> bool:
    """Whether this linear layer chooses experts, or weighs shared ones: by the type of the module it is or is in, or by its place
    beside `experts` with one output for each of them, or one alone."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if any(ROUTER_TYPE.search(type(module).__name__) for module in (model.get_submodule(name), parent)):
        return True
    config = model.config.get_text_config()
    counts = {1, *(count for key in EXPERT_COUNTS if isinstance(count := getattr(config, key, None), int))}
    return hasattr(parent, "experts") and getattr(model.get_submodule(name), "out_features", None) in counts


def targets_of(model: PreTrainedModel, lora: Lora) -> Targets:
    """The layers to adapt. Raises UnusableInput for a name that no linear layer and no embedding has."""
    if lora.targets == "all-linear":
        return linear_names(model, besides=lora.modules_to_save)
    there = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    refuse_unknown("targets", lora.targets, there, model)
    return Targets(list(lora.targets), [])


def refuse_unknown(setting: str, wanted: tuple[str, ...], there: list[str], model: PreTrainedModel) -> None:
    for name in wanted:
        if not any(is_named(module, [name]) for module in there):
            names = ", ".join(sorted({module.rpartition(".")[2] for module in there}))
            raise UnusableInput(
                f"student.lora.{setting}: no layer {name} in this {model.config.model_type}; expected any of {names}"
            )


def refuse_namesakes(wanted: tuple[str, ...], there: list[str]) -> None:
    """PEFT 0.21 trains every module whole whose name ends in the letters of one in modules_to_save: `norm` is input_layernorm
    too."""
    for name in wanted:
        others = {module.rpartition(".")[2] for module in there if module.endswith(name) and not is_named(module, wanted)}
        if others:
            raise UnusableInput(
                f"student.lora.modules_to_save: {name} would train {', '.join(sorted(others))} too, whose names end so; name "
                f"them all, or leave {name} out"
            )


def is_named(module: str, names: Sequence[str]) -> bool:
    """Whether any of the names means this module, by PEFT's rule."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def trains_tied_pair(model: PreTrainedModel, lora: Lora, targets: Targets) -> bool:
    """Whether head and embedding share one tensor, and it is trained whole.

    Raises:
        UnusableInput: where they do and only one of them would change, or each by an adapter of its own.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding) or head.weight is not embedding.weight:
        return False
    pair = [name for name, module in model.named_modules() if module is head or module is embedding]
    adapted = sorted(modules_meant(model, targets) & {*pair})
    whole = [one for one in pair if is_named(one, lora.modules_to_save)]
    if adapted or len(whole) == 1:
        one, setting = (*adapted, *whole)[0], "targets" if adapted else "modules_to_save"
        (other,) = [name for name in pair if name != one]
        raise UnusableInput(
            f"student.lora.{setting}: {one} and {other} share one tensor (tie_word_embeddings), and a change of one alone would "
            "untie them; expected both in student.lora.modules_to_save, or neither"
        )
    return bool(whole)


# --- putting it on -----------------------------------------------------------------------------------------------


def attach(model: PreTrainedModel, lora: Lora, *, seed: int) -> PeftModel:
    """Freezes the base and adds adapters, which change nothing yet: lora_B is zero. Each lora_A depends on `seed` and the name of
    its layer alone. Modules to train whole are copies; a head that is tied to its embedding stays so.

    Raises:
        UnusableInput: a name that the model does not have, or half of a tied pair.
    """
    targets = targets_of(model, lora)
    leaves = [name for name, module in model.named_modules() if is_leaf(module)]
    refuse_unknown("modules_to_save", lora.modules_to_save, leaves, model)
    refuse_namesakes(lora.modules_to_save, leaves)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.rslora, use_dora=lora.dora,
        target_modules=targets.names, exclude_modules=targets.excluded or None,
        modules_to_save=list(lora.modules_to_save) or None, ensure_weight_tying=trains_tied_pair(model, lora, targets),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    meant, model_type = modules_meant(model, targets), model.config.model_type
    with torch.random.fork_rng():
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    refuse_other_layers(adapted, meant, model_type)
    draw_start(adapted, seed)
    return adapted


def modules_meant(model: PreTrainedModel, targets: Targets) -> set[str]:
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    return {layer for layer in layers if is_named(layer, targets.names)} - {*targets.excluded}


def refuse_other_layers(adapted: PeftModel, meant: set[str], model_type: str) -> None:
    """Raises UnusableInput where PEFT adapted other layers than those that were meant.

    For mixtures of experts whose experts transformers 5 keeps in one tensor, PEFT 0.21 reads `gate_proj`, `up_proj` and
    `down_proj` as those experts: it adapts them, at twice the rank, and leaves out shared experts and dense layers so named.
    """
    found = {name for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    if other := sorted(found ^ meant):
        raise UnusableInput(
            f"student.lora.targets: for the type {model_type} PEFT adapts other layers than those asked for ({other[0]}, "
            f"{len(other)} in all); expected attention layers only: targets [q_proj, k_proj, v_proj, o_proj]"
        )


def is_leaf(module: nn.Module) -> bool:
    """With weights, and without modules in it that might be adapted."""
    return not any(True for _ in module.children()) and any(True for _ in module.parameters())


@torch.no_grad()
def draw_start(adapted: PeftModel, seed: int) -> None:
    """Draws the random factor of every adapter from (seed, name of the tensor), in float32.

    PEFT draws them one after the other in the adapter's own dtype, so that another target, or another precision, gives every
    later layer another start. The distributions are PEFT's: uniform in +-1 / sqrt(inputs); of an embedding normal.
    """
    for name, parameter in trainable(adapted).items():
        if parameter.is_meta or not (".lora_A." in name or ".lora_embedding_B." in name):
            continue
        generator = torch.Generator().manual_seed(int(digest(name, seed, size=8), 16) >> 1)
        drawn = torch.empty(parameter.shape, dtype=torch.float32)
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            drawn.uniform_(-bound, bound, generator=generator)
        else:
            drawn.normal_(generator=generator)
        parameter.copy_(drawn)


# --- speed -------------------------------------------------------------------------------------------------------


def fold_small_layers(model: PeftModel) -> int:
    """Computes W + s B A once a forward pass where that costs less than the two low-rank products a token; returns how many.

    Forward and backward of one token take 2io + 3r(i+o) multiply-adds as PEFT computes it and 3io folded (i inputs, o
    outputs, rank r), so folding wins when 3r(i+o) > io: always in the embedded pair (r 64 on 128 wide: 1.2 to 1.4 x the tokens
    a second), never in a 7 B model. Only for float32 (in bf16 the sum W + s B A rounds a young adapter away), without dropout
    (it falls on the adapter's input alone) and without DoRA (it rescales the sum). s is whatever PEFT scales by, rsLoRA's too.
    The weight must be whole on this rank: not for ZeRO-3.
    """
    folded = 0
    for module in model.modules():
        if isinstance(module, LoraLinear) and _folding_pays(module):
            module.forward = MethodType(_folded_forward, module)
            folded += 1
    return folded


def _folding_pays(layer: LoraLinear) -> bool:
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear)
    is_plain = isinstance(layer.lora_dropout["default"], nn.Identity) and "default" not in layer.lora_variant
    inputs, outputs = base.in_features, base.out_features
    return base.weight.dtype == torch.float32 and is_plain and 3 * layer.r["default"] * (inputs + outputs) > inputs * outputs


def _folded_forward(self: LoraLinear, hidden: torch.Tensor) -> torch.Tensor:
    base = self.get_base_layer()
    if self.disable_adapters or self.merged:
        return LoraLinear.forward(self, hidden)
    low, high = self.lora_A["default"].weight, self.lora_B["default"].weight
    assert isinstance(base, nn.Linear) and isinstance(low, torch.Tensor) and isinstance(high, torch.Tensor)
    weight = torch.addmm(base.weight, high, low, alpha=self.scaling["default"])
    return nn.functional.linear(hidden, weight, base.bias)
