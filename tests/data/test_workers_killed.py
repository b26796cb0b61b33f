"""A build with worker processes, as a user gives the command, loses workers, its parent or its disk at every stage of it. It
ends with one line and an exit code, nobody is left, and the next build leaves the bytes of an undisturbed one."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from configs.load import load_recipe
from data.build import build
from data.run_config import open_run
from data.store import RunFolder, seal, segments
from tests.data.make_run import commit_traces, make_prompt, make_trace, seal_prompts, snapshot

ROOT = Path(__file__).parents[2]
PHASES = ("judging", "spilling", "assembling")
PATIENCE_S = 400
"""On a machine with five processes a core, each start of an interpreter takes a minute."""

COMMAND = """
import os, sys, time
from pathlib import Path
from data import dataset, judging, shards

judging.INLINE_SEGMENTS, dataset.INLINE_BYTES, dataset.SPILLED_SEGMENTS, shards.SHARD_BYTES = 0, 0, 2, 20_000
marks, pause_s = Path(os.environ["MARKS"]), float(os.environ["PAUSE_S"])


def wait(phase):
    (marks / f"{phase}-{os.getpid()}").touch()
    time.sleep(pause_s)


def read_slowly(segment, plain=judging.read_segment):
    wait("judging")
    return plain(segment)


def name_slowly(folder, split, shard, task, plain=shards.spill_file):
    wait("assembling" if task == "*" else "spilling")
    return plain(folder, split, shard, task)


judging.read_segment, shards.spill_file = read_slowly, name_slowly  # the workers import this file too

if __name__ == "__main__":
    import tracestill

    tracestill.main()
"""


class Runs(NamedTuple):
    """template: generated and sealed, not built. wanted: every byte of verdicts and dataset."""

    template: Path
    recipe: Path
    wanted: dict[str, bytes]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "killed.yaml"
    recipe.write_text("name: killed\ndata: {processes: 2, filters: [finish_reason, think_tags, answer_present]}\n")
    prompts = [make_prompt(f"What is {number} + 1?", str(number + 1), task=f"sums/{number % 2}") for number in range(40)]
    run = open_run(load_recipe(str(recipe), []), folder / "template")
    seal_prompts(run, prompts, 320)
    for sample in range(8):
        commit_traces(run, [make_trace(one, one.answer, sample=sample, reasoning=f"{sample} " * 20) for one in prompts])
    files = [path for segment in segments(run.traces) for path in (segment.path, segment.path.with_suffix(".json"))]
    seal(run, run.traces, stage="generate", fingerprint="f", inputs={}, files=files, counts={}, seconds=0.0)
    whole = RunFolder(folder / "whole")
    shutil.copytree(run.root, whole.root)
    return Runs(run.root, recipe, rebuilt(whole, recipe))


def rebuilt(run: RunFolder, recipe: Path) -> dict[str, bytes]:
    """The bytes that a build in this process leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.shards.SHARD_BYTES", 20_000)
        patch.setattr("data.judging.INLINE_SEGMENTS", 1 << 30)
        build(load_recipe(str(recipe), []).recipe.data, run)
    assert not list(run.root.glob(".dataset.*")) and not list(run.root.rglob("*.tmp"))
    return {path: content for path, content in snapshot(run).items() if path != "dataset/manifest.json"}


class Building(NamedTuple):
    """A build at its work, and where its workers say what they are at."""

    process: "subprocess.Popen[str]"
    marks: Path

    def workers(self, phase: str = "") -> list[int]:
        """Processes of those that have reached it."""
        return [int(path.name.rpartition("-")[2]) for path in self.marks.iterdir() if path.name.startswith(phase)]

    def wait_for(self, phase: str) -> int:
        """A worker that is at it."""
        until = time.monotonic() + PATIENCE_S
        while not (found := self.workers(phase)) and time.monotonic() < until:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.002)
        return found[0]

    def ended(self) -> tuple[int, str]:
        """Exit code and the last line; nobody is left."""
        _, said = self.process.communicate(timeout=PATIENCE_S)
        children, until = self.workers(), time.monotonic() + 10
        while any(map(running, children)) and time.monotonic() < until:
            time.sleep(0.02)
        assert not any(map(running, children))
        return self.process.returncode, (said.strip().splitlines() or [""])[-1]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start(runs: Runs, root: Path, *, pause_s: float = 0.1) -> Building:
    if not root.exists():
        shutil.copytree(runs.template, root)
    marks = runs.template.parent / f"marks-{time.monotonic_ns()}"
    marks.mkdir()
    (marks.with_suffix(".py")).write_text(COMMAND)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MARKS": str(marks), "PAUSE_S": str(pause_s)}
    words = [sys.executable, marks.with_suffix(".py"), "data", "build", runs.recipe, "--run-dir", root]
    return Building(
        subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ),
        marks,
    )


