"""Launches of tests/distributed/worker.py or another of these workers: a task in, what every rank found out."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from data.engine import Request

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 300


class Found(NamedTuple):
    """What all ranks wrote, rank by rank."""

    ranks: list[dict[str, Any]]

    def tokens(self, job: int) -> dict[str, tuple[int, ...]]:
        """By request. Ranks of one tensor-parallel group answer the same requests, and must agree."""
        tokens: dict[str, tuple[int, ...]] = {}
        for completion in (completion for rank in self.ranks for completion in rank["jobs"][job]):
            said = tuple(completion["token_ids"])
            assert tokens.setdefault(completion["request_id"], said) == said, completion["request_id"]
        return tokens

    def scores(self) -> list[list[float]]:
        return [values for rank in self.ranks for values in rank["scores"]]


def launch(
    folder: Path, task: dict[str, Any], world: int = 2, worker: str = "tests.distributed.worker"
) -> subprocess.CompletedProcess[str]:
    """Runs the worker on `world` ranks. Hanging ranks are a failure after TIMEOUT_S, not a stuck suite."""
    task_file = folder / "task.json"
    task_file.write_text(json.dumps(task))
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_EXTENSIONS_DIR": str(folder / "ext"),
        "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={world}",
        "-m", worker, str(task_file),
    ]  # fmt: skip
    return subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def run_ranks(folder: Path, task: dict[str, Any], world: int = 2) -> Found:
    """As `launch`, of a task that ends well on every rank."""
    done = launch(folder, task, world)
    assert done.returncode == 0, done.stderr[-3000:]
    return Found([json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)])


def as_task(model: Path, jobs: Sequence[Sequence[Sequence[Request]]], **changes: Any) -> dict[str, Any]:
    """jobs: of each, the requests of every rank. changes: other entries of the task, see the worker."""
    return {
        "model": str(model), "parallel": {"expert": 2, "tensor": 1, "zero_stage": 3}, "dtype": "fp32", "batch_size": 4,
        "generate": [[[asdict(request) for request in share] for share in shares] for shares in jobs], "score": [],
        "timeout_s": 60,
    } | changes  # fmt: skip


def shares(groups: Sequence[Sequence[Request]], tensor: int) -> list[Sequence[Request]]:
    """Every rank's requests, from those of each tensor-parallel group."""
    return [group for group in groups for _ in range(tensor)]
