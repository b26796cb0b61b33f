import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.train.mirror.server import HOSTILE, refusing, serving
from tests.train.mirror.test_runs import LINEAGE, ROOT, TIMEOUT_S, Attempt, logged_rows, mirrored, wait_for
from train.mirror.mirror import WandbMirror, children_of, open_mirror
from train.mirror.sync import sync
from train.tracking import METRICS_FILE, Tracker, read_metrics

# --- servers that are dead, slow or hostile ----------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_server_costs_the_close_its_limit_and_leaves_no_process(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with HOSTILE[kind]() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        attempt = Attempt(tmp_path, resume_step=0, mode="online", timeout_s=6.0)
        pid = attempt.mirror.pid
        wait_for(lambda: bool(children_of(pid)))
        children = children_of(pid)
        attempt.take(range(1, 4))
        started = time.monotonic()
        attempt.finish()
        assert time.monotonic() - started < 6.0 + 3.0
    assert not [child for child in (pid, *children) if is_running(child)]
    assert "W&B" in caplog.text and "metrics/train.jsonl is complete" in caplog.text
    assert len(read_metrics(tmp_path / "metrics" / METRICS_FILE)) == 3


@pytest.mark.long
def test_rows_are_kept_offline_when_no_server_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with refusing() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        attempt = Attempt(tmp_path, resume_step=0, mode="online", timeout_s=10.0)
        attempt.take(range(1, 4))
        wait_for(lambda: mirrored(tmp_path / "metrics") == [1, 2, 3])
        attempt.finish()
    assert "W&B does not answer" in caplog.text
    with serving() as store:
        monkeypatch.setenv("WANDB_BASE_URL", store.url)
        assert sync(tmp_path) == 1
        assert logged_rows(store) == read_metrics(tmp_path / "metrics" / METRICS_FILE)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


# --- the training goes on ----------------------------------------------------------------------------------------


def test_a_mirror_that_fails_says_so_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "wandb-run-id").mkdir()  # reading the id fails inside the process
    attempt = Attempt(tmp_path, resume_step=0)
    attempt.mirror._listener.join(TIMEOUT_S)
    attempt.take(range(1, 3))
    attempt.mirror.log_adapter(tmp_path)
    attempt.finish()
    attempt.mirror.close()  # a second time, for nothing
    assert "W&B stopped: IsADirectoryError" in caplog.text
    assert len(read_metrics(tmp_path / "metrics" / METRICS_FILE)) == 2


def test_a_disabled_mirror_starts_nothing(tmp_path: Path) -> None:
    mirror = open_mirror(tmp_path, mode="disabled", project="p", name="n", config={}, lineage=LINEAGE, resume_step=0)
    assert mirror is None and not list(tmp_path.iterdir())
    tracker = Tracker(None, mirror, None, 1)
    tracker.log_samples([])
    tracker.log_adapter(tmp_path)
    tracker.close()


ABANDONED = """
import sys
from pathlib import Path
from tests.train.mirror.test_runs import Attempt
attempt = Attempt(Path(sys.argv[1]), resume_step=0)
attempt.take(range(1, 4))
print(attempt.mirror.pid, flush=True)
sys.stdin.readline()
raise RuntimeError("the training failed")
"""


@contextmanager
def abandoned(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A training whose mirror runs, and which ends without closing it when it is told to."""
    process = subprocess.Popen([sys.executable, "-c", ABANDONED, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    yield process
    process.kill()
    process.wait()


@pytest.mark.long
@pytest.mark.parametrize("end", ["an exception", "SIGKILL"])
def test_no_process_outlives_the_training(end: str, tmp_path: Path) -> None:
    with abandoned(tmp_path) as training:
        assert training.stdout is not None and training.stdin is not None
        pid = int(training.stdout.readline())
        wait_for(lambda: bool(children_of(pid)) and len(mirrored(tmp_path / "metrics")) == 3)
        children = children_of(pid)
        started = time.monotonic()
        if end == "SIGKILL":
            training.kill()
        else:
            training.stdin.write("\n")
            training.stdin.flush()
        training.wait()
        wait_for(lambda: not [child for child in (pid, *children) if is_running(child)], 10.0)
        assert time.monotonic() - started < 10.0
    assert mirrored(tmp_path / "metrics") == [1, 2, 3]


@pytest.mark.long
def test_signals_that_reach_every_process_of_a_step_do_not_end_the_mirror(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, resume_step=0)
    attempt.take(range(1, 2))
    wait_for(lambda: mirrored(tmp_path / "metrics") == [1])
    for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
        attempt.mirror._process.send_signal(number)
    attempt.take(range(2, 4))
    attempt.finish()
    assert mirrored(tmp_path / "metrics") == [1, 2, 3]


def test_a_mirror_that_is_stopped_does_not_hold_up_a_step(tmp_path: Path) -> None:
    """SIGSTOP: worse than any server, the process itself does nothing."""
    attempt = Attempt(tmp_path, resume_step=0, timeout_s=1.0)
    attempt.mirror._process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    for _ in range(2000):
        attempt.mirror._say({"do": "nothing", "padding": "x" * 100})  # 250 KB: more than a pipe holds
    assert time.monotonic() - started < 1.0
    attempt.finish()
    assert time.monotonic() - started < 8.0 and isinstance(attempt.mirror, WandbMirror)


def test_the_log_of_the_parent_is_all_that_a_failure_leaves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    attempt = Attempt(tmp_path, resume_step=0, timeout_s=0.0)
    attempt.finish()
    assert "W&B did not finish in 0 s" in caplog.text
