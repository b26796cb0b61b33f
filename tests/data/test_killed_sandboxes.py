"""Whoever is killed while an answer's code runs, nothing of the sandbox stays: no process, no folder, no half of a build."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.schema import Data
from data.build import build
from data.verify import sandbox
from data.verify.confinement import SIGN, SandboxUnavailable
from data.verify.runner import CRASHED, RIGHT, Item, Pool
from tests.data.make_run import make_prompt, make_run, make_trace
from tests.data.test_sandbox import named, until

ROOT = Path(__file__).parents[2]
DETAILS = json.dumps({"language": "python", "kind": "stdin", "tests": [{"stdin": "3 4", "stdout": "7"}]})
SUM = make_prompt("Add.", "print(sum(map(int, input().split())))", verifier="code", details=DETAILS)
WAITS = "open('/proc/self/comm', 'w').write('{mark}')\nimport os, time\nos.fork()\nos.setsid()\ntime.sleep(600)"


@pytest.fixture(autouse=True)
def confined() -> None:
    try:
        sandbox.require()
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def sandboxes(file_bytes: int | None = None) -> set[int]:
    """Processes of bubblewrap, with this limit among their words."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_text(errors="replace")
            if SIGN in words and (file_bytes is None or f"('RLIMIT_FSIZE', {file_bytes}" in words):
                found.add(int(entry.name))
    return found


# --- a worker ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def killing_whoever_runs(mark: str, pool: Pool, times: int) -> Iterator[list[int]]:
    """The pool's worker is killed, so many times, when a program of this name is running."""
    killed: list[int] = []

    def kill() -> None:
        for _ in range(times):
            assert until(lambda: len(named(mark)) == 2, 180)
            killed.append(pool.workers[0].process.pid or 0)
            os.kill(killed[-1], signal.SIGKILL)
            assert until(lambda: named(mark) == [], 10)

    thread = threading.Thread(target=kill)
    thread.start()
    yield killed
    thread.join()


def test_a_worker_that_is_killed_while_code_runs_leaves_no_process_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    mark, before = f"tstill-k{os.getpid() % 10_000}", sandboxes()
    with Pool(timeout_s=60.0, num_workers=1) as pool:
        with killing_whoever_runs(mark, pool, 2) as killed:
            assert pool.judge([Item(SUM, WAITS.format(mark=mark)), Item(SUM, SUM.answer)]) == [CRASHED, RIGHT]
        assert len(set(killed)) == 2 and named(mark) == []
    assert until(lambda: sandboxes() <= before, 10) and list(tmp_path.iterdir()) == []


LIMITED = """
import sys, threading, time
from dataclasses import replace
from pathlib import Path
from configs.schema import Data
from data.build import build
from data.store import RunFolder
from data.verify import code
from data.verify.runner import Item, Pool
plain = code._limits
code._limits = lambda output_bytes: replace(plain(output_bytes), file_bytes=int(sys.argv[1]))
"""
"""The workers import this file too: their sandboxes are known by a limit."""

KILLING = """
if __name__ == "__main__":
    from tests.data.test_killed_sandboxes import SUM
    def kill(moment):
        while not pool.workers or pool.workers[0].idle:
            time.sleep(0.001)
        time.sleep(moment)
        pool.workers[0].process.kill()
    with Pool(timeout_s=60.0, num_workers=1) as pool:
        pool.judge([Item(SUM, SUM.answer + " # first")])
        for trial in range(30):
            killer = threading.Thread(target=kill, args=(0.01 * trial,))
            killer.start()
            pool.judge([Item(SUM, SUM.answer + f"  # {trial}")])
            killer.join()
"""


def script(folder: Path, text: str, *arguments: object) -> "subprocess.Popen[bytes]":
    (folder / "script.py").write_text(LIMITED + text)
    words = [sys.executable, str(folder / "script.py"), *map(str, arguments)]
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.long
def test_workers_that_are_killed_at_any_moment_of_a_sandbox_leave_none(tmp_path: Path) -> None:
    odd = (40 << 20) + os.getpid()
    with script(tmp_path, KILLING, odd) as judging:
        assert judging.wait(timeout=500) == 0
    assert until(lambda: sandboxes(odd) == set(), 5)


# --- the build ---------------------------------------------------------------------------------------------------

BUILDING = """
if __name__ == "__main__":
    build(Data(validation_share=0.0), RunFolder(Path(sys.argv[2])), num_workers=2)
"""


def test_a_build_that_is_killed_while_code_runs_takes_everything_with_it(tmp_path: Path) -> None:
    mark, odd = f"tstill-b{os.getpid() % 10_000}", (24 << 20) + os.getpid()
    run = make_run(tmp_path / "run", [SUM], [[make_trace(SUM, WAITS.format(mark=mark))]])
    with script(tmp_path, BUILDING, odd, run.root) as parent:
        assert until(lambda: len(named(mark)) == 2, 180) and sandboxes(odd)
        parent.kill()
    assert until(lambda: named(mark) == [] and sandboxes(odd) == set(), 10)


@pytest.mark.long
def test_a_build_that_is_killed_at_any_moment_of_a_sandbox_is_swept_up_by_the_next(tmp_path: Path) -> None:
    moments = random.Random(5)
    traces = [make_trace(SUM, f"{SUM.answer}  # {sample}", sample=sample, reasoning=str(sample)) for sample in range(12)]
    odd = (24 << 20) + 4096 + os.getpid()
    for trial in range(10):
        run = make_run(tmp_path / str(trial), [SUM], [traces])
        with script(tmp_path, BUILDING, odd, run.root) as parent:
            assert until(lambda: bool(sandboxes(odd)), 180)
            time.sleep(moments.uniform(0.0, 0.5))
            parent.kill()
        sandbox.require.cache_clear()
        assert build(Data(validation_share=0.0), run, num_workers=2).counts["kept"] == 12
        assert until(lambda: sandboxes(odd) == set(), 5), trial


# --- without one -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.require.cache_clear()
    yield
    sandbox.require.cache_clear()


def test_a_machine_without_a_sandbox_refuses_before_anything_is_judged(tmp_path: Path, no_bubblewrap: None) -> None:
    exact = make_prompt("What is 2 + 2?")
    run = make_run(tmp_path / "run", [SUM, exact], [[make_trace(exact)]])
    with pytest.raises(SandboxUnavailable, match="is not installed, and code that a model wrote") as refusal:
        build(Data(), run)
    assert refusal.value.exit_code == 2 and "\n" not in str(refusal.value)
    assert not (run.root / "work").exists() and not run.verdicts.exists()


def test_what_was_judged_elsewhere_needs_no_sandbox_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", [SUM], [[make_trace(SUM, SUM.answer)]])
    assert build(Data(validation_share=0.0), run, num_workers=1).counts["kept"] == 1
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.require.cache_clear()
    assert build(Data(validation_share=0.0, filters=()), run).counts["kept"] == 1
    sandbox.require.cache_clear()


def test_a_run_without_code_needs_no_sandbox(tmp_path: Path, no_bubblewrap: None) -> None:
    exact = make_prompt("What is 2 + 2?")
    run = make_run(tmp_path / "run", [exact], [[make_trace(exact)]])
    assert build(Data(validation_share=0.0), run).counts["kept"] == 1
