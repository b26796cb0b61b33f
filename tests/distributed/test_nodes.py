"""Several nodes: two launchers on this machine, which know of each other by their environment alone, make one run."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from data.ledger import read_ledger
from data.store import RunFolder, read_rollup, read_segment, segments
from tests.e2e.commands import command, environment, tracestill

pytestmark = pytest.mark.long

TWO_NODES = ("-s", "teacher.hardware.nodes=2", "-s", "teacher.engine.processes=1")
ONE_PROCESS = ("-s", "teacher.engine={type: local, dtype: fp32, batch_size: 16}", "-s", "teacher.layout.expert_parallel=1")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def said(run: RunFolder) -> dict[str, str]:
    """What the teacher answered, by prompt and sample."""
    rows = [row for segment in segments(run.traces) for row in read_segment(segment).to_pylist()]
    return {f"{row['prompt_id']}-{row['sample_index']}": row["raw_text"] for row in rows}


def test_two_nodes_make_the_run_that_one_process_makes(tmp_path: Path) -> None:
    """Greedy, so that nothing hangs on the seeds of another teacher's trace ids."""
    greedy = ("-s", "generate.sampling.temperature=0", "-s", "generate.samples_per_prompt=1")
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    for run, settings in ((one, (*ONE_PROCESS, *greedy)), (two, (*TWO_NODES, *greedy))):
        assert tracestill("prompts", "embedded", "--run-dir", str(run.root), *settings, cwd=tmp_path, small=True).code == 0
    alone = tracestill("generate", "embedded", "--run-dir", str(one.root), *ONE_PROCESS, *greedy, cwd=tmp_path, small=True)
    assert alone.code == 0, alone.err
    meeting = {"TRACESTILL_NODES": "2", "TRACESTILL_RENDEZVOUS": f"127.0.0.1:{free_port()}"}
    launchers = [
        subprocess.Popen(
            command("generate", "embedded", "--run-dir", str(two.root), *TWO_NODES, *greedy, small=True), cwd=tmp_path,
            env=environment() | meeting | {"TRACESTILL_NODE_RANK": str(node)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for node in (1, 0)  # the node that does not own the stage may well come first
    ]  # fmt: skip
    outputs = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert "64 traces" in outputs[1] and "traces" not in outputs[0], "the first node seals, the other does its part"
    assert read_rollup(two.traces) is not None and read_ledger(two).superseded == 0
    workers = {row["worker"].rpartition("-")[2] for segment in segments(two.traces) for row in read_segment(segment).to_pylist()}
    assert workers == {"r0", "r1"}
    assert said(two) == said(one)


def test_a_recipe_for_two_nodes_needs_to_know_where_they_meet(tmp_path: Path) -> None:
    settings = ("--run-dir", str(tmp_path / "r"), *TWO_NODES)
    ended = tracestill("generate", "embedded", *settings, cwd=tmp_path, small=True)
    assert ended.code == 2 and "TRACESTILL_RENDEZVOUS=HOST:PORT" in ended.err, ended.err
    assert not (tmp_path / "r").exists() and "TRACESTILL_RENDEZVOUS" not in os.environ
