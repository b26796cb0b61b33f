"""The whole product, small: every stage, then nothing to do, then killed everywhere and none the worse."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml

from data.ledger import read_ledger
from data.store import RunFolder
from student.provenance import unresolved
from student.results import read_results
from tests.e2e.commands import STAGES, command, environment, kill_when, tracestill

KEYS = {"accuracy", "by_family", "hallucination_rate", "abstention_rate", "omniscience_index", "reasoning_tokens_per_correct"}
LEDGER_KEYS = {"requested", "completed", "failed", "pending", "kept", "rejected", "unjudged"}


def summary(run: RunFolder) -> dict:
    ended = tracestill("report", str(run.root), "--json", cwd=run.root)
    assert ended.code == 0, ended.err
    return json.loads(ended.out.splitlines()[-1])


def test_the_report_says_everything_a_reader_is_owed(finished: RunFolder) -> None:
    found = summary(finished)
    for model in ("teacher", "base", "student", "export"):
        assert set(found[model]) >= KEYS, model
    assert set(found["ledger"]) >= LEDGER_KEYS and set(found["seconds"]) >= set(STAGES) - {"report"}
    ledger = found["ledger"]
    assert ledger["requested"] == 128 == ledger["completed"] + ledger["failed"] + ledger["pending"] and ledger["pending"] == 0
    assert ledger["completed"] == ledger["kept"] + ledger["rejected"] + ledger["unjudged"]
    assert ledger["rejected"] == sum(ledger["rejected_by_reason"].values())
    page = (finished.report / "index.html").read_text()
    assert 'src="http' not in page and 'href="http' not in page


def test_the_teacher_is_far_better_than_the_base(finished: RunFolder) -> None:
    found = summary(finished)
    assert found["teacher"]["accuracy"] >= 0.8 and found["base"]["accuracy"] <= 0.4
    assert found["base"]["hallucination_rate"] > 0.5 > found["teacher"]["hallucination_rate"]
    assert found["export"]["accuracy"] == found["student"]["accuracy"]  # float32, and the same items


def test_a_second_run_does_nothing_and_says_so(finished: RunFolder) -> None:
    started = time.monotonic()
    ended = tracestill("run", "embedded", "--run-dir", str(finished.root), cwd=finished.root, small=True)
    assert ended.code == 0 and ended.out.count("already complete") == len(STAGES), ended.out + ended.err
    assert time.monotonic() - started <= 10


def test_every_hash_of_a_finished_run_holds(finished: RunFolder) -> None:
    ended = tracestill("data", "verify", str(finished.root), cwd=finished.root)
    assert ended.code == 0 and "verified" in ended.out


def test_an_export_leads_back_to_the_prompts_by_hashes_that_resolve(finished: RunFolder) -> None:
    said = json.loads((finished.export / "merged" / "provenance.json").read_text())
    assert list(said["stages"]) == ["prompts", "headroom", "generate", "data", "train", "evaluate"]
    assert "export/merged/model.safetensors" in said["files"] and unresolved(finished, said) == []
    for stage in said["stages"].values():
        assert all(
            said["files"].get(path) == sha256 for path, sha256 in stage["inputs"].items() if path.endswith("manifest.json")
        )
    said["files"]["dataset/manifest.json"] = "0" * 64
    assert unresolved(finished, said) == ["dataset/manifest.json"]


def test_models_of_a_finished_run_are_compared_without_asking_them_again(finished: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(finished.root, tmp_path / "r")
    models = ["teacher", "student", "export/merged"]
    words = ["evaluate", "embedded", "--compare", *models, "--run-dir", str(tmp_path / "r"), "--json"]
    ended = tracestill(*words, cwd=tmp_path, small=True)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out.splitlines()[-1])
    assert list(found["models"]) == models and found["against"] == "teacher"
    accuracy, _ = found["paired"]["export/merged"]
    assert accuracy["test"] == "exact McNemar" and accuracy["value"] == found["paired"]["student"][0]["value"] < 0
    assert "| accuracy, answerable |" in (tmp_path / "r" / "evaluation" / "comparison.md").read_text()


def test_a_gate_that_fails_exits_3_and_keeps_the_run(finished: RunFolder, tmp_path: Path) -> None:
    """The same run under a recipe with a gate nobody passes; its configuration is made to agree, its figures are not touched."""
    shutil.copytree(finished.root, tmp_path / "r")
    config = tmp_path / "r" / "config.yaml"
    gate = {"accuracy": {"min": 1.0, "max": None}}
    stored = yaml.safe_load(config.read_text())
    stored["recipe"]["evaluate"]["gates"] = gate
    config.write_text(yaml.safe_dump(stored))
    words = [
        *command("evaluate", "embedded", "--run-dir", "r", "--json", small=True),
        "-s",
        "evaluate.gates={accuracy: {min: 1.0}}",
    ]
    ended = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 3 and "accuracy" in ended.stderr and "expected >= 1" in ended.stderr
    assert "student" in json.loads(ended.stdout.splitlines()[-1])
    run = RunFolder(tmp_path / "r")
    words[words.index("evaluate")] = "run"
    ended = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 3 and "from before a gate refused this student" in ended.stdout, ended.stderr
    card = (run.export / "merged" / "README.md").read_text()
    assert "0 of 1 gates passed" in card, card  # what stands says what the gates say now, and so does the page
    assert "Every gate passed" not in (run.report / "index.html").read_text()
    said = json.loads((run.export / "merged" / "provenance.json").read_text())
    assert [row["passed"] for row in said["gates"]] == [False] and unresolved(run, said) == []


def test_the_export_serves_what_was_evaluated(finished: RunFolder) -> None:
    """Real `transformers serve`, offline: greedy answers over HTTP equal the ones the evaluation recorded."""
    rows = [row for row in read_results(finished, "export") if row.finish_reason == "stop" and not row.problem][:4]
    with serving(finished.export / "merged") as ask:
        for row in rows:
            message = ask(row.question)
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""  # servers differ in the key
            assert (message["content"].strip(), reasoning.strip()) == (row.answer, row.reasoning), row.question


@contextmanager
def serving(folder: Path) -> Iterator[Callable[[str], dict]]:
    """`transformers serve FOLDER` on a free port; yields a function from a question to the reply's message."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)],
        env=environment() | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ask(question: str) -> dict:
        body = {"model": str(folder), "messages": [{"role": "user", "content": question}], "temperature": 0.0, "max_tokens": 128}
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
        reply.raise_for_status()
        return reply.json()["choices"][0]["message"]

    try:
        deadline = time.monotonic() + 120
        while True:  # not /v1/models: it needs a hub cache folder
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert server.poll() is None and time.monotonic() < deadline, "the server never listened"
            time.sleep(0.2)
        yield ask
    finally:
        server.kill()
        server.wait()


