"""What the tests run in processes of their own: python -m tests.train.worker '{"do": "train" | "certify", ...}'."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from configs.errors import Interrupted
from configs.launch import end_rank
from configs.schema import Recipe
from data.store import RunFolder
from student.model import load_tokenizer
from train.certify import certify
from train.loop import train
from train.setup import load_corpus
from train.step import joined_world


def run_training(task: dict[str, Any]) -> None:
    """Trains; prints a line a step, so that a test can kill it where it likes."""

    def report(step: int, total: int, metrics: dict[str, float]) -> None:
        print(f"step {step}/{total}", flush=True)

    train(Recipe.model_validate(task["recipe"]), dataset_dir=Path(task["dataset"]), run_dir=Path(task["run"]), report=report)


def run_certificate(task: dict[str, Any]) -> None:
    recipe, run = Recipe.model_validate(task["recipe"]), Path(task["run"])
    with joined_world(recipe.train.sequence_parallel) as world:
        tokenizer = load_tokenizer(recipe.student.model)
        corpus = load_corpus(recipe, Path(task["dataset"]), tokenizer, RunFolder(run), is_writer=world.rank == 0)
        (run / "metrics").mkdir(exist_ok=True)
        certify(world, recipe, corpus, run)
        torch.distributed.barrier()


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    try:
        {"train": run_training, "certify": run_certificate}[job["do"]](job)
    except Interrupted as stop:
        print(stop, flush=True)
        end_rank(stop.exit_code)
    end_rank(0)
