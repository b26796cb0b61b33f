"""Is this node fit for a stage that loads a terabyte? Run by srun on every node of a job before its step; prints one JSON line.

A node that is not fit is left out of the run from then on (slurm/attempt.py). What a site wants beyond this is its own command
(slurm.health.command): a bandwidth test of its network, its vendor's diagnostics.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

GIB = 1 << 30
COMMAND_S = 120.0
COPY_BYTES = 256 << 20
COPY_S = 1.0


def main(words: Sequence[str]) -> int:
    """Prints {"node": NAME, "bad": [reason, ...]}; the exit code is 0 whatever it finds, or srun would end the others."""
    options = _options().parse_args(words)
    bad = list(filter(None, (
        _gpus(options.gpus, options.gpu_memory_gib), _memory(options.memory_gib), _scratch(options.scratch, options.scratch_gib),
        _copy(options.copy_gib_s), _gpu_copy(options.gpu_copy_gib_s), _command(options.command),
    )))  # fmt: skip
    print(json.dumps({"node": os.environ.get("SLURMD_NODENAME", socket.gethostname()), "bad": bad}), flush=True)
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m slurm.health", description=__doc__)
    parser.add_argument("--gpus", type=int, default=0, help="at least so many, seen by nvidia-smi")
    parser.add_argument("--gpu-memory-gib", type=float, help="free on each")
    parser.add_argument("--memory-gib", type=float, help="available in the node")
    parser.add_argument("--scratch", help="a folder on the node's own disk")
    parser.add_argument("--scratch-gib", type=float, help="free there")
    parser.add_argument("--copy-gib-s", type=float, help="from memory to memory, on one core")
    parser.add_argument("--gpu-copy-gib-s", type=float, help="from pinned memory to each GPU")
    parser.add_argument("--command", help="a shell line of the site's")
    return parser


def _gpus(wanted: int, free_gib: float | None) -> str:
    if not wanted:
        return ""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"], capture_output=True, text=True,
            timeout=COMMAND_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:  # a GPU that has fallen off the bus makes it hang
        return f"nvidia-smi: {error}"
    if done.returncode != 0:
        return f"nvidia-smi: {' '.join((done.stderr or done.stdout).split())}"
    free_mib = [int(line) for line in done.stdout.split() if line.isdigit()]
    if len(free_mib) < wanted:
        return f"{len(free_mib)} GPUs, expected {wanted}"
    if free_gib is not None and min(free_mib) < free_gib * 1024:
        worst = free_mib.index(min(free_mib))
        return f"GPU {worst} has {free_mib[worst] / 1024:.0f} GiB free, expected {free_gib:g}: somebody else's process?"
    return ""


def _memory(wanted_gib: float | None) -> str:
    if wanted_gib is None:
        return ""
    known = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free_gib = int(known["MemAvailable"].split()[0]) * 1024 / GIB
    return "" if free_gib >= wanted_gib else f"{free_gib:.0f} GiB of memory available, expected {wanted_gib:g}"


def _scratch(folder: str | None, wanted_gib: float | None) -> str:
    if not folder:
        return ""
    folder = os.path.expandvars(folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        free_gib = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        return f"scratch {folder}: {error.strerror}"
    if not os.access(folder, os.W_OK):
        return f"scratch {folder}: not writable"
    return (
        ""
        if wanted_gib is None or free_gib >= wanted_gib
        else f"scratch {folder}: {free_gib:.0f} GiB free, expected {wanted_gib:g}"
    )


def _copy(wanted_gib_s: float | None) -> str:
    if wanted_gib_s is None:
        return ""
    source, target = bytearray(COPY_BYTES), bytearray(COPY_BYTES)
    source[:] = os.urandom(4096) * (COPY_BYTES // 4096)
    copied, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < COPY_S:
        target[:] = source
        copied += COPY_BYTES
    rate = copied / took / GIB
    return "" if rate >= wanted_gib_s else f"copies {rate:.1f} GiB/s from memory to memory, expected {wanted_gib_s:g}"


def _gpu_copy(wanted_gib_s: float | None) -> str:
    """By a program of its own: torch takes seconds to import, and a GPU that hangs it must not hang this."""
    if wanted_gib_s is None:
        return ""
    return _said_by([sys.executable, "-P", "-m", "teacher.gpu_probe", f"--gib-s={wanted_gib_s:g}"], "copying to the GPUs")


def _command(command: str | None) -> str:
    return _said_by(["bash", "-c", command], command) if command else ""


def _said_by(words: Sequence[str], name: str) -> str:
    """The last line of a program that fails; empty when it does not."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except subprocess.TimeoutExpired:
        return f"{name}: not done within {COMMAND_S:g} s"
    if done.returncode == 0:
        return ""
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return said[-1] if said else f"{name}: exit code {done.returncode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
