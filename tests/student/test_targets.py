"""Who a model is: everything that its answers depend on, and nothing that can be opened otherwise under the same name."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from configs.errors import UnusableInput
from configs.load import load_recipe
from data.store import RunFolder
from student.folders import EMBEDDED
from student.grades import Grade, GradedItem
from student.model import load_tokenizer
from student.targets import target_spec
from teacher.runner import read_config, read_model

ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def fingerprint(tmp_path: Path, name: str, *overrides: str) -> str:
    return target_spec(load_recipe("embedded", overrides).recipe, RunFolder(tmp_path / "run"), name).fingerprint()


def test_the_type_that_a_model_is_computed_in_is_part_of_it(tmp_path: Path) -> None:
    found = {
        dtype: fingerprint(tmp_path, "mine", f"evaluate.models={{mine: {{folder: {EMBEDDED}, dtype: {dtype}}}}}")
        for dtype in ("fp32", "bf16")
    }
    assert found["fp32"] != found["bf16"] and len(found["fp32"]) == len(found["bf16"])


def test_an_adapters_scaling_is_part_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    before = fingerprint(tmp_path, str(folder))
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | {"lora_alpha": 128}))
    assert fingerprint(tmp_path, str(folder)) != before
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UnusableInput, match=r"adapter_config.json: not valid JSON"):
        fingerprint(tmp_path, str(folder))


def test_a_folder_whose_tokenizer_knows_no_words_is_refused(tmp_path: Path) -> None:
    """transformers makes an empty one of config.json and a template alone, and every prompt would be empty."""
    folder = shutil.copytree(EMBEDDED, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    assert len(AutoTokenizer.from_pretrained(folder)) <= 1
    with pytest.raises(UnusableInput, match="its tokenizer knows no words; add tokenizer.json"):
        load_tokenizer(str(folder))


def test_weights_that_are_cut_short_are_one_line(tmp_path: Path) -> None:
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UnusableInput, match=r"a damaged \*\.safetensors .*; restore it or export again"):
        read_model(folder, read_config(folder), "fp32")


@pytest.mark.parametrize("name", ["unseen", "twins", "middle", "ends", "8k"])
def test_a_family_named_like_a_slice_is_another_slice(name: str) -> None:
    for task in (name, f"facts/{name}"):
        slices = GradedItem(task, None, Grade.CORRECT, 4, 6, "stop", "one").slices
        assert name not in slices and f"task {name}" in slices
