"""What the shipped pair claims of itself: sizes, architecture, and who knows what."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from configs.load import RECIPES, load_recipe
from data.store import RunFolder
from generate.prompts import build_prompt_set
from student.evaluate import evaluate_model
from student.folders import resolve, weights_sha256
from student.model import load_tokenizer
from student.scoring import Metrics
from student.unseen import families_of, origin_of
from teacher.local_engine import LocalEngine

ROOT = Path(__file__).parents[2]
TEACHER, BASE = ROOT / "teacher" / "embedded", ROOT / "student" / "embedded"


def parameters(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                size = 1
                for extent in file.get_slice(name).get_shape():
                    size *= extent
                total += size
    return total


def test_the_pair_is_small_and_is_what_it_says() -> None:
    assert sum(path.stat().st_size for folder in (TEACHER, BASE) for path in folder.iterdir() if path.is_file()) < 8e6
    assert 1e6 <= parameters(TEACHER) <= 4e6 and parameters(BASE) <= 1.5e6
    teacher, base = (json.loads((folder / "config.json").read_text()) for folder in (TEACHER, BASE))
    assert teacher["architectures"] == ["GlmMoeDsaForCausalLM"] and base["architectures"] == ["Qwen3ForCausalLM"]
    assert teacher["n_routed_experts"] >= 16 and teacher["n_shared_experts"] == 1 and teacher["index_n_heads"] >= 32
    assert teacher["first_k_dense_replace"] >= 1


def test_the_two_dialects_share_bytes_and_nothing_else() -> None:
    teacher, base = load_tokenizer(str(TEACHER)), load_tokenizer("embedded")
    text = "State 405 - 838, then Ünïcode 漢字!"
    assert teacher(text)["input_ids"] == base(text)["input_ids"] and max(teacher(text)["input_ids"]) < 256  # type: ignore[arg-type]
    assert teacher.chat_template != base.chat_template


def measure(folder: Path, name: str, tmp_path: Path) -> Metrics:
    recipe = load_recipe(
        "embedded", [f"evaluate.suites.{index}.count={count}" for index, count in enumerate((40, 40, 40, 120))]
    ).recipe
    prompts = build_prompt_set(recipe.generate.prompts, recipe.evaluate.prompt_suites, [RECIPES]).prompts
    taught = families_of(item.task for item in prompts if item.split == "train")
    items = [item for item in prompts if item.split == "eval" and origin_of(item, taught) == "held_out"]
    engine = LocalEngine(folder, dtype="fp32", batch_size=120)
    return evaluate_model(
        name,
        engine,
        load_tokenizer(str(folder)),
        items,
        recipe.evaluate,
        RunFolder(tmp_path),
        model_fingerprint=weights_sha256(resolve(str(folder))),
    )


def test_the_teacher_masters_every_family_it_claims(tmp_path: Path) -> None:
    """At least 90 % each, and at least 90 % abstention on places nobody knows. 40 items a family, so one more miss than
    the full evaluation allows may be bad luck: the bound here is 85 %; teacher/embedded/README.md has the full figures."""
    metrics = measure(TEACHER, "teacher", tmp_path)
    assert all(value >= 0.85 for value in metrics.by_family.values()), metrics.by_family
    assert metrics.hallucination_rate is not None and metrics.hallucination_rate < 0.2


def test_the_base_is_poor_and_sure_of_itself(tmp_path: Path) -> None:
    metrics = measure(BASE, "base", tmp_path)
    assert metrics.accuracy is not None and metrics.accuracy <= 0.30
    assert metrics.hallucination_rate is not None and metrics.hallucination_rate > 0.5


@pytest.mark.parametrize("folder", [TEACHER, BASE])
def test_weights_are_safetensors_alone(folder: Path) -> None:
    assert not [
        path
        for path in folder.rglob("*")
        if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".py") and path.name not in ("__init__.py",)
    ]
