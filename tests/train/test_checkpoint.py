import json
from pathlib import Path

import pytest
import torch

from configs.errors import UnusableInput
from train.checkpoint import COUNTERS, TENSORS, Checkpoint, Progress, load_latest, remove_leftovers, save_checkpoint, saved_steps
from train.step import OptimizerState

IDENTITY = {"train.lr": 0.1, "dataset sha256": "abc"}


def checkpoint_at(step: int) -> Checkpoint:
    tensors = {"layer.lora_A": torch.full((2, 3), float(step)), "layer.lora_B": torch.randn(3, 2)}
    moments = {
        moment: {name: torch.randn_like(tensor) for name, tensor in tensors.items()} for moment in ("exp_avg", "exp_avg_sq")
    }
    return Checkpoint(Progress(step, 10 * step, 5 * step, 1.5, 1), OptimizerState(tensors, moments, step))


def test_checkpoint_comes_back_bit_equal(tmp_path: Path) -> None:
    written = checkpoint_at(3)
    save_checkpoint(tmp_path, written, IDENTITY)
    loaded = load_latest(tmp_path, IDENTITY)
    assert loaded is not None and loaded.progress == written.progress and loaded.state.steps == 3
    for group, expected in {"parameters": written.state.parameters, **written.state.moments}.items():
        found = loaded.state.parameters if group == "parameters" else loaded.state.moments[group]
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_last_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, checkpoint_at(step), IDENTITY)
    assert [path.name for path in saved_steps(tmp_path)] == ["step-00000004", "step-00000006"]
    loaded = load_latest(tmp_path, IDENTITY)
    assert loaded is not None and loaded.progress.step == 6


def test_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    for step in (2, 4):
        save_checkpoint(tmp_path, checkpoint_at(step), IDENTITY)
    tensors = tmp_path / "step-00000004" / TENSORS
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    loaded = load_latest(tmp_path, IDENTITY)
    assert loaded is not None and loaded.progress.step == 2
    (tmp_path / "step-00000002" / COUNTERS).unlink()
    with pytest.raises(UnusableInput, match="every checkpoint is damaged"):
        load_latest(tmp_path, IDENTITY)


def test_checkpoint_of_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_at(2), IDENTITY)
    with pytest.raises(UnusableInput, match=r"train.lr was 0.1, is 0.2; restore it or use another --run-dir"):
        load_latest(tmp_path, IDENTITY | {"train.lr": 0.2})


def test_checkpoint_of_another_schema_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_at(2), IDENTITY)
    counters = tmp_path / "step-00000002" / COUNTERS
    counters.write_text(json.dumps(json.loads(counters.read_text()) | {"schema": 99}))
    with pytest.raises(UnusableInput, match="schema 99, expected 1"):
        load_latest(tmp_path, IDENTITY)


def test_half_written_checkpoint_is_never_seen_and_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".step-00000002.123").mkdir(parents=True)
    assert load_latest(tmp_path, IDENTITY) is None
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
