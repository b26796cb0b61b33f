"""Both shipped students at their true shape on the meta device: names, counts and parameters are the plan's."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from configs.errors import UnusableInput
from configs.load import load_recipe
from configs.training import Lora
from student.lora import attach
from student.plan import REPOSITORY, plan_student
from student.planning.adapter import Adapter, adapter_of, frozen_tensors
from student.planning.shape import Shape, read_shape
from tests.student.plan_models import FAMILIES, tiny_config

RECIPES = ("student-7b", "student-13b")
LORAS: dict[str, dict[str, Any]] = {
    "all": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "attention": {"targets": ("q_proj", "v_proj")},
    "dotted": {"targets": ("mlp.down_proj", "self_attn.o_proj")},
    "head": {"targets": ("lm_head", "k_proj")},
    "saved head": {"modules_to_save": ("lm_head",)},
    "saved both": {"modules_to_save": ("lm_head", "embed_tokens")},
    "saved layer": {"modules_to_save": ("o_proj",)},
}


def on_meta(config: PreTrainedConfig, lora: Lora) -> PeftModel:
    with torch.device("meta"):
        return attach(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), lora, seed=0)


def assert_is_planned(model: PeftModel, shape: Shape, adapter: Adapter) -> None:
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == adapter.parameters
    assert sum(parameter.numel() for parameter in parameters) == shape.parameters + adapter.parameters
    assert sorted(parameter.numel() for parameter in trained) == sorted(adapter.tensors.elements())
    frozen = sorted(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    assert frozen == sorted(frozen_tensors(shape).elements())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == adapter.layers
    for target in adapter.targets:
        mine = [module for name, module in layers.items() if name.endswith(f".{target.name.removeprefix('model.')}")]
        assert [(one.in_features, one.out_features) for one in mine] == [(target.inputs, target.outputs)] * target.count


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_student_at_true_shape_is_what_its_recipe_plans(name: str) -> None:
    recipe = load_recipe(name).recipe
    plan = plan_student(recipe)
    config = AutoConfig.from_pretrained(REPOSITORY / recipe.student.model, local_files_only=True)
    assert_is_planned(on_meta(config, recipe.student.lora), plan.shape, plan.adapter)


def test_the_published_sizes_are_met() -> None:
    """What the models' own cards count: 7.62 B for Qwen2.5-7B, 13.02 B for Llama 2 13B's shape with 32,016 tokens."""
    sizes = [plan_student(load_recipe(name).recipe).shape.parameters for name in RECIPES]
    assert sizes == [7_615_616_512, 13_016_028_160]


@pytest.mark.parametrize("options", LORAS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_option_of_lora_is_counted(family: str, options: str) -> None:
    config, lora = tiny_config(family, layers=2), Lora(rank=3, alpha=6, **LORAS[options])
    shape = read_shape(config.to_dict(), "tiny")
    assert_is_planned(on_meta(config, lora), shape, adapter_of(shape, lora))


@pytest.mark.parametrize("options", ["all", "saved both"])
def test_a_head_that_is_the_embedding_is_counted_once(options: str) -> None:
    config, lora = tiny_config("qwen2", layers=2, tie_word_embeddings=True), Lora(rank=3, alpha=6, **LORAS[options])
    shape = read_shape(config.to_dict(), "tiny")
    assert_is_planned(on_meta(config, lora), shape, adapter_of(shape, lora))


@pytest.mark.parametrize("options", ["head", "saved head"])
def test_half_of_a_tied_pair_is_refused_by_the_plan_as_by_the_training(options: str) -> None:
    config, lora = tiny_config("qwen3", layers=2, tie_word_embeddings=True), Lora(rank=3, alpha=6, **LORAS[options])
    shape = read_shape(config.to_dict(), "tiny")
    for refused in (lambda: adapter_of(shape, lora), lambda: on_meta(config, lora)):
        with pytest.raises(UnusableInput, match="share one tensor"):
            refused()


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_are_those_that_the_configuration_asks_for(family: str) -> None:
    asked = {"attention_bias": True} | ({"mlp_bias": True} if family == "llama" else {})
    config = tiny_config(family, layers=2, kv_heads=6, **asked)
    shape = read_shape(config.to_dict(), "tiny")
    assert_is_planned(on_meta(config, Lora(rank=3)), shape, adapter_of(shape, Lora(rank=3)))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' has no size formula; expected one of llama"),
        ({}, "model_type None has no size formula"),
        ({"model_type": ["llama"]}, "has no size formula"),
        ({"model_type": "llama"}, "num_hidden_layers None in config.json; expected a whole number"),
        (tiny_config("llama").to_dict() | {"hidden_size": 10**12}, "hidden_size 1000000000000 in config.json"),
        (tiny_config("llama").to_dict() | {"num_key_value_heads": 4}, "6 heads, 4 for keys"),
    ],
)
def test_a_configuration_that_cannot_be_counted_is_one_line(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnusableInput, match=said) as refused:
        read_shape(config, "student.model x")
    assert "\n" not in str(refused.value)


def test_a_target_that_no_module_has_is_refused_with_the_names_there_are() -> None:
    shape = read_shape(tiny_config("llama").to_dict(), "tiny")
    with pytest.raises(UnusableInput, match="no module is called query; expected one of embed_tokens, q_proj"):
        adapter_of(shape, Lora(targets=("query",)))
