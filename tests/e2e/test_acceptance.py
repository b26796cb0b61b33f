"""What the embedded run promises, at full size; and a storm of kills at moments nobody chose. `make test-all`; CI runs
the ones marked smoke."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from data.ledger import read_ledger
from data.store import RunFolder
from tests.e2e.commands import STAGES, command, environment, tracestill

MINUTES_ALLOWED = 12
NUM_KILLS = 12


@pytest.mark.long
@pytest.mark.smoke
@pytest.mark.timeout(1500)
def test_the_embedded_run_reaches_what_it_promises(tmp_path: Path) -> None:
    ended = tracestill("run", "embedded", "--json", cwd=tmp_path, timeout_s=1150)
    assert ended.code == 0, ended.out + ended.err
    found = json.loads(ended.out.splitlines()[-1])
    teacher, base, student, export = (found[name] for name in ("teacher", "base", "student", "export"))
    distilled = {family: value for family, value in teacher["by_family"].items() if family != "pieces"}
    assert len(distilled) == 4 and all(value >= 0.90 for value in distilled.values()), teacher
    assert base["accuracy"] <= 0.30 and base["hallucination_rate"] > 0.5
    assert student["accuracy"] >= 0.80 * teacher["accuracy"]
    assert student["hallucination_rate"] <= teacher["hallucination_rate"] + 0.10
    assert export["accuracy"] == pytest.approx(student["accuracy"], abs=0.01)  # a near tie may fall either way after a merge
    assert sum(found["seconds"].values()) <= MINUTES_ALLOWED * 60, found["seconds"]
    started = time.monotonic()
    again = tracestill("run", "embedded", cwd=tmp_path)
    assert again.code == 0 and again.out.count("already complete") == len(STAGES) and time.monotonic() - started <= 10
    # What the base could do and nobody distilled is lost (two-digit sums, short words), and the gate that asks says so.
    gate = "evaluate.gates.accuracy above base in unseen={min: -0.05}"
    refused = tracestill("evaluate", "embedded", "-s", gate, cwd=tmp_path)
    assert refused.code == 3 and "accuracy above base in unseen -0." in refused.err, refused.err


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_storm_of_kills_changes_nothing(finished: RunFolder, tmp_path: Path) -> None:
    """SIGKILL after a random time, again and again, until a start survives; then the ledger is the uninterrupted run's."""
    rng = random.Random(0)
    words = command("run", "embedded", "--run-dir", "r", small=True)
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(1, 40))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            assert process.returncode == 0
    ended = tracestill("run", "embedded", "--run-dir", "r", cwd=tmp_path, small=True)
    assert ended.code == 0, ended.out + ended.err
    assert read_ledger(RunFolder(tmp_path / "r")) == read_ledger(finished)
    assert tracestill("data", "verify", "r", cwd=tmp_path).code == 0
