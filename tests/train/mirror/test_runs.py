import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.train.mirror.server import WandbServer, serving
from tests.train.test_tracking import offline_rows, wandb_records
from train.mirror.fragments import cut_after, fragments_of, last_step, mend, read_fragment
from train.mirror.mirror import (
    MAX_SAMPLES,
    Lineage,
    Mode,
    Sample,
    end_with_children,
    open_mirror,
)
from train.mirror.process import Follower, artifact_name
from train.mirror.spec import run_id
from train.mirror.sync import sync
from train.tracking import METRICS_FILE, Metrics, MetricsFile, read_metrics

ROOT = Path(__file__).resolve().parents[3]
LINEAGE = Lineage("d" * 64, "b" * 64, "f" * 16, "c" * 40, dataset_files={"dataset/train/data-0.arrow": "e" * 64})
TIMEOUT_S = 120.0
"""A crowded machine may need longer than a training should wait."""


class Attempt:
    """One start of a training that logs steps to its metrics file while W&B mirrors it."""

    def __init__(self, run: Path, *, resume_step: int, mode: Mode = "offline", timeout_s: float = TIMEOUT_S) -> None:
        metrics = run / "metrics"
        self.file = MetricsFile(metrics / METRICS_FILE, resume_step=resume_step)
        mirror = open_mirror(metrics, mode=mode, project="test", name="tiny", config={"train.lr": 0.1}, lineage=LINEAGE,
                             resume_step=resume_step, timeout_s=timeout_s)  # fmt: skip
        assert mirror is not None
        self.mirror, self.number = mirror, resume_step

    def take(self, steps: range) -> None:
        for step in steps:
            self.file.log(step, {"loss/nats_per_token": 1.0 / step, "progress/restarts": self.number})

    def finish(self) -> None:
        self.file.close()
        self.mirror.close()

    def kill(self) -> None:
        """As SIGKILL of the training would: the process dies with its parent, nothing is flushed."""
        self.file.close()
        end_with_children(self.mirror._process)


