import json
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from train import tracking
from train.tracking import MetricsFile, Tracker, WandbMirror, read_metrics

BLOCK_BYTES = 32 * 1024


def test_rows_after_the_resumed_step_are_cut_and_no_step_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    first = MetricsFile(path, resume_step=0)
    for step in range(6):
        first.log(step, {"loss/nats_per_token": step / 10})
    first.close()
    with path.open("ab") as file:
        file.write(b'{"step": 6, "loss/na')  # a kill in the middle of a write
    resumed = MetricsFile(path, resume_step=4)
    resumed.log(5, {"loss/nats_per_token": 9.0})
    resumed.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert rows[-1]["loss/nats_per_token"] == 9.0 and rows[4]["loss/nats_per_token"] == 0.4


def test_a_run_that_starts_over_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsFile(path, resume_step=0).close()
    assert read_metrics(path) == []


def test_metrics_are_on_disk_when_log_returns(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "train.jsonl", resume_step=0)
    file.log(1, {"optim/lr": 0.5})
    assert (tmp_path / "train.jsonl").read_text() == '{"step": 1, "optim/lr": 0.5}\n'
    file.close()


def test_tracker_reports_after_the_row_is_written(tmp_path: Path) -> None:
    path, seen = tmp_path / "train.jsonl", []
    tracker = Tracker(MetricsFile(path, resume_step=0), None, lambda *call: seen.append((*call, len(read_metrics(path)))), 7)
    tracker.log(1, {"optim/lr": 0.5})
    tracker.close()
    assert seen == [(1, 7, {"optim/lr": 0.5}, 1)]


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of an offline .wandb file: a 7-byte header, then LevelDB log blocks of (crc32, length, type, payload)."""
    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left_in_block = BLOCK_BYTES - position % BLOCK_BYTES
        if left_in_block < 7:
            position += left_in_block
            continue
        checksum = int.from_bytes(content[position : position + 4], "little")
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        payload = content[position + 7 : position + 7 + length]
        assert zlib.crc32(payload, zlib.crc32(bytes([kind]))) == checksum
        parts += payload
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(parts)
            parts = b""
            yield record
        position += 7 + length


def offline_rows(folder: Path) -> list[dict[str, float]]:
    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                rows.append(items)
    return rows


def test_offline_mirror_is_written_continued_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tracestill", "--secret-argument"])
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(tracking, "WANDB_TIMEOUT_S", 120.0)  # a crowded machine may need longer than a training should wait
    for start in range(2):
        mirror = WandbMirror(tmp_path, mode="offline", project="test", name="tiny", config={"train.lr": 0.1})
        mirror.log(start + 1, {"loss/nats_per_token": 1.0 / (start + 1)})
        print("standard output of a run")
        mirror.close()
    deadline = time.monotonic() + 30
    while len(rows := offline_rows(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)  # W&B's finish answers before its own process has written the file: seen once, on a crowded machine
    assert [(row["train/step"], row["loss/nats_per_token"]) for row in rows] == [(1, 1.0), (2, 0.5)]
    paths = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {path.stem for path in paths} == {"run-" + (tmp_path / "wandb-run-id").read_text()}  # one curve over both fragments
    content = b"".join(path.read_bytes() for path in paths)
    for private in (b"--secret-argument", str(Path.cwd()).encode(), b"standard output of a run", b"requirements.txt"):
        assert private not in content, private


def test_mirror_that_cannot_start_never_stops_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wandb-run-id").mkdir()  # reading the id fails inside the mirror's thread
    mirror = WandbMirror(tmp_path, mode="offline", project="test", name="tiny", config={})
    mirror.log(1, {"optim/lr": 0.5})
    mirror.close()
    assert "W&B stopped" in caplog.text


def test_disabled_mirror_starts_nothing(tmp_path: Path) -> None:
    mirror = WandbMirror(tmp_path, mode="disabled", project="test", name="tiny", config={})
    mirror.log(1, {"optim/lr": 0.5})
    mirror.close()
    assert not list(tmp_path.iterdir())
