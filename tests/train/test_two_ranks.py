"""Whole trainings on two gloo ranks against one process: losses step by step, and stops."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.schema import Recipe
from student.adapter_files import ADAPTER_WEIGHTS
from tests.train.fixtures import run_worker, save_dataset, save_tiny_base, start_worker, tiny_recipe
from train.checkpoint import Checkpoint, Progress, saved_steps
from train.loop import train
from train.step import World
from train.tracking import Metrics, read_metrics

NUM_STEPS = 6
SHARED = {"processes": 2, "sequence_parallel": 2, "max_tokens_per_row": 100}
LAYOUTS: dict[str, dict[str, Any]] = {
    "stage 2": {"processes": 2, "zero_stage": 2},
    "stage 3": {"processes": 2, "zero_stage": 3},
    "shared rows, stage 2": SHARED | {"zero_stage": 2},
    "shared rows, stage 3": SHARED | {"zero_stage": 3},
    "shared rows, offloaded": SHARED | {"zero_stage": 3, "offload": "parameters", "activation_checkpointing": True},
}
pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def alone(base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Metrics]]:
    """Rows of a training in one process whose rows are grouped for one rank, and for two: so the steps hold the same traces."""
    found = {}
    for group in (1, 2):
        run = tmp_path_factory.mktemp("alone")

        def begun(checkpoint: Checkpoint | None, world: World, _: Path, group: int = group) -> Progress:
            assert checkpoint is None and world.size == 1
            return Progress(group=group)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("train.loop._begun", begun)
            train(tiny_recipe(base), dataset_dir=dataset, run_dir=run)
        found[group] = rows_of(run)
    return found


def rows_of(run: Path) -> list[Metrics]:
    return read_metrics(run / "metrics" / "train.jsonl")


def task_of(recipe: Recipe, dataset: Path, run: Path) -> dict[str, Any]:
    return {"do": "train", "recipe": recipe.model_dump(), "dataset": str(dataset), "run": str(run)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_one_process(
    layout: str, base: Path, dataset: Path, alone: dict[int, list[Metrics]], tmp_path: Path
) -> None:
    """Up to the order of float32 sums; validation included."""
    recipe = tiny_recipe(base, **LAYOUTS[layout])
    output = run_worker(task_of(recipe, dataset, tmp_path), ranks=2)
    assert output.count("rendered 37 traces") == 1, "by one rank, for both"
    found, expected = rows_of(tmp_path), alone[recipe.train.data_parallel]
    assert [row["step"] for row in found] == list(range(NUM_STEPS + 1)) == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        for key in ("loss/nats_per_token", "optim/grad_norm", "validation/nats_per_token"):
            assert (key in row) == (key in other)
            assert row.get(key, 0.0) == pytest.approx(other.get(key, 0.0), rel=1e-4), (row["step"], key)
        assert row.get("loss/supervised_tokens") == other.get("loss/supervised_tokens")


@pytest.mark.parametrize("layout", ["stage 3", "shared rows, stage 2", "shared rows, offloaded"])
def test_a_signal_stops_both_ranks_and_the_resume_is_bit_equal(layout: str, base: Path, dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(base, checkpoint_steps=100, **LAYOUTS[layout])
    run_worker(task_of(recipe, dataset, tmp_path / "whole"), ranks=2)
    process = start_worker(task_of(recipe, dataset, tmp_path / "stopped"), ranks=2)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)  # torchrun's launcher passes it to the ranks
    process.wait()
    [saved] = saved_steps(tmp_path / "stopped" / "checkpoints")
    assert 2 <= int(saved.name.removeprefix("step-")) < NUM_STEPS
    run_worker(task_of(recipe, dataset, tmp_path / "stopped"), ranks=2)
    stopped, whole = (load_file(tmp_path / name / "checkpoints" / "adapter" / ADAPTER_WEIGHTS) for name in ("stopped", "whole"))
    assert [name for name in whole if not torch.equal(stopped[name], whole[name])] == []


def test_one_process_goes_on_with_what_was_grouped_for_two(
    base: Path, dataset: Path, alone: dict[int, list[Metrics]], tmp_path: Path
) -> None:
    """The steps hold the same rows."""
    process = start_worker(task_of(tiny_recipe(base, processes=2, checkpoint_steps=1), dataset, tmp_path), ranks=2)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGTERM)
    process.wait()
    assert 1 <= train(tiny_recipe(base), dataset_dir=dataset, run_dir=tmp_path).resumed_from < NUM_STEPS
    found = rows_of(tmp_path)
    assert [row["step"] for row in found] == list(range(NUM_STEPS + 1))
    for row, other in zip(found[1:], alone[2][1:], strict=True):
        assert row["loss/nats_per_token"] == pytest.approx(other["loss/nats_per_token"], rel=1e-4)
        assert row["loss/supervised_tokens"] == other["loss/supervised_tokens"]
