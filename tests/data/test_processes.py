import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.launch import StageFailed
from data.processes import map_unordered

ROOT = Path(__file__).parents[2]


def squared(number: int) -> int:
    if number == 13:
        raise UnusableInput("13: unlucky")
    if number == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_input_has_its_output_whatever_the_number_of_processes(num_workers: int) -> None:
    assert sorted(map_unordered(squared, range(10), num_workers=num_workers)) == [number * number for number in range(10)]


def test_an_error_of_a_worker_keeps_its_line() -> None:
    with pytest.raises(UnusableInput, match="13: unlucky"):
        list(map_unordered(squared, [1, 13, 2], num_workers=2))


def test_a_killed_worker_is_one_line() -> None:
    with pytest.raises(StageFailed, match="was killed, most likely for want of memory"):
        list(map_unordered(squared, [1, 99], num_workers=1))


ORPHANS = """
import os, sys, time
from data.processes import map_unordered
def slow(number):
    os.write(1, f"{os.getpid()}\\n".encode())  # a line at once: print writes its end by itself, between two workers
    time.sleep(600)
if __name__ == "__main__":
    list(map_unordered(slow, [1, 2], num_workers=2))
"""


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert parent.stdout is not None
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
