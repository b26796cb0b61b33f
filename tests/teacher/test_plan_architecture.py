"""Sizes from a config.json against transformers' own modules, built without memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GlmMoeDsaConfig

from configs.errors import UnusableInput
from teacher.folders import read_config_json
from teacher.plan import architecture_of
from teacher.planning.architecture import FAMILIES, Architecture, read_architecture
from teacher.planning.attention_size import Grouped, Latent
from teacher.planning.tensor_headers import count_headers
from tests.teacher.models import GLM, QWEN

SHIPPED = Path("configs/architectures/glm-5.2")
SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
          "v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": GLM,
    "deepseek_v3": SMALL | LATENT | EXPERTS,
    "qwen3_moe": SMALL | EXPERTS | {"num_experts": 8, "head_dim": 8, "decoder_sparse_step": 2},
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": QWEN,
    "qwen2": SMALL,
    "llama": SMALL,
    "mistral": SMALL | {"head_dim": 16},
}
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("glm_moe_dsa", {"indexer_types": ["full"] * 3}),
    ("glm_moe_dsa", {"n_shared_experts": 2, "vocab_size": 33}),
    ("glm_moe_dsa", {"first_k_dense_replace": 2, "attention_bias": True}),
    ("deepseek_v3", {"q_lora_rank": None}),
    ("deepseek_v3", {"attention_bias": True, "first_k_dense_replace": 3}),
    ("qwen3_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 1, "attention_bias": True}),
    ("mixtral", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
]


def modules_of(config: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def test_every_family_is_compared() -> None:
    assert set(MODELS) == set(FAMILIES)


@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in MODELS), *CHANGES])
def test_the_formula_equals_the_modules(family: str, changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model(**({"model_type": family} | MODELS[family] | changes))
    assert read_architecture(config.to_dict(), family).parts.total == modules_of(config)


def test_the_default_configuration_has_744_billion_parameters_42_active() -> None:
    found = read_architecture(GlmMoeDsaConfig().to_dict(), "default")
    assert (round(found.parts.total / 1e9, 1), round(found.active / 1e9, 1)) == (743.9, 41.8)
    assert round(found.parts.routed_experts / 1e9, 1) == 724.8


def test_the_shipped_architecture_is_what_transformers_builds_from_it() -> None:
    config = AutoConfig.from_pretrained(SHIPPED)
    assert type(config) is GlmMoeDsaConfig and config.max_position_embeddings == 2**20
    found = architecture_of(str(SHIPPED))
    assert found.parts.total == modules_of(config) == 743_377_000_704
    assert round(found.parts.dense / 1e9, 1) == 18.6


def test_the_checkpoint_is_larger_by_the_layer_that_predicts_several_tokens() -> None:
    """1,506,659,919,872 bytes of BF16 are published, 753.3 B parameters: one more sparse layer with an indexer, a projection
    of two hidden states into one, and norms."""
    found = architecture_of(str(SHIPPED))
    parts = found.parts
    one_layer = parts.attention / 78 + parts.indexer / 21 + (parts.routed_experts + parts.shared_experts + parts.router) / 75
    one_layer += 2 * 6144**2
    assert found.parts.total + one_layer == pytest.approx(1_506_659_919_872 / 2, rel=1e-4)


def test_indexers_stand_on_the_first_three_layers_and_every_fourth_from_the_sixth() -> None:
    config = read_config_json(SHIPPED)
    full = [layer for layer, kind in enumerate(config["indexer_types"]) if kind == "full"]
    assert full == [0, 1, 2, *range(6, 78, 4)] and len(full) == 21
    schedule = {"index_topk_freq": 4, "index_skip_topk_offset": 3, "num_hidden_layers": 78}
    assert AutoConfig.for_model("glm_moe_dsa", **schedule).indexer_types == config["indexer_types"]


@pytest.mark.parametrize("schedule", [{}, {"index_topk_freq": 4}, {"index_topk_pattern": "FSF"}, {"index_topk_freq": 2}])
def test_a_schedule_of_indexers_means_what_it_means_to_transformers(schedule: dict[str, Any]) -> None:
    given = {name: value for name, value in GLM.items() if name != "indexer_types"} | schedule
    expected = AutoConfig.for_model(**given).indexer_types.count("full")
    assert read_architecture(given, "x").attention.num_indexers == expected


def test_headers_equal_the_modules(qwen_folder: Path, glm_folder: Path) -> None:
    for folder in (qwen_folder, glm_folder):
        config = read_config_json(folder)
        formula, counted = read_architecture(config, "x"), count_headers(folder, config, "x")
        biases = sum(name == "sparse" for name in config.get("mlp_layer_types", ())) * 8  # the routers' buffers
        assert counted.parts.total == formula.parts.total + biases
        assert counted.parts.routed_experts == formula.parts.routed_experts
        assert counted.active - biases == formula.active


def test_an_unknown_family_without_weights_is_one_line() -> None:
    with pytest.raises(UnusableInput, match="model_type 'gpt9' has no size formula and the folder no"):
        count_headers(SHIPPED, {"model_type": "gpt9"}, "teacher.model x")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UnusableInput, match="x: no kv_lora_rank in config.json, which glm_moe_dsa needs"):
        read_architecture({name: value for name, value in GLM.items() if name != "kv_lora_rank"}, "x")


# --- attention, against sums written out ---------------------------------------------------------------------------

SPARSE = Latent(heads=3, latent=8, rotary=2, nope=4, value=5, num_indexers=2, index_heads=4, index_dim=6, index_topk=10)


def test_a_decode_step_reads_the_selected_latents_and_every_indexer_key() -> None:
    assert SPARSE.values_read(layers=5, tokens=7) == 5 * 7 * 10 + 2 * 7 * 6
    assert SPARSE.values_read(layers=5, tokens=100) == 5 * 10 * 10 + 2 * 100 * 6


def test_prefill_computes_the_cheaper_form_of_every_query() -> None:
    """Expanded, a pair costs 4 + 2 + 5 multiplications a head; absorbed, one of 10 selected costs 8 + 2 + 8."""
    for tokens in (1, 10, 40, 200):
        slow = sum(min(seen * 11, 10 * 18) for seen in range(1, tokens + 1))
        assert SPARSE.prefill_flops(5, tokens) == pytest.approx(2 * 5 * 3 * slow, rel=1 / tokens + 0.02)  # i - 1/2 against i


def test_glm_breaks_even_at_4352_tokens() -> None:
    glm = architecture_of(str(SHIPPED)).attention
    assert isinstance(glm, Latent)
    assert glm.index_topk * (2 * glm.latent + glm.rotary) / (glm.nope + glm.rotary + glm.value) == 4352


def test_grouped_attention_counts_every_pair() -> None:
    grouped = Grouped(heads=4, kv_heads=2, head_dim=8)
    assert grouped.decode_flops(layers=3, tokens=50) == 3 * 4 * 50 * (8 + 8) * 2
    slow = sum(3 * 4 * seen * (8 + 8) * 2 for seen in range(1, 401))
    assert grouped.prefill_flops(3, 400) == pytest.approx(slow, rel=0.003)
    assert isinstance(architecture_of("configs/architectures/qwen3-235b-a22b"), Architecture)
