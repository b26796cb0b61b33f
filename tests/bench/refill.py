"""Slot refill against `transformers.generate` in static batches: output tokens per second.

    python -m tests.bench.refill --json docs/bench/refill.json

Both sides answer the same requests with the same model (the embedded teacher, float32, grouped experts), greedily, every
request to a length of its own. Lengths are log-normal around the median of their task; a request's task is known before
it is asked and its length is not, so both sides sort by the task's median, longest first. The peer pads on the left and
waits for the longest row of each batch; it is measured at 8, 16, 32 and 64 rows, and the best of them is the one that
ours, always with 64 slots, is compared with, interleaved.

`ratio`: one process. `ratio_two_ranks`: two processes that share the model (ZeRO-3, experts over both), the peer with
`synced_gpus=True` on the same sharded module. `step_ratio`: forward passes of the peer over ours, both at 64 rows: what a
machine would see whose step costs the same whatever its rows hold. `ratio_same_attention`: one process, once, against the
peer with our attention in it, so what refill alone brings on this CPU.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from data.engine import Engine, Request
from teacher.folders import EMBEDDED
from teacher.local_engine import LocalEngine
from teacher.parallel import Parallel
from teacher.runner import read_config, read_model
from tests.bench.frame import machine

SLOTS = 64
PEER_ROWS = (8, 16, 32, 64)
TASK_MEDIANS = (12, 16, 22)
SIGMA = 0.95
LONGEST = 256
REPOSITORY = Path(__file__).parents[2]


class Asked(NamedTuple):
    """expected: the median output length of its task, all that is known beforehand."""

    request: Request
    expected: int


class Run(NamedTuple):
    """passes: top-level forward passes. tokens: what was asked for, so padding and overrun count for nothing."""

    tokens: int
    seconds: float
    passes: int
    outputs: dict[str, tuple[int, ...]]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def make_requests(count: int, seed: int) -> list[Asked]:
    rng = random.Random(seed)
    asked = []
    for index in range(count):
        median = TASK_MEDIANS[index % len(TASK_MEDIANS)]
        length = min(LONGEST, max(4, round(median * math.exp(SIGMA * rng.gauss(0, 1)))))
        prompt = tuple(rng.randrange(32, 127) for _ in range(rng.randrange(8, 57)))
        asked.append(Asked(Request(f"{seed}-{index}", prompt, (), length, 0.0, 1.0, index), median))
    return sorted(asked, key=lambda one: (-one.expected, one.request.request_id))


class Counted:
    """A module's forward passes."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.passes = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.passes += 1


def ours(engine: Engine, counted: Counted, asked: Sequence[Asked]) -> Run:
    before, started = counted.passes, time.perf_counter()
    outputs = {done.request_id: done.token_ids for done in engine.generate([one.request for one in asked])}
    seconds = time.perf_counter() - started
    return Run(sum(map(len, outputs.values())), seconds, counted.passes - before, outputs)


def theirs(model: PreTrainedModel, counted: Counted, asked: Sequence[Asked], rows: int, synced: bool) -> Run:
    before, started = counted.passes, time.perf_counter()
    outputs: dict[str, tuple[int, ...]] = {}
    for start in range(0, len(asked), rows):
        batch = [one.request for one in asked[start : start + rows]]
        width = max(len(request.prompt_ids) for request in batch)
        ids_BT = torch.tensor([(0,) * (width - len(request.prompt_ids)) + request.prompt_ids for request in batch])
        mask_BT = torch.tensor([(0,) * (width - len(r.prompt_ids)) + (1,) * len(r.prompt_ids) for r in batch])
        out_BT = model.generate(  # type: ignore[operator]
            input_ids=ids_BT, attention_mask=mask_BT, do_sample=False, synced_gpus=synced, pad_token_id=0,
            max_new_tokens=max(request.max_tokens for request in batch),
        )  # fmt: skip
        for request, row in zip(batch, out_BT[:, width:].tolist(), strict=True):
            outputs[request.request_id] = tuple(row[: request.max_tokens])
    seconds = time.perf_counter() - started
    return Run(sum(map(len, outputs.values())), seconds, counted.passes - before, outputs)


def compare(
    run_ours: Callable[[], Run], run_theirs: Callable[[int], Run], repeats: int, agree_rows: Callable[[int], int] = int
) -> dict[str, Any]:
    """The sweep, then both sides in turns at the peer's best number of rows. agree_rows: ranks take rank 0's choice."""
    run_ours()  # warm: buffers, allocator
    sweep = {rows: run_theirs(rows) for rows in PEER_ROWS}
    best = agree_rows(max(sweep, key=lambda rows: sweep[rows].rate))
    pairs = [(run_ours(), run_theirs(best)) for _ in range(repeats)]
    mine, peer = pairs[0]
    same = sum(mine.outputs[name] == tokens for name, tokens in peer.outputs.items())
    return {
        "ratio": statistics.median(one.rate / other.rate for one, other in pairs),
        "ratios": [one.rate / other.rate for one, other in pairs],
        "step_ratio": sweep[SLOTS].passes / mine.passes,
        "ours": {"slots": SLOTS, "tokens_per_s": statistics.median(one.rate for one, _ in pairs), "passes": mine.passes},
        "peer": {"rows": best, "tokens_per_s": statistics.median(other.rate for _, other in pairs), "passes": peer.passes},
        "sweep": {str(rows): {"tokens_per_s": run.rate, "passes": run.passes} for rows, run in sweep.items()},
        "equal_outputs": same / len(peer.outputs),
    }


