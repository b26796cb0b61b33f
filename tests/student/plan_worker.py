"""What each of some ranks really holds of a tiny student, for test_plan_sharding.py:
torchrun ... -m tests.student.plan_worker '{"folder": ..., "threshold": ..., "cases": {...}}'."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from configs.launch import end_rank
from configs.training import CrossEntropy, Lora, Train
from student.lora import attach
from student.planning.sharding import State
from tests.student.plan_models import tiny_config
from train import engine_config
from train.attention import use_documents
from train.batches import Batch
from train.losses import SupervisedLoss
from train.step import TrainingStep, World, joined_world

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def num_bytes(tensors: Iterable[torch.Tensor], *, beside: Iterable[torch.Tensor] = ()) -> int:
    """Of their storages, each once, without those of `beside`."""
    others = {tensor.untyped_storage().data_ptr() for tensor in beside}
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(size for address, size in storages.items() if address not in others)


def open_step(world: World, train: Train, lora: Lora, family: str) -> TrainingStep:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).to(DTYPES[train.dtype])
    use_documents(model)
    return TrainingStep(SupervisedLoss(attach(model, lora, seed=0), CrossEntropy()).train(), world, train)


def row() -> Batch:
    ids = torch.arange(40)[None] % 101
    return Batch(ids, ids.roll(-1), torch.arange(40)[None])


def measured(step: TrainingStep) -> State:
    """After a whole step; gradients just before it ends."""
    step.accumulate(row(), tokens_in_step=80, is_last=False)
    step.accumulate(row(), tokens_in_step=80, is_last=True)
    gradients = sum(part.numel() * part.itemsize for part in gradients_of(step))
    step.apply(lr=1e-3)
    everything = list(step.adapted.parameters())
    trained = [parameter for parameter in everything if parameter.requires_grad]
    frozen = [parameter for parameter in everything if not parameter.requires_grad]
    moments = [state[name] for state in step.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    persistent = [parameter.data for parameter in everything if getattr(parameter, "ds_persist", False)]
    return State(
        weights=num_bytes(getattr(one, "ds_tensor", one) for one in frozen),
        adapter=num_bytes(lying(one) for one in trained),
        persistent=num_bytes(persistent),
        gradients=gradients,
        masters=num_bytes(masters_of(step), beside=[lying(one) for one in trained]),
        moments=num_bytes(moments),
    )


def lying(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Where this rank keeps a trained parameter, or its slice."""
    return getattr(parameter, "ds_tensor", parameter)


def masters_of(step: TrainingStep) -> list[torch.Tensor]:
    zero = step.engine.optimizer
    return list(getattr(zero, "fp32_partitioned_groups_flat", None) or getattr(zero, "single_partition_of_fp32_groups", []))


def gradients_of(step: TrainingStep) -> list[torch.Tensor]:
    zero = step.engine.optimizer
    if (flat := getattr(zero, "grad_partitions_flat_buffer", None)) is not None:
        return [flat]
    if (parts := getattr(zero, "averaged_gradients", None)) is not None:
        return [piece for group in parts.values() if group is not None for piece in group]
    return [parameter.grad for parameter in step.parameters.values() if parameter.grad is not None]


def run(task: dict[str, Any]) -> None:
    engine_config.ZERO3_PERSISTENCE_THRESHOLD = task["threshold"]
    for name, case in task["cases"].items():
        with joined_world() as world:
            step = open_step(world, Train.model_validate(case["train"]), Lora.model_validate(case["lora"]), case["family"])
            state = measured(step)
            (Path(task["folder"]) / f"{name}.{world.rank}.json").write_text(json.dumps(state._asdict()))
            step.sum_over_ranks([0.0])
            step.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(json.loads(sys.argv[1]))
    end_rank(0)
