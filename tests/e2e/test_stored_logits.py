"""From a teacher's stored logits to a student's loss, by the commands: the base teaches itself, so that at the first step nothing
is left to learn, unless a position, a temperature or a token id has slipped."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from configs.schema import Recipe
from data.store import RunFolder
from tests.e2e.commands import ROOT, tracestill
from train.loop import train
from train.tracking import read_metrics

BASE = str(ROOT / "student" / "embedded")
LETTERS = {"min_words": 2, "max_words": 2}
RECIPE = {
    "name": "kl",
    "teacher": {
        "model": BASE, "engine": {"type": "local", "dtype": "fp32", "batch_size": 32}, "hardware": {"gpu": "cpu"},
    },
    "generate": {
        "prompts": [
            {"type": "reasoning_gym", "task": "letter_counting", "params": LETTERS, "count": 40, "seed": 3}
        ],
        "samples_per_prompt": 1,
        "sampling": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 128},
        "logits": {"top_k": 16, "temperatures": [1.0, 2.0]},
    },
    "data": {"view": "raw"},
    "student": {"model": BASE, "lora": {"rank": 8, "alpha": 16}},
    "train": {
        "objective": {"type": "forward_kl", "weight": 0.9, "temperature": 2.0},
        "dtype": "fp32", "max_tokens_per_row": 1024, "rows_per_step": 1, "epochs": 1, "lr": 1e-3, "wandb": "disabled",
    },
    "evaluate": {"suites": [{"type": "reasoning_gym", "task": "letter_counting", "count": 4, "seed": 9}], "gates": {}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with logits, in runs/kl."""
    folder = tmp_path_factory.mktemp("logits")
    (folder / "kl.yaml").write_text(yaml.safe_dump(RECIPE))
    for words in (("prompts",), ("generate",), ("data", "build")):
        ended = tracestill(*words, "kl.yaml", cwd=folder)
        assert ended.code == 0, ended.out + ended.err
    assert "40 of 40 on the teacher's own ids" in " ".join(ended.out.split())
    return folder


def first_loss(folder: Path, run: Path, objective: dict) -> float:
    """Of a training with another objective in a copy of the run folder, before its first update."""
    shutil.copytree(folder / "runs" / "kl", run)
    recipe = Recipe.model_validate(RECIPE | {"train": RECIPE["train"] | {"objective": objective}})
    train(recipe, dataset_dir=run / "dataset", run_dir=run)
    return losses_of(run)[0]


def losses_of(run: Path) -> list[float]:
    rows = read_metrics(run / "metrics" / "train.jsonl")
    return [row["loss/nats_per_token"] for row in rows if "loss/nats_per_token" in row]


@pytest.mark.long
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(folder: Path, tmp_path: Path) -> None:
    plain = first_loss(folder, tmp_path / "plain", {"type": "cross_entropy"})
    assert plain > 0.05
    for kind in ("forward_kl", "reverse_kl"):
        for temperature in (1.0, 2.0):
            objective = {"type": kind, "weight": 1.0, "temperature": temperature}
            # logits are stored in half precision: the divergence is of second order in their rounding
            assert abs(first_loss(folder, tmp_path / f"{kind}-{temperature}", objective)) < 1e-4 * plain, (kind, temperature)


@pytest.mark.long
def test_the_commands_distil_and_certify_it(folder: Path) -> None:
    for words in (("--certify",), ()):
        ended = tracestill("train", "kl.yaml", *words, cwd=folder)
        assert ended.code == 0, ended.out + ended.err
    run = RunFolder(folder / "runs" / "kl")
    assert json.loads((run.metrics / "certificate.json").read_text())["holds"]
    losses = losses_of(run.root)
    assert len(losses) > 3 and 0 < losses[0] < 0.05  # a tenth of the cross-entropy, and a divergence of nothing
