"""What mirroring to W&B costs a training step while its server is well, dead, hanging or broken.

    python -m tests.bench.wandb_overhead --json docs/bench/wandb_overhead.json

The same loop in turns without W&B and with it online: forward, backward and optimizer of a small network in one thread, a
row fsynced a step. `share` of a server is the median over the turns of (step with / step without) - 1, each of them a
median over its steps; `thread_share` the same of the processor time of the training's own thread, where nobody else's work on
the machine shows. `disabled` is two turns without: what the machine's noise alone would give. `mirror_cpu_share`: processor
time of W&B's own processes for each second of the loop, their start included.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from tests.bench.frame import machine
from tests.train.mirror.server import HOSTILE, serving
from train.mirror.mirror import Lineage, children_of, open_mirror
from train.tracking import METRICS_FILE, MetricsFile

WIDTH, BATCH = 256, 128
STARTED_S, TIMEOUT_S = 30.0, 20.0


class Step(NamedTuple):
    """Medians over a turn, in seconds: by the clock, and of the training's thread. mirror_share: of one core, over the turn."""

    wall_s: float
    thread_s: float
    mirror_share: float = 0.0


@contextmanager
def well() -> Iterator[str]:
    with serving() as server:
        yield server.url


SERVERS: Mapping[str, Callable[[], AbstractContextManager[str]] | None] = {"disabled": None, "answers well": well, **HOSTILE}


def turn(url: str | None, num_steps: int) -> Step:
    """One turn of the loop; with a url it begins when W&B's own process runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = MetricsFile(folder / METRICS_FILE, resume_step=0)
        if url is not None:
            os.environ |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
        mirror = open_mirror(
            folder, mode="disabled" if url is None else "online", project="bench", name="bench", config={},
            lineage=Lineage("d" * 64, "b" * 64, "f" * 16, "c" * 40), resume_step=0, timeout_s=TIMEOUT_S,
        )  # fmt: skip
        deadline = time.monotonic() + STARTED_S
        while mirror is not None and not children_of(mirror.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        pids = [] if mirror is None else [mirror.pid, *children_of(mirror.pid)]
        started, used_s = time.monotonic(), sum(map(processor_s, pids))
        step = train(file, num_steps)
        step = step._replace(mirror_share=(sum(map(processor_s, pids)) - used_s) / (time.monotonic() - started))
        file.close()
        if mirror is not None:
            mirror.close(timeout_s=0.1)  # what closing costs is no step's time
        return step


def processor_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def train(file: MetricsFile, num_steps: int) -> Step:
    torch.manual_seed(0)
    network = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    optimizer = torch.optim.AdamW(network.parameters())
    inputs = torch.randn(BATCH, WIDTH)
    walls, threads = [], []
    for number in range(1, num_steps + 1):
        wall, thread = time.perf_counter(), time.thread_time()
        loss = network(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        file.log(number, {"loss/nats_per_token": loss.item()})
        walls.append(time.perf_counter() - wall)
        threads.append(time.thread_time() - thread)
    return Step(statistics.median(walls), statistics.median(threads))


def measure(num_steps: int, repeats: int) -> dict[str, object]:
    torch.set_num_threads(1)
    train_once = turn(None, num_steps)
    shares: dict[str, list[Step]] = {name: [] for name in SERVERS}
    for _ in range(repeats):
        for name, server in SERVERS.items():
            without = turn(None, num_steps)
            if server is None:
                with_it = turn(None, num_steps)
            else:
                with server() as url:
                    with_it = turn(url, num_steps)
            shares[name].append(
                Step(with_it.wall_s / without.wall_s - 1, with_it.thread_s / without.thread_s - 1, with_it.mirror_share)
            )

    def medians(part: Callable[[Step], float]) -> dict[str, float]:
        return {name: round(statistics.median(map(part, found)), 4) for name, found in shares.items()}

    return {
        "benchmark": "wandb_overhead",
        "step_ms": round(train_once.wall_s * 1000, 2),
        "share": medians(lambda share: share.wall_s),
        "thread_share": medians(lambda share: share.thread_s),
        "mirror_cpu_share": medians(lambda share: share.mirror_share),
        "steps": num_steps,
        "repeats": repeats,
        "machine": machine(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.steps, arguments.repeats)
    print(json.dumps(result, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