def wait_for(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    """An empty fragment of an attempt that was killed is taken away by the next one, perhaps while this looks: not yet."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError(f"not within {limit_s:g} s")


def mirrored(metrics: Path) -> list[int]:
    """Train steps in the fragments, in the order in which `wandb sync` would send them."""
    return [int(row["train/step"]) for row in offline_rows(metrics)]


def logged_rows(server: WandbServer) -> list[Metrics]:
    """What the only run has on the server, without what W&B itself adds."""
    (run,) = server.runs.values()
    wanted = ("loss/nats_per_token", "progress/restarts")
    return [{"step": row["train/step"]} | {name: row[name] for name in wanted if name in row} for row in run.rows()]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serving() as store:
        monkeypatch.setenv("WANDB_BASE_URL", store.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield store


# --- one run over all attempts -----------------------------------------------------------------------------------


def test_a_killed_and_resumed_run_has_every_step_once_offline(tmp_path: Path) -> None:
    killed = Attempt(tmp_path, resume_step=0)
    killed.take(range(1, 8))
    wait_for(lambda: mirrored(tmp_path / "metrics") == [1, 2, 3, 4, 5, 6, 7])
    killed.kill()
    resumed = Attempt(tmp_path, resume_step=5)
    resumed.take(range(6, 10))
    resumed.finish()
    assert mirrored(tmp_path / "metrics") == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    rows = [(row["progress/restarts"], row["_step"]) for row in offline_rows(tmp_path / "metrics")]
    assert rows == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (5, 6), (5, 7), (5, 8), (5, 9)]
    paths = sorted((tmp_path / "metrics").glob("wandb/offline-run-*/*.wandb"))
    assert {path.stem for path in paths} == {"run-" + run_id(tmp_path / "metrics")} and len(paths) == 2


@pytest.mark.long
def test_the_server_has_every_row_of_the_metrics_file_once_after_wandb_sync(tmp_path: Path, server: WandbServer) -> None:
    """Kills before W&B has begun, while it begins and after its rows; then the real `wandb sync` of all fragments."""
    metrics, dice, step = tmp_path / "metrics", random.Random(6), 0
    for moment in ("rows", "at once", "file", "rows", "file", "rows"):
        attempt, files = Attempt(tmp_path, resume_step=step), len(fragments_of(metrics, run_id(metrics)))
        attempt.mirror.log_samples([Sample("t", "sums", "2+2", "four", "4", 9)])
        attempt.take(range(step + 1, step + dice.randint(3, 8)))
        logged = len(read_metrics(metrics / METRICS_FILE))
        if moment == "file":
            wait_for(lambda files=files: len(fragments_of(metrics, run_id(metrics))) > files)
        if moment == "rows":
            wait_for(lambda logged=logged: mirrored(metrics)[-1:] == [logged])
        attempt.kill()
        step = dice.randint(step + 1, logged)
    last = Attempt(tmp_path, resume_step=step)
    last.take(range(step + 1, step + 4))
    adapter = write_adapter(tmp_path)
    last.mirror.log_adapter(adapter)
    last.finish()
    assert 4 <= sync(tmp_path) <= 6, "three were killed after their rows, two perhaps before their first record"
    assert logged_rows(server) == read_metrics(tmp_path / "metrics" / METRICS_FILE)
    assert sync(tmp_path) == 0, "what was sent is not sent again"
    (run,) = server.runs.values()
    assert [row["_step"] for row in run.rows()] == list(range(1, step + 4))
    assert run.exit_codes[-1] == 0 and run.config["train.lr"]["value"] == 0.1
    tables = [path for path in server.uploads if "/media/table/" in path]
    assert len(tables) == 1 and json.loads(server.uploads[tables[0]])["data"] == [["t", "sums", "2+2", "four", "4", 9]]


@pytest.mark.long
def test_rows_that_were_synced_before_the_resume_are_not_sent_again(tmp_path: Path, server: WandbServer) -> None:
    killed = Attempt(tmp_path, resume_step=0)
    killed.take(range(1, 8))
    wait_for(lambda: len(mirrored(tmp_path / "metrics")) == 7)
    killed.kill()
    assert sync(tmp_path) == 1
    resumed = Attempt(tmp_path, resume_step=5)
    resumed.take(range(6, 10))
    resumed.finish()
    assert sync(tmp_path) == 1
    assert [(row["step"], row["progress/restarts"]) for row in logged_rows(server)] == [
        (1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (7, 0), (8, 5), (9, 5)
    ]  # fmt: skip


@pytest.mark.long
def test_an_online_run_that_was_killed_is_filled_up_from_the_metrics_file(tmp_path: Path, server: WandbServer) -> None:
    """wandb-core sends every 15 s: rows of the killed attempt never left the machine."""
    killed = Attempt(tmp_path, resume_step=0, mode="online")
    killed.take(range(1, 8))
    wait_for(lambda: any("UpsertBucket" in name for name in server.operations))
    killed.kill()
    resumed = Attempt(tmp_path, resume_step=5, mode="online")
    resumed.take(range(6, 10))
    resumed.finish()
    assert logged_rows(server) == read_metrics(tmp_path / "metrics" / METRICS_FILE)
    again = Attempt(tmp_path, resume_step=9, mode="online")
    again.take(range(10, 12))
    again.finish()
    assert logged_rows(server) == read_metrics(tmp_path / "metrics" / METRICS_FILE)


@pytest.mark.long
def test_offline_attempts_are_sent_by_an_online_one_and_not_by_wandb_sync_again(tmp_path: Path, server: WandbServer) -> None:
    first = Attempt(tmp_path, resume_step=0)
    first.take(range(1, 4))
    first.finish()
    second = Attempt(tmp_path, resume_step=3, mode="online")
    second.take(range(4, 6))
    second.finish()
    assert sync(tmp_path) == 0
    assert logged_rows(server) == read_metrics(tmp_path / "metrics" / METRICS_FILE)


@pytest.mark.long
def test_a_training_that_starts_over_is_another_run_once_the_first_was_sent(tmp_path: Path, server: WandbServer) -> None:
    for _ in range(2):
        attempt = Attempt(tmp_path, resume_step=0)
        attempt.take(range(1, 3))
        attempt.finish()
        assert sync(tmp_path) == 1
    assert [[row["train/step"] for row in run.rows()] for run in server.runs.values()] == [[1, 2], [1, 2]]


def test_a_fragment_is_cut_at_a_row_and_at_a_torn_end(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, resume_step=0)
    attempt.take(range(1, 400))  # more than a block of 32 KiB: some records lie in two pieces
    attempt.finish()
    ((path, is_sent),) = fragments_of(tmp_path / "metrics", run_id(tmp_path / "metrics"))
    assert not is_sent and path.stat().st_size > 2 * 32 * 1024 and last_step(path) == 399
    whole = path.read_bytes()
    assert len(list(read_fragment(path))) == len(list(wandb_records(path)))
    for step in (398, 200, 1, 0):
        cut_after(path, step)
        assert mirrored(tmp_path / "metrics") == list(range(1, step + 1))
        assert whole.startswith(path.read_bytes())
    path.write_bytes(whole[:-3] + b"\0\0\0")
    cut_after(path, 1000)
    assert last_step(path) == 399 and len(whole) - 4096 < path.stat().st_size < len(whole) - 3
    assert sum(1 for _ in wandb_records(path)) == sum(1 for _ in read_fragment(path))
    assert mend(path) and path.exists()
    for nothing in (whole[:7], whole[:12], b""):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(nothing)
        assert not mend(path) and not path.parent.exists()


# --- what is logged ----------------------------------------------------------------------------------------------


def write_adapter(run: Path) -> Path:
    adapter = run / "checkpoints" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights" * 9)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/alice/base", "r": 4}))
    (adapter / "tokenizer_config.json").write_text("{}")
    return adapter


@pytest.mark.long
def test_artifacts_name_what_they_were_made_from_and_no_row_of_the_dataset_leaves(tmp_path: Path, server: WandbServer) -> None:
    attempt = Attempt(tmp_path, resume_step=0)
    attempt.take(range(1, 3))
    attempt.mirror.log_adapter(write_adapter(tmp_path))
    attempt.finish()
    sync(tmp_path)
    artifacts = {artifact["artifactTypeName"]: artifact for artifact in server.artifacts}
    assert artifacts.keys() == {"dataset", "model"}
    made_from = json.loads(artifacts["model"]["metadata"])
    assert made_from["dataset_sha256"] == LINEAGE.dataset_sha256 and made_from["base_sha256"] == LINEAGE.base_sha256
    assert made_from["recipe_fingerprint"] == LINEAGE.recipe_fingerprint and made_from["code_revision"] == LINEAGE.code_revision
    assert json.loads(artifacts["dataset"]["metadata"]) == {
        "dataset_sha256": LINEAGE.dataset_sha256, "dataset_manifest": "dataset/manifest.json"
    }  # fmt: skip
    manifests = [json.loads(body)["contents"] for path, body in server.uploads.items() if path.endswith("wandb_manifest.json")]
    references = {name: entry["ref"] for contents in manifests for name, entry in contents.items() if "ref" in entry}
    assert references == {"dataset/train/data-0.arrow": f"sha256:{'e' * 64}"}
    uploaded = {path.rpartition("/")[2] for path in server.uploads if path.startswith("/storage/artifacts/")}
    assert uploaded == {"adapter_model.safetensors", "adapter_config.json"}
    assert server.uploads["/storage/artifacts/adapter_model.safetensors"] == b"weights" * 9
    (run,) = server.runs.values()
    assert run.config["lineage"]["value"]["dataset_manifest"] == "dataset/manifest.json"
    assert str(tmp_path).encode() not in server.everything()


def test_at_most_200_samples_are_kept_and_all_are_redacted(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, resume_step=0)
    attempt.mirror.log_samples([Sample(f"t{index}", "task", "mail a@example.org", "r", "a", index) for index in range(300)])
    attempt.take(range(1, 3))
    attempt.finish()
    (table,) = (tmp_path / "metrics").glob("wandb/offline-run-*/files/media/table/samples/*.table.json")
    content = json.loads(table.read_bytes())
    assert content["columns"] == list(Sample._fields) and len(content["data"]) == MAX_SAMPLES
    assert content["data"][7] == ["t7", "task", "mail [e-mail]", "r", "a", 7]


def test_names_of_artifacts_are_what_wandb_takes() -> None:
    assert artifact_name("glm 5.2/coding: 7b") == "glm-5.2-coding--7b"
    long = artifact_name("x" * 200)
    assert len(long) <= 100 and long != artifact_name("x" * 201)


def test_a_row_that_is_still_being_written_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    rows = Follower(path)
    assert list(rows.new()) == []
    path.write_text('{"step": 1}\n{"st')
    assert list(rows.new()) == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert list(rows.new()) == [{"step": 2}] and list(rows.new()) == []


def test_the_command_that_sends_says_what_it_wants(tmp_path: Path) -> None:
    for words, code, said in (((), 2, "usage: python -m train.mirror.sync"), ((str(tmp_path),), 2, "error: ")):
        ended = subprocess.run(
            [sys.executable, "-m", "train.mirror.sync", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert ended.returncode == code and ended.stderr.startswith(said), ended.stderr
        assert "Traceback" not in ended.stderr
