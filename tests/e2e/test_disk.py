"""Generation on a disk that fills up, turns read-only or goes away: one clear line, nothing corrupted, and it goes on when
that is mended."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data.ledger import read_ledger
from data.store import RunFolder, read_segment, segments
from tests.e2e.commands import command, environment
from tests.teacher.mock_server import PROSE, MockServer, Reply, encoded, said, serving

pytestmark = [pytest.mark.long, pytest.mark.smoke]
REQUESTS = 120


@pytest.fixture(scope="module")
def server() -> Iterator[MockServer]:
    body = encoded(said(reasoning_content=(PROSE * 60)[:24_000], content="4"))
    with serving(lambda asked: Reply(body=body, wait_s=0.02)) as found:
        yield found


def recipe(folder: Path, server: MockServer) -> Path:
    rows = [json.dumps({"question": f"Question {number}?", "task": "t", "split": "train"}) for number in range(REQUESTS)]
    (folder / "tasks.jsonl").write_text("\n".join(rows))
    engine = {"type": "http", "base_urls": [server.url], "model": "tiny", "concurrency": 4}
    generate = {"prompts": [{"type": "jsonl", "path": "tasks.jsonl"}], "samples_per_prompt": 1, "segment_traces": 10}
    (folder / "disk.yaml").write_text(yaml.safe_dump({"name": "disk", "teacher": {"engine": engine}, "generate": generate}))
    return folder / "disk.yaml"


def start(words: tuple[str, ...], folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*words), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(words: tuple[str, ...], folder: Path) -> tuple[int, str]:
    process = start(words, folder)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def last_line(said: str) -> str:
    return next(line for line in reversed(said.splitlines()) if line.startswith("error:"))


def check_nothing_is_corrupted(run: RunFolder) -> None:
    for segment in segments(run.traces):
        read_segment(segment)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_full_disk_is_said_so_and_the_run_goes_on_with_room(tmp_path: Path, small_disk: Path, server: MockServer) -> None:
    config, run = recipe(tmp_path, server), RunFolder(small_disk / "run")
    words = (str(config), "--run-dir", str(run.root))
    assert finish(("prompts", *words), tmp_path)[0] == 0
    code, said = finish(("generate", *words), tmp_path)
    assert code == 2 and "No space left on device; make room" in last_line(said), said[-2000:]
    check_nothing_is_corrupted(run)
    before = read_ledger(run)
    assert before.pending and before.completed + before.pending == REQUESTS
    remount(small_disk, "size=64m")
    asked = len(server.asked)
    assert finish(("generate", *words), tmp_path)[0] == 0
    after = read_ledger(run)
    assert (after.completed, after.pending, after.superseded) == (REQUESTS, 0, 0)
    assert len(server.asked) - asked <= before.pending, "a committed trace was asked again"
    check_nothing_is_corrupted(run)


def wait_for_segments(run: RunFolder, count: int, process: "subprocess.Popen[str]") -> None:
    while len(list(run.traces.glob("*.json")) if run.traces.is_dir() else []) < count:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)


def test_a_folder_that_nothing_can_be_written_to_any_more_is_said_so(tmp_path: Path, server: MockServer) -> None:
    """A file system that the kernel turned read-only cannot be had on purpose while files are open; a folder that nobody may
    change (chattr +i) refuses the same calls."""
    config, run = recipe(tmp_path, server), RunFolder(tmp_path / "run")
    words = (str(config), "--run-dir", str(run.root))
    assert finish(("prompts", *words), tmp_path)[0] == 0
    process = start(("generate", *words), tmp_path)
    wait_for_segments(run, 3, process)
    if subprocess.run(["chattr", "+i", str(run.traces)], check=False, capture_output=True).returncode:
        process.kill()
        pytest.skip("this file system has no immutable folders, or this user may not make one")
    _, said = process.communicate(timeout=60)
    subprocess.run(["chattr", "-i", str(run.traces)], check=True)
    assert process.returncode == 2 and "Operation not permitted; make room or restore it" in last_line(said), said[-2000:]
    check_nothing_is_corrupted(run)
    asked = len(server.asked)
    assert finish(("generate", *words), tmp_path)[0] == 0
    assert read_ledger(run).completed == REQUESTS and len(server.asked) - asked <= REQUESTS - 30


def test_a_folder_that_vanishes_is_said_so(tmp_path: Path, server: MockServer) -> None:
    config, run = recipe(tmp_path, server), RunFolder(tmp_path / "run")
    words = (str(config), "--run-dir", str(run.root))
    assert finish(("prompts", *words), tmp_path)[0] == 0
    process = start(("generate", *words), tmp_path)
    wait_for_segments(run, 3, process)
    run.root.rename(tmp_path / "elsewhere")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "the run folder is gone" in last_line(said), said[-2000:]
    (tmp_path / "elsewhere").rename(run.root)
    check_nothing_is_corrupted(run)
    assert finish((*("generate", *words), "-s", "generate.lease_ttl_s=2"), tmp_path)[0] == 0
    ledger = read_ledger(run)
    assert (ledger.completed, ledger.pending) == (REQUESTS, 0)
