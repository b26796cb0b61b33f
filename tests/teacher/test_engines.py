"""Which engine and which folder a recipe means."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs import schema
from configs.errors import UnusableInput
from configs.load import load_recipe
from teacher.deepspeed_engine import DeepSpeedEngine
from teacher.engines import cache_budget, open_engine
from teacher.folders import EMBEDDED, fingerprint_model, fingerprint_teacher, resolve_model
from teacher.local_engine import LocalEngine
from teacher.plan import kv_budget_bytes


def test_the_recipe_names_the_engine(qwen_folder: Path) -> None:
    teacher = schema.Teacher(model=str(qwen_folder), engine=schema.LocalEngine(dtype="fp32", batch_size=3))
    local = open_engine(teacher)
    assert isinstance(local, LocalEngine) and (local.model_dir, local.dtype, local.batch_size) == (qwen_folder, "fp32", 3)
    layout = schema.Layout(expert_parallel=2, zero_stage=3)
    sharded = open_engine(schema.Teacher(model=str(qwen_folder), engine=schema.DeepSpeedEngine(dtype="fp32"), layout=layout))
    assert isinstance(sharded, DeepSpeedEngine) and sharded.parallel == (2, 1, 3)


def test_a_sharded_engine_outside_torchrun_says_so(qwen_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UnusableInput, match="not started by torchrun"):
        open_engine(schema.Teacher(model=str(qwen_folder))).load()


def test_http_and_local_engines_need_no_deepspeed() -> None:
    code = "import sys, teacher.engines, teacher.http_engine, teacher.local_engine; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_embedded_is_the_shipped_teacher() -> None:
    assert resolve_model("embedded") == EMBEDDED


def test_a_missing_folder_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="no such folder"):
        resolve_model(str(tmp_path / "nowhere"))
    with pytest.raises(UnusableInput, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnusableInput, match=r"no \*.safetensors"):
        resolve_model(str(tmp_path))


def test_a_fingerprint_follows_content_and_not_place(qwen_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(qwen_folder, tmp_path / "copy"))
    assert fingerprint_model(copy) == fingerprint_model(qwen_folder)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint_model(copy) != fingerprint_model(qwen_folder)


def test_the_layout_is_no_part_of_who_the_teacher_is(qwen_folder: Path) -> None:
    teacher = schema.Teacher(model=str(qwen_folder))
    wider = teacher.model_copy(update={"layout": schema.Layout(expert_parallel=2)})
    other = teacher.model_copy(update={"engine": schema.DeepSpeedEngine(dtype="fp32")})
    assert fingerprint_teacher(teacher) == fingerprint_teacher(wider) != fingerprint_teacher(other)


def test_the_cache_budget_is_the_plans_or_the_recipes_own() -> None:
    """What the plan leaves of an H200 beside GLM-5.2 in BF16 on 16 of them; a CPU's memory is nobody's to promise."""
    recipe = load_recipe("glm52-bf16-16xh200", []).recipe
    assert cache_budget(recipe.teacher) == kv_budget_bytes(recipe.teacher) and 20e9 < kv_budget_bytes(recipe.teacher) < 35e9  # type: ignore[operator]
    assert cache_budget(load_recipe("glm52-bf16-16xh200", ["teacher.engine.cache_bytes=5000"]).recipe.teacher) == 5000
    assert cache_budget(load_recipe("embedded", []).recipe.teacher) is None


def test_a_cache_budget_is_measured_in_tokens_of_the_model_itself(glm_folder: Path) -> None:
    """3 layers of 16 + 8 values and 2 indexers of 16, four bytes each: 416 bytes a token."""
    engine = LocalEngine(glm_folder, cache_bytes=416 * 200 + 5, batch_size=4)
    assert engine.runner.limits.cache_tokens == 200
    with pytest.raises(UnusableInput, match="a cached token takes 416 bytes"):
        LocalEngine(glm_folder, cache_bytes=416 * 127).load()