def one_process(num_requests: int, repeats: int) -> dict[str, Any]:
    asked = make_requests(num_requests, seed=1)
    engine = LocalEngine(EMBEDDED, dtype="fp32", batch_size=SLOTS)
    mine = Counted(engine.runner.model)  # type: ignore[arg-type]
    peer = plain_model()
    counted = Counted(peer)
    with torch.inference_mode():
        found = compare(lambda: ours(engine, mine, asked), lambda rows: theirs(peer, counted, asked, rows, synced=False), repeats)
        quick = read_model(EMBEDDED, read_config(EMBEDDED), "fp32").eval()
        quick.generation_config.eos_token_id = None
        counted_quick = Counted(quick)
        with_our_attention = max(theirs(quick, counted_quick, asked, rows, synced=False).rate for rows in PEER_ROWS)
    found["ratio_same_attention"] = found["ours"]["tokens_per_s"] / with_our_attention
    return found | describe(asked)


def plain_model(*_: object) -> PreTrainedModel:
    """transformers' own model and attention, endless: a request's length alone ends it."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, experts_implementation="grouped_mm").eval()
    model.generation_config.eos_token_id = None
    return model


def two_ranks_here(num_requests: int, repeats: int) -> None:
    """One of two ranks, under torchrun; rank 0 prints the figures as its last line."""
    import torch.distributed as dist

    import teacher.deepspeed_engine as sharded

    rank = int(os.environ["RANK"])
    parallel = Parallel(expert=2, tensor=1, zero_stage=3)
    engine = sharded.DeepSpeedEngine(EMBEDDED, parallel, dtype="fp32", batch_size=SLOTS)
    engine.load()
    config = sharded.read_config(EMBEDDED)
    with patch.object(sharded, "read_model", plain_model):  # the same sharding of transformers' own model
        peer = sharded.shard(EMBEDDED, config, "fp32", parallel).module
    assert isinstance(peer, PreTrainedModel)
    mine, counted = Counted(engine.module), Counted(peer)
    asked = make_requests(num_requests, seed=1 + rank)

    def together(run: Callable[[], Run]) -> Run:
        """All ranks' tokens over the time until the last is done."""
        dist.barrier()
        started = time.perf_counter()
        found = run()
        dist.barrier()
        tokens = torch.tensor([found.tokens])
        dist.all_reduce(tokens)
        return found._replace(tokens=int(tokens), seconds=time.perf_counter() - started)

    def same_on_all(rows: int) -> int:
        chosen = torch.tensor([rows])
        dist.broadcast(chosen, 0)
        return int(chosen)

    with torch.no_grad():
        found = compare(
            lambda: together(lambda: ours(engine, mine, asked)),
            lambda rows: together(lambda: theirs(peer, counted, asked, rows, synced=True)),
            repeats,
            same_on_all,
        )
    engine.close()
    if rank == 0:
        print(json.dumps(found), flush=True)


def two_ranks(num_requests: int, repeats: int) -> dict[str, Any]:
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2",
        "-m", "tests.bench.refill", "--rank", "--requests", str(num_requests), "--repeats", str(repeats),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def describe(asked: Sequence[Asked]) -> dict[str, Any]:
    lengths = sorted(one.request.max_tokens for one in asked)
    return {
        "requests_per_rank": len(asked),
        "output_tokens": {
            "median": lengths[len(lengths) // 2],
            "p99": lengths[round(0.99 * (len(lengths) - 1))],
            "longest": lengths[-1],
            "all": sum(lengths),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--requests", type=int, default=8 * SLOTS, help="a rank; at least 8 x slots for a figure to report")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rank:
        two_ranks_here(arguments.requests, arguments.repeats)
        return
    alone = one_process(arguments.requests, arguments.repeats)
    both = two_ranks(arguments.requests, arguments.repeats)
    found = {
        "benchmark": "refill", "ratio": alone["ratio"], "ratio_two_ranks": both["ratio"], "step_ratio": alone["step_ratio"],
        "step_ratio_two_ranks": both["step_ratio"], "ratio_same_attention": alone["ratio_same_attention"],
        "machine": machine(), "one_process": alone, "two_ranks": both,
    }  # fmt: skip
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
