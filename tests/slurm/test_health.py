"""Nodes that are not fit: what the check finds, and what becomes of the job that met one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(tmp_path: Path, *words: str, programs: dict[str, str] | None = None) -> list[str]:
    """What is wrong with a node called n7 on which `programs` (name -> shell script) come first."""
    for name, script in (programs or {}).items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "SLURMD_NODENAME": "n7", "PATH": f"{tmp_path}:/usr/bin:/bin", "SCRATCH": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-m", "slurm.health", *words], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["node"] == "n7"
    return found["bad"]


EIGHT = "for n in 1 2 3 4 5 6 7; do echo 143000; done; echo ${LAST:-143000}"


def test_a_node_that_is_fit_has_nothing_wrong(tmp_path: Path) -> None:
    words = ("--gpus=8", "--gpu-memory-gib=130", "--memory-gib=0.1", "--scratch=$SCRATCH/x", "--scratch-gib=0.001",
             "--copy-gib-s=0.001", "--command=true")  # fmt: skip
    assert check(tmp_path, *words, programs={"nvidia-smi": EIGHT}) == []
    assert (tmp_path / "x").is_dir()


@pytest.mark.parametrize(
    ("words", "programs", "said"),
    [
        (["--gpus=8"], {"nvidia-smi": "echo 143000; echo 143000"}, "2 GPUs, expected 8"),
        (["--gpus=8"], {"nvidia-smi": "echo 'GPU 3 is lost' >&2; exit 15"}, "nvidia-smi: GPU 3 is lost"),
        (["--gpus=8", "--gpu-memory-gib=130"], {"nvidia-smi": EIGHT.replace("${LAST:-143000}", "20480")},
         "GPU 7 has 20 GiB free, expected 130: somebody else's process?"),
        (["--memory-gib=1e9"], {}, "GiB of memory available, expected 1e+09"),
        (["--scratch=/proc/none"], {}, "scratch /proc/none: No such file or directory"),
        (["--scratch=$SCRATCH", "--scratch-gib=1e9"], {}, "GiB free, expected 1e+09"),
        (["--copy-gib-s=1e6"], {}, "GiB/s from memory to memory, expected 1e+06"),
        pytest.param(["--gpu-copy-gib-s=1"], {}, "torch sees no GPU", marks=pytest.mark.skipif(
            bool(shutil.which("nvidia-smi")), reason="there may be a GPU here")),
        (["--command=echo first; echo link 3 is down; exit 4"], {}, "link 3 is down"),
        (["--command=exit 4"], {}, "exit 4: exit code 4"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, words: list[str], programs: dict[str, str], said: str) -> None:
    [found] = check(tmp_path, *words, programs=programs)
    assert said in found


def test_a_node_without_nvidia_smi_has_no_gpus(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("there is one here")
    [found] = check(tmp_path, "--gpus=1")
    assert found.startswith("nvidia-smi: ") and "No such file" in found
