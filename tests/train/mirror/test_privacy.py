import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.train.mirror.canaries import ENVIRONMENT, NEEDLES, STEPS, command, furnish
from tests.train.mirror.server import serving
from tests.train.mirror.test_runs import ROOT, logged_rows, mirrored
from tests.train.test_tracking import wandb_records
from train.mirror.mirror import process_environment, without_credentials
from train.mirror.sync import sync


def found(content: bytes) -> list[str]:
    return [needle for needle in NEEDLES if needle.encode() in content.lower()]


def run_canaries(folder: Path, mode: str, environment: Mapping[str, str]) -> Path:
    project = furnish(folder)
    planted = dict(os.environ) | ENVIRONMENT | {"HOME": str(folder), "PYTHONPATH": str(ROOT)} | dict(environment)
    ended = subprocess.run(command(mode), cwd=project, env=planted, capture_output=True, timeout=400)
    assert ended.returncode == 0, ended.stderr.decode()
    assert (
        b"CANARY16" in ended.stdout and b"CANARY17" in ended.stderr and b"CANARY18" in ended.stderr and b"W&B" not in ended.stderr
    )
    return project / "run"


def contents_of(folder: Path) -> Iterator[bytes]:
    """Names and bytes of every file; the records of .wandb files as text too, where keys and values are whole."""
    for path in folder.rglob("*"):
        yield str(path.relative_to(folder)).encode()
        if path.is_file():
            yield path.read_bytes()
        if path.suffix == ".wandb" and path.is_file():
            yield from (str(record).encode() for record in wandb_records(path))


@pytest.mark.long
def test_no_secret_is_in_the_offline_folder_or_in_what_wandb_sync_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(NEEDLES) >= 30
    run = run_canaries(tmp_path, "offline", {})
    offline = b"\n".join(contents_of(run / "metrics"))
    assert found(offline) == [] and len(mirrored(run / "metrics")) == STEPS
    assert b"[key], keep it." in offline and b"[private key]" in offline, "the samples are there"
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(run.parent)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert sync(run) == 1
        sent = server.everything()
        assert found(sent) == [] and str(tmp_path).encode() not in sent
        assert b"[key], keep it." in sent and len(logged_rows(server)) == STEPS


@pytest.mark.long
def test_no_secret_is_in_what_an_online_run_sends(tmp_path: Path) -> None:
    with serving() as store:
        address = store.url.replace("http://", "http://robot:CANARY33@")
        run = run_canaries(tmp_path, "online", {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40})
        sent, kept = store.everything(), b"\n".join(contents_of(run / "metrics"))
        assert found(sent) == [] and b"CANARY33" not in sent and b"[key], keep it." in sent
        assert found(kept) == [] and b"CANARY33" not in kept and b"0" * 40 not in kept
        assert len(logged_rows(store)) == STEPS


def test_the_process_is_told_no_more_than_it_needs(tmp_path: Path) -> None:
    outside = {"HOME": "/home/a", "WANDB_API_KEY": "k", "HF_TOKEN": "t", "LANG": "C", "WANDB_BASE_URL": "https://u:p@w.example/x"}
    offline, online = (process_environment(tmp_path, mode, outside) for mode in ("offline", "online"))
    assert offline["HOME"] == str(tmp_path / "wandb-files") and offline["LANG"] == "C"
    assert not offline.keys() & {"WANDB_API_KEY", "HF_TOKEN", "WANDB_BASE_URL"}
    assert online["WANDB_API_KEY"] == "k" and online["WANDB_BASE_URL"] == "https://w.example/x" and "HF_TOKEN" not in online
    assert without_credentials("http://127.0.0.1:80") == "http://127.0.0.1:80"
