"""How fast this node's GPUs take what a teacher's shards are: copies from pinned memory to each of them, one after the other.

    python -m teacher.gpu_probe --gib-s 20

A GPU whose link has come up with half its lanes, or in a slower generation, works, and takes an hour longer to load. slurm.health
runs this on every node of a job where the site asks for it (slurm.health.gpu_copy_gib_s); it is a program of its own because
slurm/ knows no torch.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

GIB = 1 << 30
COPY_BYTES = 256 << 20
COPY_S = 0.5


def copy_rate(device: torch.device, *, num_bytes: int = COPY_BYTES, seconds: float = COPY_S) -> float:
    """GiB/s from memory to `device`; pinned, where the device is a GPU. The first copy is not counted: it makes the context."""
    on_gpu = device.type == "cuda"
    source = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize(device)

    copy()
    copied, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < seconds:
        copy()
        copied += num_bytes
    return copied / took / GIB


def too_slow(rates: Sequence[float], wanted: float) -> str:
    """What is wrong with GPUs of these GiB/s; empty: nothing."""
    worst = min(range(len(rates)), key=rates.__getitem__)
    if rates[worst] >= wanted:
        return ""
    return f"GPU {worst} takes {rates[worst]:.1f} GiB/s from memory, expected {wanted:g} (the others {max(rates):.1f} at most)"


def main(words: Sequence[str]) -> int:
    """Prints one line. Returns 1 where a GPU is too slow, or there is none."""
    parser = argparse.ArgumentParser(prog="python -m teacher.gpu_probe", description=__doc__)
    parser.add_argument("--gib-s", type=float, required=True, help="that each GPU must take")
    wanted = parser.parse_args(words).gib_s
    if not torch.cuda.is_available():
        print("torch sees no GPU")
        return 1
    rates = [copy_rate(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    print(too_slow(rates, wanted) or f"GiB/s to each GPU: {', '.join(f'{rate:.1f}' for rate in rates)}")
    return int(bool(too_slow(rates, wanted)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
