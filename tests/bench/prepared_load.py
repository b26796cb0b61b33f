"""Loading prepared shards against `from_pretrained` under ZeRO-3: seconds and peak memory of a rank, two CPU processes.

    python -m tests.bench.prepared_load --json results/prepared_load.json

Both sides are DeepSpeedEngine.load() of the same model in bf16 under the same layout (experts over both ranks, ZeRO-3 for the
rest); one is given the checkpoint's folder, the other the folder that `tracestill prepare` made of it, and verifies the sha256
of every byte it reads. Inside the time: joining the process group, configuration, weights, AutoEP, ZeRO. Outside: starting
Python and importing. Every load has fresh processes, because a peak is remembered for a process's life; sides alternate, files
are in the page cache for both. Memory is VmHWM, the most that was resident, libraries included; what was resident before the
load is given beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from tests.bench.frame import machine

REPOSITORY = Path(__file__).parents[2]
WORLD = 2
# 97 % of GLM-5.2's parameters are routed experts; here 96 %.
SHAPE = {
    "model_type": "glm_moe_dsa", "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 1536, "moe_intermediate_size": 512,
    "num_hidden_layers": 9, "num_attention_heads": 8, "num_key_value_heads": 8, "n_shared_experts": 1, "n_routed_experts": 64,
    "num_experts_per_tok": 8, "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16,
    "v_head_dim": 64, "first_k_dense_replace": 1, "index_n_heads": 32, "index_head_dim": 32, "index_topk": 512,
    "indexer_types": ["full"] * 9, "max_position_embeddings": 4096,
}  # fmt: skip


class Load(NamedTuple):
    """One load. seconds: of the slower rank. peak_bytes, before_bytes: of the rank with the higher peak; before: when imports
    were done."""

    seconds: float
    peak_bytes: int
    before_bytes: int


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over repeats; ratio: theirs over ours in seconds; rss_ratio: ours over theirs in peak bytes of a rank."""

    benchmark: str
    ratio: float
    rss_ratio: float
    ours_seconds: float
    theirs_seconds: float
    ours_peak_bytes: int
    theirs_peak_bytes: int
    ours_before_bytes: int
    theirs_before_bytes: int
    model_bytes: int
    prepare_seconds: float
    repeats: int
    ours: list[Load]
    theirs: list[Load]
    machine: str


def make_model(folder: Path) -> int:
    """A random model in bf16; its bytes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE, pad_token_id=None), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def launch(folder: Path, scratch: Path) -> Load:
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={WORLD}",
        "-m", "tests.bench.prepared_load", "--rank", str(folder), str(scratch),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    loads = [Load(*json.loads((scratch / f"rank{rank}.json").read_text())) for rank in range(WORLD)]
    worst = max(loads, key=lambda load: load.peak_bytes)
    return worst._replace(seconds=max(load.seconds for load in loads))


def run_rank(folder: Path, scratch: Path) -> None:
    from teacher.deepspeed_engine import DeepSpeedEngine
    from teacher.parallel import Parallel

    torch.set_num_threads(1)
    engine = DeepSpeedEngine(folder, Parallel(expert=WORLD), dtype="bf16", batch_size=4, timeout_s=300)
    before = resident("VmRSS")
    started = time.perf_counter()
    engine.load()
    seconds = time.perf_counter() - started
    (scratch / f"rank{os.environ['RANK']}.json").write_text(json.dumps(Load(seconds, resident("VmHWM"), before)))
    engine.close()


def resident(field: str) -> int:
    """Bytes; VmHWM is the highest VmRSS so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(repeats: int) -> Result:
    from teacher.checkpoint.partition import Layout
    from teacher.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="prepared_load-") as temporary:
        scratch = Path(temporary)
        model_bytes = make_model(scratch / "model")
        started = time.perf_counter()
        prepare(scratch / "model", scratch / "shards", Layout(WORLD, expert=WORLD), "bf16")
        prepare_seconds = time.perf_counter() - started
        ours: list[Load] = []
        theirs: list[Load] = []
        for repeat in range(repeats + 1):
            for folder, loads in ((scratch / "shards", ours), (scratch / "model", theirs)):
                load = launch(folder, scratch)
                if repeat > 0:  # the first round warms the page cache and compiled Python
                    loads.append(load)
    return summarise(ours, theirs, model_bytes, prepare_seconds)


def summarise(ours: list[Load], theirs: list[Load], model_bytes: int, prepare_seconds: float) -> Result:
    """Ratios of pairs that ran one after the other, then their median."""
    pairs = list(zip(ours, theirs, strict=True))
    ours_median, theirs_median = median_load(ours), median_load(theirs)
    return Result(
        benchmark="prepared_load",
        ratio=statistics.median(their.seconds / our.seconds for our, their in pairs),
        rss_ratio=statistics.median(our.peak_bytes / their.peak_bytes for our, their in pairs),
        ours_seconds=ours_median.seconds, theirs_seconds=theirs_median.seconds,
        ours_peak_bytes=ours_median.peak_bytes, theirs_peak_bytes=theirs_median.peak_bytes,
        ours_before_bytes=ours_median.before_bytes, theirs_before_bytes=theirs_median.before_bytes,
        model_bytes=model_bytes, prepare_seconds=prepare_seconds, repeats=len(pairs), ours=ours, theirs=theirs, machine=machine(),
    )  # fmt: skip


def median_load(loads: list[Load]) -> Load:
    """Field by field."""
    seconds, *sizes = (statistics.median(values) for values in zip(*loads, strict=True))
    return Load(seconds, *map(int, sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", nargs=2, type=Path, metavar=("FOLDER", "SCRATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(*arguments.rank)
        return
    result = measure(arguments.repeats)
    table = Table("", "seconds", "peak MB of a rank", "before the load")
    for name, loads in (("prepared", result.ours), ("from_pretrained", result.theirs)):
        seconds, peak, before = median_load(loads)
        table.add_row(name, f"{seconds:.2f}", f"{peak >> 20}", f"{before >> 20}")
    Console().print(table, f"ratio {result.ratio:.2f}, rss_ratio {result.rss_ratio:.2f}, model {result.model_bytes >> 20} MB")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(asdict(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
