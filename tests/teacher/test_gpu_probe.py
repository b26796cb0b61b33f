"""The copies that tell a GPU's link that is slow."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from teacher.gpu_probe import GIB, copy_rate, too_slow

ROOT = Path(__file__).parents[2]


def test_a_rate_is_what_a_copy_takes() -> None:
    """Against copies timed one by one here; within a factor of four, for two cores that others use as well."""
    source, target = (torch.zeros(32 << 20, dtype=torch.uint8) for _ in range(2))
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        rates.append((32 << 20) / (time.perf_counter() - started) / GIB)
    rate = copy_rate(torch.device("cpu"), num_bytes=32 << 20, seconds=0.2)
    assert min(rates) / 4 < rate < 4 * max(rates)


def test_the_slowest_gpu_is_named() -> None:
    assert too_slow([50.0, 49.0], 40) == ""
    assert too_slow([50.0, 12.34, 49.0], 40) == "GPU 1 takes 12.3 GiB/s from memory, expected 40 (the others 50.0 at most)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_node_without_a_gpu_is_told_from_a_slow_one() -> None:
    words = [sys.executable, "-P", "-m", "teacher.gpu_probe", "--gib-s=1"]
    done = subprocess.run(words, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "torch sees no GPU\n")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_every_gpu_here_takes_a_gib_a_second() -> None:
    assert all(copy_rate(torch.device("cuda", index)) > 1 for index in range(torch.cuda.device_count()))
