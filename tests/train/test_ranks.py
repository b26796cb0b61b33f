"""Gradients do not depend on ranks, ZeRO stage or accumulation. AdamW hides a constant factor, so losses cannot show this."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from student.lora import ADAPTER_WEIGHTS, attach, load_adapter, trainable
from student.model import load_base, load_tokenizer
from tests.train.fixtures import run_worker, save_dataset, save_tiny_base, tiny_recipe
from train.losses import SupervisedLoss
from train.setup import load_corpus

NUM_ROWS = 7  # over two ranks and several micro-batches: unequal counts everywhere


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gradients, parameters and adapter of one step, for each ZeRO stage, on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    base = save_tiny_base(folder / "base")
    dataset = save_dataset(folder / "dataset")
    recipe = tiny_recipe(base, tokens_per_micro_batch=100, max_tokens_per_row=100)
    task = {"do": "gradients", "recipe": recipe.model_dump(), "dataset": str(dataset), "rows": NUM_ROWS, "out": str(folder)}
    output = run_worker(task | {"stages": [0, 2, 3]}, ranks=2)
    assert "stage 3 ranks 2 micro-batches 2" in output, output
    return folder


@pytest.fixture(scope="module")
def reference(results: Path) -> dict[str, torch.Tensor]:
    """The mean loss's gradient in one process: no DeepSpeed, no accumulation, one row at a time."""
    recipe = tiny_recipe(results / "base", tokens_per_micro_batch=100, max_tokens_per_row=100)
    corpus = load_corpus(recipe, results / "dataset", load_tokenizer(str(results / "base")), results)
    model = attach(load_base(str(results / "base"), "fp32"), recipe.student.lora, seed=recipe.train.seed)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    rows = corpus.train[:NUM_ROWS]
    tokens = sum(sum(row.mask[1:]) for row in rows)
    for row in rows:
        (SupervisedLoss(model)(*corpus.micro_batch([row])) / tokens).backward()
    return {name: parameter.grad for name, parameter in trainable(model).items() if parameter.grad is not None}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_with_accumulation_have_one_process_gradients(
    results: Path, reference: dict[str, torch.Tensor], stage: int
) -> None:
    found = load_file(results / f"gradients-{stage}-2.safetensors")
    assert found.keys() == reference.keys()
    for name, expected in reference.items():
        error = (found[name] - expected).norm() / expected.norm()
        assert error < 1e-5, (name, error)  # 5e-7 measured; a wrong scale is off by 2 or more


def test_every_stage_takes_the_same_optimizer_step(results: Path) -> None:
    plain = load_file(results / "parameters-0-2.safetensors")
    for stage in (2, 3):
        for name, tensor in load_file(results / f"parameters-{stage}-2.safetensors").items():
            # a first AdamW step is lr x sign(gradient) nearly everywhere; near-zero gradients may differ
            assert (tensor - plain[name]).abs().mean() < 1e-4, (stage, name)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_adapter_file_has_whole_shapes_and_loads(results: Path, reference: dict[str, torch.Tensor], stage: int) -> None:
    stored = load_file(results / f"adapter-{stage}-2" / ADAPTER_WEIGHTS)
    shapes = {name.replace(".default.", "."): tensor.shape for name, tensor in reference.items()}
    assert {name: tensor.shape for name, tensor in stored.items()} == shapes
    load_adapter(load_base(str(results / "base"), "fp32"), results / f"adapter-{stage}-2")
