"""What the tests run in processes of their own: python -m tests.train.worker '{"do": "train" | "gradients", ...}'."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from configs.schema import Recipe
from student.lora import save_adapter
from student.model import load_tokenizer
from train import step as step_module
from train.batches import num_trained, plan_micro_batches
from train.loop import train
from train.setup import build_step, load_corpus
from train.step import joined_world


def run_training(task: dict[str, Any]) -> None:
    """Trains; prints a line a step, so that a test can kill it where it likes."""

    def report(step: int, total: int, metrics: dict[str, float]) -> None:
        print(f"step {step}/{total}", flush=True)

    train(Recipe.model_validate(task["recipe"]), dataset_dir=Path(task["dataset"]), run_dir=Path(task["run"]), report=report)


def write_gradients(task: dict[str, Any]) -> None:
    """For each ZeRO stage: whole gradients of one accumulated step, the adapter after it, all with lora_B made non-zero
    (with lora_B at zero the gradients of lora_A are zero, and half of the comparison would be empty)."""
    step_module.ZERO3_PERSISTENCE_THRESHOLD = 0  # so that even tiny parameters are partitioned
    base_recipe = Recipe.model_validate(task["recipe"])
    tokenizer = load_tokenizer(base_recipe.student.model)
    corpus = load_corpus(
        base_recipe, Path(task["dataset"]), tokenizer, Path(task["out"]), is_writer=os.environ.get("RANK", "0") == "0"
    )
    rows = corpus.train[: task["rows"]]
    for stage in task["stages"]:
        recipe = base_recipe.model_copy(update={"train": base_recipe.train.model_copy(update={"zero_stage": stage})})
        with joined_world() as world:
            step = build_step(recipe, world, corpus, None)
            raise_lora_b(step)
            plan = plan_micro_batches([len(row.ids) for row in rows], world.size, recipe.train.tokens_per_micro_batch)[world.rank]
            tokens = sum(num_trained(row) for row in rows)
            for number, group in enumerate(plan, 1):
                batch = corpus.micro_batch([rows[row] for row in group])
                step.accumulate(*batch, tokens_in_step=tokens, is_last=number == len(plan))
            gradients = {name: tensor.clone() for name, tensor in step.gradients().items()}
            norm = step.apply(lr=1e-2)
            parameters = step.export_parameters()
            if world.rank == 0:
                folder = Path(task["out"])
                save_file(gradients, folder / f"gradients-{stage}-{world.size}.safetensors")
                save_file(parameters, folder / f"parameters-{stage}-{world.size}.safetensors")
                save_adapter(folder / f"adapter-{stage}-{world.size}", step.adapted, parameters)
                print(f"stage {stage} ranks {world.size} micro-batches {len(plan)} norm {norm:.9g}", flush=True)
            step.sum_over_ranks([0.0])
            step.close()


def raise_lora_b(step: step_module.TrainingStep) -> None:
    """Sets every lora_B to seeded noise, in DeepSpeed's masters and in the compute weights."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in step.parameters.items():
        if "lora_B" not in name:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        value = torch.randn(shape, generator=generator) * 0.05
        with step_module.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
            parameter.data.copy_(value)
        if step.is_sharded:
            step_module.safe_set_full_fp32_param(parameter, value)


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    {"train": run_training, "gradients": write_gradients}[job["do"]](job)
