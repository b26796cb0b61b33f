"""Shards on a node's own disk: whole or not there, copied once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.load import load_recipe
from configs.progress import BEAT_VARIABLE
from data.store import RunFolder
from slurm import staging
from slurm.scripts import Chain, render_scripts
from slurm.staging import stage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shared" / "shards"
    (folder / "rank-0").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    for index in range(4):
        (folder / "rank-0" / f"{index}.bin").write_bytes(os.urandom(1 << 20))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_is_made_once(shards: Path, tmp_path: Path) -> None:
    target = tmp_path / "local" / "shards"
    assert stage(shards, target) == 4 * (1 << 20) + 2
    assert contents(target) == contents(shards) and stage(shards, target) == 0


def test_what_an_attempt_has_left_is_continued_and_a_cut_file_copied_again(shards: Path, tmp_path: Path) -> None:
    target = tmp_path / "local" / "shards"
    part = tmp_path / "local" / "shards.part" / "rank-0"
    part.mkdir(parents=True)
    (part / "0.bin").write_bytes((shards / "rank-0" / "0.bin").read_bytes())
    (part / "1.bin").write_bytes(b"cut")
    (part / "of other shards").write_bytes(b"old")
    assert stage(shards, target) == 3 * (1 << 20) + 2
    assert contents(target) == contents(shards) and not part.exists()


def test_a_damaged_copy_is_made_whole(shards: Path, tmp_path: Path) -> None:
    target = tmp_path / "local" / "shards"
    stage(shards, target)
    (target / "rank-0" / "2.bin").unlink()
    assert stage(shards, target) == 1 << 20 and contents(target) == contents(shards)


@pytest.mark.parametrize("is_half", [False, True])
def test_shards_that_were_prepared_anew_are_copied_anew(shards: Path, tmp_path: Path, is_half: bool) -> None:
    """They have the sizes of the old ones: the manifest tells."""
    target = tmp_path / "local" / "shards"
    stage(shards, target)
    if is_half:
        target.rename(tmp_path / "local" / "shards.part")
        (tmp_path / "local" / "shards.part" / "rank-0" / "3.bin").unlink()
    (shards / "manifest.json").write_text("[]")
    (shards / "rank-0" / "0.bin").write_bytes(os.urandom(1 << 20))
    assert stage(shards, target) == 4 * (1 << 20) + 2 and contents(target) == contents(shards)


def test_a_kill_leaves_no_half_copy_under_the_name(shards: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the second of five files."""
    target = tmp_path / "local" / "shards"
    slow = (
        "import sys, shutil, time, pathlib\nimport slurm.staging as staging\n"
        "def slowly(a, b):\n    data = pathlib.Path(a).read_bytes(); out = open(b, 'wb')\n"
        "    for i in range(0, len(data), 1 << 18): out.write(data[i:i + (1 << 18)]); out.flush(); time.sleep(0.1)\n"
        "shutil.copyfile = slowly\nstaging.main(sys.argv[1:])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, str(shards), str(target)], cwd=ROOT)
    second = tmp_path / "local" / "shards.part" / "rank-0" / "1.bin"
    deadline = time.monotonic() + 30
    while not (second.is_file() and second.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    assert 0 < stage(shards, target) < 4 * (1 << 20) + 2 and contents(target) == contents(shards)


def test_bytes_that_arrive_are_a_sign_of_life(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else is: whoever waits for another process's copy reports that one's bytes."""
    beat, part = tmp_path / "beat.json", tmp_path / "local" / "shards.part"
    monkeypatch.setenv(BEAT_VARIABLE, str(beat))
    monkeypatch.setattr(staging, "BEAT_S", 0.02)
    part.mkdir(parents=True)
    marks = []
    with staging._counted(part, 2 * 10**9):
        for size in (1, 2, 2, 2):
            (part / "0.bin").write_bytes(b"x" * size)
            time.sleep(0.2)
            marks.append(beat.stat().st_mtime_ns)
    assert marks[0] < marks[1] == marks[2] == marks[3]
    assert json.loads(beat.read_text()) | {"stage": ""} == {
        "stage": "", "done": 0, "total": 2, "unit": "GB of shards", "per_s": 0.0, "note": "",
    }  # fmt: skip


def test_what_cannot_be_staged_is_one_line(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnusableInput, match="no files there; expected the folder of tracestill prepare"):
        stage(tmp_path / "none", tmp_path / "local" / "x")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(UnusableInput, match="0 GB needed; expected a scratch with more room"):
        stage(shards, tmp_path / "local" / "x")


def test_jobs_that_load_the_teacher_stage_its_shards_first(tmp_path: Path) -> None:
    overrides = ["teacher.engine.prepared=shards", "slurm.scratch=/local/$USER", "slurm.stage_weights=true"]
    recipe = load_recipe("embedded", overrides).recipe
    chain = Chain(recipe, "embedded", overrides, RunFolder(tmp_path / "run"), recipe.slurm, tmp_path, tmp_path)
    texts = {script.stage: script.text for script in render_scripts(chain)}
    for stage_name in ("headroom", "generate", "evaluate"):
        assert f" --staging={tmp_path / 'shards'} --staged='/local/$USER/tracestill/shards-" in texts[stage_name]
        assert '-s "teacher.engine.prepared=/local/$USER/tracestill/shards-' in texts[stage_name]
    assert "--staging" not in texts["train"] and "--staging" not in texts["prepare"]
