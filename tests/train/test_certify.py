"""The certificate holds for what training does, and not for a fault in any of the things it vouches for."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from configs.errors import Refused
from configs.schema import Recipe
from data.checksum import parse_checked
from data.store import RunFolder
from student.model import load_tokenizer
from tests.train.fixtures import run_worker, save_dataset, save_tiny_base, tiny_recipe
from train import certify as certifying
from train.certify import CERTIFICATE_FILE, Certificate, certify, narrowed
from train.losses import SupervisedLoss
from train.setup import load_corpus
from train.step import joined_world


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "dataset")


def certified(recipe: Recipe, dataset: Path, run: Path) -> Certificate:
    with joined_world() as world:
        corpus = load_corpus(recipe, dataset, load_tokenizer(recipe.student.model), RunFolder(run))
        (run / "metrics").mkdir(exist_ok=True)
        certificate = certify(world, recipe, corpus, run)
    assert certificate is not None
    return certificate


@pytest.mark.parametrize("train", [{}, {"zero_stage": 3, "activation_checkpointing": True}])
def test_it_holds_within_its_bound_and_says_what_was_compared(
    base: Path, dataset: Path, tmp_path: Path, train: dict[str, Any]
) -> None:
    found = certified(tiny_recipe(base, **train), dataset, tmp_path)
    assert found.holds and 0.0 < found.largest_difference < 1e-5 and found.loss_difference < 1e-5
    assert found.parameters == 28  # A and B of seven linear layers in each of two blocks
    assert found.micro_steps >= 2 and found.traces == certifying.NUM_TRACES and found.supervised_tokens > 100
    path = tmp_path / "metrics" / CERTIFICATE_FILE
    stored = parse_checked(path, path.read_bytes())
    assert stored["largest_difference"] == found.largest_difference and stored["settings"]["train"]["zero_stage"] in (2, 3)


@pytest.mark.parametrize(("rslora", "rank", "alpha"), [(False, 64, 128), (True, 64, 128), (True, 256, 16), (False, 4, 8)])
def test_a_smaller_rank_keeps_the_scale_of_the_adapter(base: Path, rslora: bool, rank: int, alpha: int) -> None:
    """Otherwise the certificate of rsLoRA at rank 64 was one of an adapter three times as large, beyond the bound."""
    recipe = tiny_recipe(base, lora={"rank": rank, "alpha": alpha, "rslora": rslora})
    _, scaled = certifying.scaled_settings(recipe)
    assert scaled.rank == min(rank, certifying.MAX_RANK)
    scales = [one.alpha / (math.sqrt(one.rank) if rslora else one.rank) for one in (scaled, recipe.student.lora)]
    assert scales[0] == pytest.approx(scales[1], rel=0.15)  # alpha is a whole number


@pytest.mark.long
@pytest.mark.parametrize("layout", [{"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 3, "sequence_parallel": 2}])
def test_it_holds_on_two_ranks(base: Path, dataset: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    recipe = tiny_recipe(base, processes=2, **layout)
    run_worker({"do": "certify", "recipe": recipe.model_dump(), "dataset": str(dataset), "run": str(tmp_path)}, ranks=2)
    stored = json.loads((tmp_path / "metrics" / CERTIFICATE_FILE).read_text())
    assert stored["holds"] and stored["ranks"] == 2 and stored["largest_difference"] < 1e-5


@pytest.fixture
def leaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that do not start again: documents see each other."""
    plain = SupervisedLoss.forward

    def forward(self: SupervisedLoss, ids_1T: torch.Tensor, targets_1T: torch.Tensor, positions: torch.Tensor, *rest: Any) -> Any:
        return plain(self, ids_1T, targets_1T, torch.arange(ids_1T.shape[1])[None], *rest)

    monkeypatch.setattr(SupervisedLoss, "forward", forward)


@pytest.fixture
def twice_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.step.loss_scale", lambda ranks, tokens: 2.0 * ranks / tokens)


@pytest.mark.parametrize("fault", ["leaking", "twice_too_large"])
def test_a_fault_is_refused_and_written_down(
    base: Path, dataset: Path, tmp_path: Path, fault: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(fault)
    with pytest.raises(Refused, match="of its norm from the float64 reference"):
        certified(tiny_recipe(base), dataset, tmp_path)
    assert json.loads((tmp_path / "metrics" / CERTIFICATE_FILE).read_text())["holds"] is False


def test_a_large_student_is_narrowed_and_stays_of_its_architecture() -> None:
    config = AutoConfig.for_model(
        "qwen2", vocab_size=1000, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    )
    small = narrowed(config, 1)
    assert (small.model_type, small.vocab_size, small.num_hidden_layers) == ("qwen2", 1000, 2)
    assert small.num_attention_heads // small.num_key_value_heads == 8  # of 8 heads; 7 before
    assert len(small.layer_types) == 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    assert "RANK" not in os.environ
