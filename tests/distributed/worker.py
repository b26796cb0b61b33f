"""One rank of the sharded engine, for tests: does every job of a task with one engine and writes what it got.

python -m torch.distributed.run --nproc-per-node=2 -m tests.distributed.worker TASK.json
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import TracestillError
from configs.launch import end_rank, rank_error_line
from data.engine import Completion, Request
from teacher.deepspeed_engine import DeepSpeedEngine
from teacher.parallel import Parallel


def to_request(fields: dict[str, Any]) -> Request:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Request(**values)


def main(task_file: Path) -> None:
    """A task: model, parallel, dtype, batch_size, timeout_s, generate: [[requests of a rank] of a job], score: [[sequences]
    a rank], none if empty; optionally cache_bytes, and fault: {rank, after, signal}, which that rank sends itself after so
    many completions."""
    task = json.loads(task_file.read_text())
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    engine = DeepSpeedEngine(
        Path(task["model"]), Parallel(**task["parallel"]), dtype=task["dtype"], batch_size=task["batch_size"],
        timeout_s=task["timeout_s"], cache_bytes=task.get("cache_bytes"),
    )  # fmt: skip
    engine.load()
    jobs = [
        [asdict(completion) for completion in hurt(engine.generate(map(to_request, shares[rank])), rank, task.get("fault"))]
        for shares in task["generate"]
    ]
    stats = engine.expert_stats()
    scores = [scores.logprobs for scores in engine.score(task["score"][rank])] if task["score"] else []
    dtypes = sorted({str(buffer.dtype) for name, buffer in engine.module.named_buffers() if "e_score_correction_bias" in name})
    groups = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map]
    timeouts = sorted({group.options._timeout.total_seconds() for group in groups})
    limits = engine.runner.limits
    engine.close()
    found = {
        "jobs": jobs, "counts": stats.counts if stats else {}, "scores": scores, "bias_dtypes": dtypes,
        "cache_tokens": limits.cache_tokens, "group_is_left": dist.is_initialized(), "timeouts_s": timeouts,
    }  # fmt: skip
    task_file.with_name(f"rank{rank}.json").write_text(json.dumps(found))


def hurt(completions: Iterator[Completion], rank: int, fault: dict[str, Any] | None) -> Iterator[Completion]:
    for number, completion in enumerate(completions):
        if fault is not None and rank == fault["rank"] and number == fault["after"]:
            os.kill(os.getpid(), signal.Signals[fault["signal"]])
        yield completion


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
        end_rank(0)
    except TracestillError as error:
        print(rank_error_line(error), file=sys.stderr, flush=True)
        end_rank(error.exit_code)