# --- nobody is killed --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_undisturbed_build_with_workers_leaves_the_bytes_of_one_without(runs: Runs, tmp_path: Path) -> None:
    building = start(runs, tmp_path / "run", pause_s=0.0)
    assert building.ended()[0] == 0
    assert {path.name.partition("-")[0] for path in building.marks.iterdir()} == set(PHASES)
    found = snapshot(RunFolder(tmp_path / "run"))
    assert {path: content for path, content in found.items() if path != "dataset/manifest.json"} == runs.wanted


# --- a worker ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["judging", *(pytest.param(phase, marks=pytest.mark.long) for phase in PHASES[1:])])
def test_a_killed_worker_is_one_line_and_the_next_build_goes_on(runs: Runs, tmp_path: Path, phase: str) -> None:
    building = start(runs, tmp_path / "run")
    os.kill(building.wait_for(phase), signal.SIGKILL)
    code, line = building.ended()
    assert code == 1 and line.startswith("error: a worker process of the data stage was killed")
    assert not (tmp_path / "run" / "dataset" / "manifest.json").exists()
    assert rebuilt(RunFolder(tmp_path / "run"), runs.recipe) == runs.wanted


# --- the parent --------------------------------------------------------------------------------------------------


def test_a_killed_build_leaves_no_worker_and_the_next_one_goes_on(runs: Runs, tmp_path: Path) -> None:
    building = start(runs, tmp_path / "run")
    building.wait_for("judging")
    building.process.kill()
    assert building.ended()[0] == -signal.SIGKILL
    assert rebuilt(RunFolder(tmp_path / "run"), runs.recipe) == runs.wanted


@pytest.mark.long
def test_ten_kills_at_random_moments_change_no_byte(runs: Runs, tmp_path: Path) -> None:
    moments = random.Random(8)
    for trial in range(10):
        root = tmp_path / str(trial)
        building = start(runs, root, pause_s=0.02)
        time.sleep(moments.uniform(0.2, 5.0))
        building.process.kill()
        assert building.ended()[0] in (0, -signal.SIGKILL)
        if trial % 2:  # the next one is killed too
            building = start(runs, root, pause_s=0.02)
            building.wait_for("")
            time.sleep(moments.uniform(0.0, 2.0))
            building.process.kill()
            building.ended()
        assert rebuilt(RunFolder(root), runs.recipe) == runs.wanted


@pytest.mark.long
@pytest.mark.parametrize("whom", ["parent", "group"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_build_that_is_asked_to_stop_does_and_says_so(runs: Runs, tmp_path: Path, phase: str, whom: str) -> None:
    building = start(runs, tmp_path / "run")
    building.wait_for(phase)
    (os.kill if whom == "parent" else os.killpg)(building.process.pid, signal.SIGTERM)
    code, line = building.ended()
    assert code == 75 and line.startswith("error: stopped by SIGTERM; everything committed so far is kept"), line
    assert rebuilt(RunFolder(tmp_path / "run"), runs.recipe) == runs.wanted


# --- the disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            return filler


@pytest.mark.long
@pytest.mark.parametrize("phase", PHASES[1:])
def test_a_disk_that_a_worker_finds_full_is_said_so_and_the_build_goes_on_with_room(
    runs: Runs, small_disk: Path, phase: str
) -> None:
    building = start(runs, small_disk / "run", pause_s=0.5)
    building.wait_for(phase)
    filler = fill(small_disk)
    code, line = building.ended()
    assert code == 2 and line.startswith("error: ") and "No space left on device; make room" in line, line
    run = RunFolder(small_disk / "run")
    assert not run.dataset.exists() or not list(run.dataset.iterdir()), "half a dataset"
    filler.unlink()
    assert rebuilt(run, runs.recipe) == runs.wanted
