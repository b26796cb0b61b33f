"""Training and evaluation over two nodes: two launchers on this machine, which know of each other by their environment alone."""

import json
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from data.store import RunFolder
from tests.e2e.commands import command, environment
from train.checkpoint import saved_steps
from train.tracking import read_metrics

pytestmark = pytest.mark.long

NODES = {
    "train": ("-s", "train.nodes=2", "-s", "train.processes=1"),
    "evaluate": ("-s", "teacher.hardware.nodes=2", "-s", "teacher.engine.processes=1"),
}
KEYS = ("step", "loss/nats_per_token", "optim/grad_norm", "validation/nats_per_token")


def untrained(finished: RunFolder, root: Path) -> RunFolder:
    shutil.copytree(
        finished.root, root, ignore=shutil.ignore_patterns("checkpoints", "metrics", "evaluation", "export", "report")
    )
    return RunFolder(root)


def start_nodes(run: RunFolder, *words: str, stage: str = "train") -> list["subprocess.Popen[str]"]:
    """The node that does not own the stage may well come first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"TRACESTILL_NODES": "2", "TRACESTILL_RENDEZVOUS": f"127.0.0.1:{free.getsockname()[1]}"}
    return [
        subprocess.Popen(
            command(stage, "embedded", "--run-dir", str(run.root), *NODES[stage], *words, small=True), cwd=run.root,
            env=environment() | meeting | {"TRACESTILL_NODE_RANK": str(node)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for node in (1, 0)
    ]  # fmt: skip


def codes_of(launchers: list["subprocess.Popen[str]"]) -> list[int]:
    outputs = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    print(*outputs)
    return [launcher.returncode for launcher in launchers]


def test_two_nodes_train_what_two_ranks_of_one_train_and_stop_together(finished: RunFolder, tmp_path: Path) -> None:
    run = untrained(finished, tmp_path / "r")
    assert codes_of(start_nodes(run, "--certify")) == [0, 0]
    assert json.loads((run.metrics / "certificate.json").read_text())["ranks"] == 2

    launchers = start_nodes(run)
    while not (run.metrics / "train.jsonl").exists() or len(read_metrics(run.metrics / "train.jsonl")) < 4:
        assert all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.05)
    for launcher in launchers:
        launcher.send_signal(signal.SIGUSR2)
    assert codes_of(launchers) == [75, 75]
    assert saved_steps(run.checkpoints)

    assert codes_of(start_nodes(run)) == [0, 0]
    rows, expected = (read_metrics(one.metrics / "train.jsonl") for one in (run, finished))
    for row, other in zip(rows, expected, strict=True):
        assert [row.get(key) for key in KEYS] == [other.get(key) for key in KEYS]  # gloo adds two ranks up in either order


def test_two_nodes_evaluate_the_teacher_as_one_does_and_the_first_one_knows_whether_it_is_asked(
    finished: RunFolder, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "r")
    shutil.copytree(finished.root, run.root)
    shutil.rmtree(run.headroom)
    shutil.rmtree(run.evaluation)
    assert codes_of(start_nodes(run, "--headroom", stage="evaluate")) == [0, 0]
    figures, expected = (json.loads((one.headroom / "teacher.json").read_text()) for one in (run, finished))
    assert figures["metrics"]["grades"] == expected["metrics"]["grades"] and (run.logs / "evaluate.n1.log").is_file()
    assert codes_of(start_nodes(run, "--headroom", stage="evaluate")) == [0, 0]
    shutil.rmtree(run.headroom)  # killed before it was sealed: the ranks meet, and load nothing
    assert codes_of(start_nodes(run, "--headroom", stage="evaluate")) == [0, 0]
    assert json.loads((run.headroom / "teacher.json").read_text())["metrics"] == figures["metrics"]
