import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.errors import UnusableInput
from data.checksum import checked_json, parse_checked
from train.checkpoint import (
    COUNTERS,
    TENSORS,
    Best,
    Checkpoint,
    Progress,
    best_folder,
    load_latest,
    remove_leftovers,
    remove_worse,
    save_checkpoint,
    saved_steps,
    set_aside,
)
from train.step import OptimizerState

IDENTITY = {"train.lr": 0.1, "dataset sha256": "abc"}


def checkpoint_at(step: int) -> Checkpoint:
    tensors = {"layer.lora_A": torch.full((2, 3), float(step)), "layer.lora_B": torch.randn(3, 2)}
    moments = {
        moment: {name: torch.randn_like(tensor) for name, tensor in tensors.items()} for moment in ("exp_avg", "exp_avg_sq")
    }
    progress = Progress(step, 10 * step, 5 * step, 1.5, 1, 2, 3, 1, (0.5, 0.25), Best(0.7, step - 1), 4)
    return Checkpoint(progress, OptimizerState(tensors, moments, step), {"loss/nats_per_token": 1.25})


def test_checkpoint_comes_back_bit_equal(tmp_path: Path) -> None:
    written = checkpoint_at(3)
    save_checkpoint(tmp_path, written, IDENTITY, kept=2)
    loaded = load_latest(tmp_path, IDENTITY)
    assert loaded is not None and loaded.state.steps == 3
    assert (loaded.progress, loaded.unlogged) == (written.progress, written.unlogged)
    for group, expected in {"parameters": written.state.parameters, **written.state.moments}.items():
        found = loaded.state.parameters if group == "parameters" else loaded.state.moments[group]
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_last_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, checkpoint_at(step), IDENTITY, kept=2)
    assert [path.name for path in saved_steps(tmp_path)] == ["step-00000004", "step-00000006"]
    loaded = load_latest(tmp_path, IDENTITY)
    assert loaded is not None and loaded.progress.step == 6


def test_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    for step in (2, 4):
        save_checkpoint(tmp_path, checkpoint_at(step), IDENTITY, kept=2)
    tensors = tmp_path / "step-00000004" / TENSORS
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    loaded = load_latest(tmp_path, IDENTITY)
    assert loaded is not None and loaded.progress.step == 2
    changed = tmp_path / "step-00000002" / COUNTERS
    changed.write_text(changed.read_text().replace('"step": 2', '"step": 3'))  # another place in the data, otherwise sound
    with pytest.raises(UnusableInput, match="every checkpoint is damaged"):
        load_latest(tmp_path, IDENTITY)


def test_checkpoint_of_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_at(2), IDENTITY, kept=2)
    with pytest.raises(UnusableInput, match=r"train.lr was 0.1, is 0.2; restore it or use another --run-dir"):
        load_latest(tmp_path, IDENTITY | {"train.lr": 0.2})


def test_checkpoint_of_another_schema_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_at(2), IDENTITY, kept=2)
    counters = tmp_path / "step-00000002" / COUNTERS
    counters.write_bytes(checked_json(parse_checked(counters, counters.read_bytes()) | {"schema": 99}))
    with pytest.raises(UnusableInput, match="schema 99, expected 2"):
        load_latest(tmp_path, IDENTITY)


def test_checkpoint_of_the_first_schema_is_old_and_not_damaged(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_at(2), IDENTITY, kept=2)
    (tmp_path / "step-00000002" / COUNTERS).write_text(json.dumps({"schema": 1, "progress": {"step": 2}}))
    with pytest.raises(UnusableInput, match="schema 1, expected 2; finish the training with the release that began it"):
        load_latest(tmp_path, IDENTITY)


def test_half_written_checkpoint_is_never_seen_and_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".step-00000002.123").mkdir(parents=True)
    assert load_latest(tmp_path, IDENTITY) is None
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_more_checkpoints_are_kept_when_asked(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save_checkpoint(tmp_path, checkpoint_at(step), IDENTITY, kept=3)
    assert [path.name for path in saved_steps(tmp_path)] == ["step-00000004", "step-00000006", "step-00000008"]


def test_a_best_adapter_stays_while_a_checkpoint_knows_of_it(tmp_path: Path) -> None:
    """The newest may turn out to be damaged: then the one before it is gone back to, and its best."""
    for step in (3, 5):
        best_folder(tmp_path, step).mkdir(parents=True)
    save_checkpoint(tmp_path, checkpoint_at(4), IDENTITY, kept=2)  # best: step 3; that of step 5 is of steps to be taken again
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-00000003"]
    for step in (5, 7):
        best_folder(tmp_path, step).mkdir()
        save_checkpoint(tmp_path, checkpoint_at(step + 1), IDENTITY, kept=2)
        expected = [f"best-{one:08d}" for one in (step - 2, step)]
        assert sorted(path.name for path in tmp_path.glob("best-*")) == expected
    for path in saved_steps(tmp_path):
        shutil.rmtree(path)
    remove_worse(tmp_path)
    assert not list(tmp_path.glob("best-*"))


def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    for step in (100, 110, 120):
        save_checkpoint(tmp_path, checkpoint_at(step), IDENTITY, kept=3)
    for path in saved_steps(tmp_path)[1:]:
        (path / TENSORS).write_bytes(b"damaged")
    loaded = load_latest(tmp_path, IDENTITY)
    assert loaded is not None and loaded.progress.step == 100
    set_aside(tmp_path, loaded.progress)
    assert sorted(path.name for path in tmp_path.glob("damaged-*")) == ["damaged-step-00000110", "damaged-step-00000120"]
    save_checkpoint(tmp_path, checkpoint_at(105), IDENTITY, kept=2)
    assert [path.name for path in saved_steps(tmp_path)] == ["step-00000100", "step-00000105"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_an_error_of_the_disk_and_keeps_what_is_saved(small_disk: Path) -> None:
    """safetensors says it in an exception of its own, which nobody would take for a disk that needs room."""
    folder, tensors = small_disk / "checkpoints", {"layer.lora_A": torch.ones(200, 200)}
    save_checkpoint(folder, Checkpoint(Progress(1), OptimizerState(tensors, {}, 1)), IDENTITY, kept=2)
    save_checkpoint(folder, Checkpoint(Progress(2), OptimizerState(tensors, {}, 2)), IDENTITY, kept=2)
    third = Checkpoint(Progress(3), OptimizerState(tensors, {}, 3))
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(folder, third, IDENTITY, kept=2)  # 160 kB each: two fit
    remove_leftovers(folder)
    loaded = load_latest(folder, IDENTITY)
    assert loaded is not None and loaded.progress.step == 2
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    save_checkpoint(folder, third, IDENTITY, kept=2)
    loaded = load_latest(folder, IDENTITY)
    assert loaded is not None and loaded.progress.step == 3
