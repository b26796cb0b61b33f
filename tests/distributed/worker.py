"""One rank of the sharded engine, for tests: does every job of a task with one engine and writes what it got.

python -m torch.distributed.run --nproc-per-node=2 -m tests.distributed.worker TASK.json
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.engine import Request
from teacher.deepspeed_engine import DeepSpeedEngine, Parallel


def to_request(fields: dict[str, Any]) -> Request:
    return Request(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def main(task_file: Path) -> None:
    """A task: model, parallel, dtype, batch_size, generate: [[requests of a rank] of a job], score: [[sequences] a rank]."""
    task = json.loads(task_file.read_text())
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    engine = DeepSpeedEngine(
        Path(task["model"]), Parallel(**task["parallel"]), dtype=task["dtype"], batch_size=task["batch_size"], timeout_s=60
    )
    engine.load()
    jobs = [
        [asdict(completion) for completion in engine.generate([to_request(fields) for fields in shares[rank]])]
        for shares in task["generate"]
    ]
    stats = engine.expert_stats()
    scores = [scores.logprobs for scores in engine.score(task["score"][rank])]
    bias_dtypes = sorted(
        {str(buffer.dtype) for name, buffer in engine.module.named_buffers() if "e_score_correction_bias" in name}
    )
    engine.close()
    found = {"jobs": jobs, "counts": stats.counts if stats else {}, "scores": scores, "bias_dtypes": bias_dtypes}
    task_file.with_name(f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
