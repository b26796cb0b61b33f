"""One rank that comes up twice, from the checkpoint and from its prepared shards, and says what differs.

python -m torch.distributed.run --nproc-per-node=2 -m tests.distributed.prepared_worker TASK.json
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.launch import end_rank
from teacher.deepspeed_engine import DeepSpeedEngine, start_process_group
from teacher.parallel import Parallel
from tests.distributed.worker import to_request


class Held(NamedTuple):
    """What a rank holds of a parameter. real: how many of its numbers are no padding. group: (size, index) of this rank."""

    values: Tensor
    real: int
    shape: tuple[int, ...]
    group: tuple[int, int]
    requires_grad: bool


def _held(parameter: Any) -> Held:
    if not hasattr(parameter, "ds_tensor"):
        return Held(parameter.detach().clone(), parameter.numel(), tuple(parameter.shape), (1, 0), parameter.requires_grad)
    group, values = parameter.ds_process_group, parameter.ds_tensor.clone()
    size, index = dist.get_world_size(group), dist.get_rank(group)
    real = max(0, min(values.numel(), parameter.ds_numel - index * values.numel()))
    return Held(values, real, tuple(parameter.ds_shape), (size, index), parameter.requires_grad)


class Snapshot(NamedTuple):
    parameters: dict[str, Held]
    buffers: dict[str, Tensor]


def snapshot(module: nn.Module) -> Snapshot:
    """What the rank holds now; buffers count tokens later."""
    return Snapshot(
        {name: _held(parameter) for name, parameter in module.named_parameters()},
        {name: buffer.clone() for name, buffer in module.named_buffers()},
    )


def differences(ours: Snapshot, theirs: Snapshot) -> list[str]:
    """Names of parameters and buffers that are not the same, bit for bit, in the same place."""
    found = [*(ours.parameters.keys() ^ theirs.parameters.keys()), *(ours.buffers.keys() ^ theirs.buffers.keys())]
    for name, expected in theirs.parameters.items():
        mine = ours.parameters.get(name, expected)
        if mine[1:] != expected[1:] or not same(mine.values.flatten()[: mine.real], expected.values.flatten()[: mine.real]):
            found.append(name)
    return found + [name for name, buffer in theirs.buffers.items() if not same(ours.buffers.get(name, buffer), buffer)]


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def main(task_file: Path) -> None:
    """A task: model, shards, parallel, dtype, generate: [requests of each rank]."""
    task = json.loads(task_file.read_text())
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    start_process_group(60)
    opened: list[str] = []
    sys.addaudithook(lambda event, about: opened.append(str(about[0])) if event == "open" else None)
    engines = [
        DeepSpeedEngine(Path(folder), Parallel(**task["parallel"]), dtype=task["dtype"], batch_size=4, timeout_s=60)
        for folder in (task["shards"], task["model"])
    ]
    engines[0].load()
    from_shards = snapshot(engines[0].module)
    read = sorted({Path(path).name for path in opened if path.endswith(".safetensors")})
    completions = [asdict(done) for done in engines[0].generate([to_request(fields) for fields in task["generate"][rank]])]
    engines[1].load()
    found = {"read": read, "completions": completions, "differences": differences(from_shards, snapshot(engines[1].module))}
    task_file.with_name(f"rank{rank}.json").write_text(json.dumps(found))
    engines[0].close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_rank(0)
