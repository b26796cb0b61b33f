import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from configs.errors import UnusableInput
from train.tracking import MetricsFile, Tracker, read_metrics

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


@pytest.mark.parametrize("line", [b"garbage\n", b"\xff\xfe\n", b"5\n", b'{"loss": 1}\n'])
def test_a_damaged_row_is_named_with_its_file(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'{"step": 3}\n')
    with pytest.raises(UnusableInput, match=r"train\.jsonl: line 2 is no row of metrics; restore the file"):
        MetricsFile(path, resume_step=3)
    assert path.read_bytes().endswith(line + b'{"step": 3}\n')


def test_rows_that_are_missing_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 3}\n')
    MetricsFile(path, resume_step=4).close()
    assert "2 of the rows up to step 4 are missing, the first of step 2; the training itself is whole" in caplog.text


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
