"""A rank that dies or stops in the middle of decoding: the others end within the time-out, say whom they waited for and
where, and the same command goes on from what was committed."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from data.ledger import read_ledger
from data.store import RunFolder
from tests.distributed.launch import as_task, launch
from tests.e2e.commands import command, environment, tracestill
from tests.teacher.models import save_random_model
from tests.teacher.test_decode import make_requests

TIMEOUT_S = 10


def test_a_killed_rank_is_named_by_the_others_with_its_step(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", "glm")
    fault = {"rank": 0, "after": 2, "signal": "SIGKILL"}  # rank 0, because it is the one that could have been the host
    requests = make_requests(12)
    task = as_task(model, [[requests[:6], requests[6:]]], fault=fault, timeout_s=250)
    started = time.monotonic()
    ended = launch(tmp_path, task)
    assert ended.returncode != 0 and time.monotonic() - started < 200, "waited for the time-out, where gloo said it at once"
    said = re.search(r"^error\[1\]: (.*)$", ended.stderr, re.MULTILINE)
    assert said is not None, ended.stderr[-3000:]
    assert re.match(r"rank 1, step \d+ \(.+\): .+; rank 0 has been silent for \d+ s, last in step \d+ \(", said[1]), said[1]


# --- the whole command, killed from outside ----------------------------------------------------------------------


def ranks_of(run: RunFolder) -> dict[int, int]:
    """Process id of every rank that works on this run folder."""
    found: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(item.split("=", 1) for item in (process / "environ").read_text().split("\0") if "=" in item)
            words = (process / "cmdline").read_text().split("\0")
        except OSError:  # gone, or somebody else's
            continue
        if "RANK" in variables and str(run.root) in words:
            found[int(variables["RANK"])] = int(process.name)
    return found


def sidecars(run: RunFolder) -> list[Path]:
    return list(run.traces.glob("*.json")) if run.traces.is_dir() else []


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_rank_lost_in_generation_costs_nothing_committed(tmp_path: Path, number: signal.Signals) -> None:
    """SIGSTOP is a rank that hangs: no connection closes, and only its silence tells. torchrun then needs 30 s to be rid of
    the stopped process; the other ranks are gone long before."""
    run = RunFolder(tmp_path / "r")
    settings = ("--run-dir", str(run.root), "-s", f"teacher.engine.timeout_s={TIMEOUT_S}")
    assert tracestill("prompts", "embedded", *settings, cwd=tmp_path, small=True).code == 0
    process = subprocess.Popen(
        command("generate", "embedded", *settings, small=True), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while len(sidecars(run)) < 2:
        assert process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.02)
    ranks = ranks_of(run)
    os.kill(ranks[1], number)
    lost_at = time.monotonic()
    while alive(ranks[0]):
        assert time.monotonic() - lost_at < 2 * TIMEOUT_S, "the other rank waits for ever"
        time.sleep(0.1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert re.search(r"error: .*rank 0, step \d+ \(.+\): .*; rank 1 has been silent for \d+ s, last in step \d+", output), output
    committed = {path: path.read_bytes() for path in run.traces.iterdir()}
    assert read_ledger(run).completed >= 16
    ended = tracestill("generate", "embedded", *settings, cwd=tmp_path, small=True)
    assert ended.code == 0, ended.err
    assert all(path.read_bytes() == held for path, held in committed.items())
    ledger = read_ledger(run)
    assert (ledger.completed, ledger.pending, ledger.superseded) == (128, 0, 0)


def alive(pid: int) -> bool:
    """Zombies wait to be looked at; they are not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
