"""Sizes against transformers' own modules and the published table."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GlmMoeDsaConfig

from configs.errors import UnusableInput
from configs.schema import DeepSpeedEngine, Hardware, HttpEngine, Layout, Teacher
from teacher.plan import (
    cache_values_per_token,
    glm_parameters,
    header_parameters,
    plan_table,
    plan_teacher,
    weight_bytes_per_rank,
)
from tests.teacher.models import GLM, QWEN


def complete(config: dict[str, Any]) -> dict[str, Any]:
    return AutoConfig.for_model(**config).to_dict()


def count(config: dict[str, Any]) -> int:
    with torch.device("meta"):
        return sum(
            parameter.numel() for parameter in AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).parameters()
        )


def test_the_default_configuration_has_744_billion_parameters_42_active() -> None:
    parameters = glm_parameters(GlmMoeDsaConfig().to_dict())
    assert (round(parameters.total / 1e9, 1), round(parameters.active / 1e9, 1)) == (743.9, 41.8)
    assert round(parameters.routed / 1e9, 1) == 724.8


@pytest.mark.parametrize(
    "changes", [{}, {"indexer_types": ["full"] * 3}, {"n_shared_experts": 2}, {"first_k_dense_replace": 2}, {"vocab_size": 33}]
)
def test_the_formula_equals_the_modules(changes: dict[str, Any]) -> None:
    assert glm_parameters(complete(GLM | changes)).total == count(GLM | changes)


def test_headers_equal_the_modules(qwen_folder: Path, glm_folder: Path) -> None:
    dense = header_parameters(qwen_folder, complete(QWEN))
    assert (dense.total, dense.routed, dense.active) == (count(QWEN), 0, count(QWEN))
    sparse, formula = header_parameters(glm_folder, complete(GLM)), glm_parameters(complete(GLM))
    assert sparse.routed == formula.routed and sparse.active - formula.active == sparse.dense - formula.dense


def test_a_token_of_cache_takes_95_kilobytes_in_bf16() -> None:
    types = ["full"] * 21 + ["shared"] * 57
    values = cache_values_per_token(GlmMoeDsaConfig(indexer_types=types).to_dict())
    assert values == 78 * (512 + 64) + 21 * 128
    assert round(values * 2 / 1000, 1) == 95.2


@pytest.mark.parametrize(
    ("ranks", "expert", "tensor", "zero_stage", "gigabytes"),
    [(32, 32, 8, 0, 49.9), (16, 16, 8, 0, 95.2), (16, 16, 1, 0, 128.9), (16, 16, 1, 3, 93.0)],
)
def test_weights_per_gpu_follow_the_layout(ranks: int, expert: int, tensor: int, zero_stage: int, gigabytes: float) -> None:
    """744 B in BF16; experts over `expert` ranks, the other 19.1 B by tensor parallelism or over all ranks."""
    parameters = glm_parameters(GlmMoeDsaConfig().to_dict())
    found = weight_bytes_per_rank(
        parameters, ranks=ranks, expert=expert, tensor=tensor, zero_stage=zero_stage, bytes_per_weight=2
    )
    assert found / 1e9 == pytest.approx(gigabytes, abs=0.3)


def test_a_plan_says_whether_it_fits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GlmMoeDsaConfig().to_dict()))
    engine = DeepSpeedEngine(processes=8, dtype="bf16")
    one = Teacher(model=str(tmp_path), engine=engine, hardware=Hardware(gpu="h200"), layout=Layout(expert_parallel=8))
    four = one.model_copy(update={"hardware": Hardware(gpu="h200", nodes=4), "layout": Layout(expert_parallel=32)})
    assert (plan_teacher(one).fits, plan_teacher(four).fits) == (False, True)
    assert plan_teacher(four).ranks == 32
    assert plan_teacher(one.model_copy(update={"hardware": Hardware(gpu="cpu")})).fits is None
    assert plan_table(plan_teacher(four)).row_count == 7


def test_a_server_places_its_own_weights() -> None:
    with pytest.raises(UnusableInput, match="http"):
        plan_teacher(Teacher(engine=HttpEngine()))


def test_planning_imports_no_torch() -> None:
    code = "import sys, teacher.plan; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
