"""A signal while the main thread hears nothing: a row of a long step is under way."""

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.draining import draining
from configs.errors import Interrupted
from tests.train.fixtures import save_dataset, save_tiny_base, tiny_recipe
from tests.train.test_loop import adapter, assert_bit_equal
from train.batches import Batch
from train.checkpoint import Checkpoint, Progress, saved_steps
from train.loop import train
from train.standby import Standby, on_standby
from train.step import OptimizerState, TrainingStep
from train.tracking import read_metrics


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def deaf(seconds: float) -> None:
    """In C, without the interpreter's lock, and not to be interrupted, as a wait for a GPU is."""
    started = time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
    rounds = int(100_000 * seconds / (time.monotonic() - started))
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)


def checkpoint_at(step: int) -> Checkpoint:
    return Checkpoint(Progress(step), OptimizerState({}, {}, step))


def test_what_is_held_is_written_while_the_main_thread_is_deaf() -> None:
    written: list[tuple[int, float]] = []
    with draining(60.0) as drain, on_standby() as standby:
        standby.save_with(lambda checkpoint: written.append((checkpoint.progress.step, time.monotonic())))
        standby.hold(checkpoint_at(3))
        os.kill(os.getpid(), signal.SIGWINCH)  # nobody's wish to stop
        asked = time.monotonic()
        os.kill(os.getpid(), signal.SIGUSR2)
        deaf(1.0)
        ended = time.monotonic()
        assert drain.requested == "SIGUSR2"
    [(step, at)] = written
    assert step == 3 and at - asked < 0.5 < ended - asked
    assert standby.has_written(checkpoint_at(3)) and not standby.has_written(checkpoint_at(4))


def test_nothing_is_written_twice_and_a_full_disk_is_left_to_the_main_thread(caplog: pytest.LogCaptureFixture) -> None:
    standby, written = Standby(), list[Checkpoint]()
    standby.write()
    standby.save_with(written.append)
    held = checkpoint_at(5)
    standby.hold(held)
    standby.write()
    standby.write()
    assert written == [held]

    def full(_: Checkpoint) -> None:
        raise OSError(28, "No space left on device")

    standby.save_with(full)
    standby.hold(checkpoint_at(6))
    standby.write()
    assert "not saved at the signal: [Errno 28] No space left on device" in caplog.text
    assert not standby.has_written(checkpoint_at(6))


def test_a_long_row_does_not_keep_the_checkpoint_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while step 4 is under way, of which every micro-batch takes seconds: what is on disk at once is the state
    after step 3, and the resume ends bit-equal."""
    base, dataset = save_tiny_base(tmp_path / "base"), save_dataset(tmp_path / "data" / "dataset")
    recipe = tiny_recipe(base, checkpoint_steps=1000)
    train(recipe, dataset_dir=dataset, run_dir=tmp_path / "whole")
    monkeypatch.setattr("train.loop.HELD_ABOVE_S", 0.0)
    real, calls = TrainingStep.accumulate, list[int]()
    times: dict[str, float] = {}

    def accumulate(self: TrainingStep, batch: Batch, *, tokens_in_step: int, is_last: bool) -> float:
        calls.append(1)
        if len(calls) == 7:  # two micro-batches a step
            times["asked"] = time.time()
            os.kill(os.getpid(), signal.SIGUSR2)
            deaf(4.0)
            times["heard"] = time.time()
        return real(self, batch, tokens_in_step=tokens_in_step, is_last=is_last)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "accumulate", accumulate)
        with pytest.raises(Interrupted):
            train(recipe, dataset_dir=dataset, run_dir=tmp_path / "run")
    [saved] = saved_steps(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-00000003"
    assert times["asked"] <= (saved / "state.json").stat().st_mtime < times["heard"] - 2.0, "not written again afterwards either"
    result = train(recipe, dataset_dir=dataset, run_dir=tmp_path / "run")
    assert result.resumed_from == 3
    assert_bit_equal(adapter(tmp_path / "run"), adapter(tmp_path / "whole"))
    rows, expected = (read_metrics(tmp_path / name / "metrics" / "train.jsonl") for name in ("run", "whole"))
    for key in ("step", "loss/nats_per_token", "validation/nats_per_token"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in expected]