# --- killed in every stage ---------------------------------------------------------------------------------------


def _segments(folder: Path, count: int) -> Callable[[], bool]:
    return lambda: folder.is_dir() and len(list(folder.glob("*.json"))) >= count


READY: dict[str, Callable[[RunFolder], Callable[[], bool]]] = {
    "generate": lambda run: _segments(run.traces, 3),
    "data": lambda run: lambda: run.verdicts.is_dir(),
    "train": lambda run: lambda: any(run.checkpoints.glob("step-*")) if run.checkpoints.is_dir() else False,
    "evaluate": lambda run: _segments(run.evaluation / "base.items", 1),
    "export": lambda run: lambda: run.export.is_dir(),
    "report": lambda run: lambda: (run.export / "manifest.json").exists(),
}


@pytest.mark.long
def test_killed_in_every_stage_it_continues_to_the_same_ledger(finished: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    words = ("run", "embedded", "--run-dir", "r")
    asked = run.evaluation / "teacher.journal"
    assert kill_when(lambda: asked.is_dir() and any(asked.glob("*.log")), *words, cwd=tmp_path) == -signal.SIGKILL
    code = kill_when(_segments(run.traces, 1), *words, cwd=tmp_path, number=signal.SIGTERM)
    assert code == 75  # asked to stop: interrupted and resumable
    ledger = read_ledger(run)
    assert ledger.completed >= 8 and ledger.requested == ledger.completed + ledger.failed + ledger.pending
    for stage, ready in READY.items():
        assert kill_when(ready(run), *words, cwd=tmp_path) == -signal.SIGKILL, stage
    ended = tracestill(*words, cwd=tmp_path, small=True)
    assert ended.code == 0, ended.out + ended.err
    assert read_ledger(run) == read_ledger(finished)
    assert summary(run)["ledger"] == summary(finished)["ledger"]
    assert tracestill("data", "verify", str(run.root), cwd=tmp_path).code == 0


def test_every_token_of_a_trace_is_shown_with_its_fate(finished: RunFolder) -> None:
    """Piped: lines of `reason | text`, which put together are the trace, and its line of the ledger."""
    ended = tracestill("data", "show", str(finished.root), "--mask", cwd=finished.root)
    assert ended.code == 0, ended.err
    trained = [line.split(" | ", 1)[1] for line in ended.out.splitlines() if line.startswith("trained | ")]
    assert trained and all(text.startswith("<think>") and text.endswith("<|im_end|>") for text in trained)
    ledgers = [
        re.findall(r"(\d+) (tokens|trained|masked|truncated|dropped)", line)
        for line in ended.out.splitlines()
        if " tokens = " in line
    ]
    for ledger in ledgers:
        counts = {name: int(number) for number, name in ledger[:5]}
        assert counts["tokens"] == sum(counts.values()) - counts["tokens"] and not counts["truncated"]
    dropped = ended.out.count("tokens = 0 trained + 0 masked + 0 truncated")
    assert len(ledgers) == len(trained) + dropped  # duplicates among the first traces are dropped, and say so
