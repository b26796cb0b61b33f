"""A verdict that says nothing of the answer is not for ever: the next build asks for it again, and for nothing else."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from configs.schema import Data
from data.build import build
from data.panel import VERIFIED, unsettled
from data.store import RunFolder
from data.verify.runner import CRASHED, RIGHT, Item, Judgement, Pool, judge
from tests.data.make_run import make_prompt, make_run, make_trace, snapshot
from tests.data.raising import RAISING

HASTY = make_prompt("q", "r", verifier="hasty")


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The answers of every list of items that a pool is handed."""
    seen: list[list[str]] = []
    plain = Pool.judge

    def listening(pool: Pool, items: Sequence[Item], **options: object) -> list[Judgement]:
        seen.append([item.answer for item in items])
        return plain(pool, items, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Pool, "judge", listening)
    return seen


def counts_of(run: RunFolder, limit_s: float) -> tuple[int, dict[str, int]]:
    built = build(Data(verify_timeout_s=limit_s, validation_share=0.0), run, num_workers=1, verifiers=RAISING)
    return built.counts["kept"], built.counts["unjudged_by_reason"]


def test_what_timed_out_is_asked_again_with_a_longer_limit_and_only_that(tmp_path: Path, judged: list[list[str]]) -> None:
    curious = make_prompt("another", "r", verifier="curious")
    traces = [make_trace(HASTY, "late", reasoning="1"), make_trace(curious, "soon"), make_trace(HASTY, "", sample=1)]
    run, whole = (make_run(tmp_path / name, [HASTY, curious], [traces]) for name in ("run", "whole"))
    assert counts_of(run, 0.3) == (1, {"timed_out": 1})
    assert judged == [["late", "soon"]]
    for limit_s in (0.3, 0.2):
        judged.clear()
        assert counts_of(run, limit_s) == (1, {"timed_out": 1}) and judged == []
    assert counts_of(run, 60.0) == (2, {}) and judged == [["late"]]
    judged.clear()
    assert counts_of(run, 0.3) == (2, {}) and judged == [], "what is settled stays settled"
    assert counts_of(whole, 60.0) == (2, {}) and snapshot(run) == snapshot(whole)


@contextmanager
def killing(folder: Path, number: int) -> Iterator[list[int]]:
    """So many of those that ask to be spared are killed from outside; the next one is spared."""
    folder.mkdir(exist_ok=True)
    killed: list[int] = []

    def kill() -> None:
        until = time.monotonic() + 120
        while len(killed) < number and time.monotonic() < until:
            for name in {path.name for path in folder.iterdir()} - set(map(str, killed)):
                os.kill(int(name), signal.SIGKILL)
                killed.append(int(name))
            time.sleep(0.01)
        if number < 2:
            (folder / "spared").touch()

    thread = threading.Thread(target=kill)
    thread.start()
    yield killed
    thread.join()


def test_a_worker_that_is_killed_once_is_no_crash_of_the_answer(tmp_path: Path) -> None:
    item = Item(make_prompt("q", "r", verifier="mortal"), str(tmp_path / "wait"))
    with killing(tmp_path / "wait", 1) as killed:
        assert judge([item], timeout_s=60.0, num_workers=1, verifiers=RAISING) == [RIGHT]
    assert len(killed) == 1


def test_what_crashed_is_asked_again_by_the_next_build(tmp_path: Path, judged: list[list[str]]) -> None:
    mortal, curious, folder = (
        make_prompt("q", "r", verifier="mortal"),
        make_prompt("q2", "r", verifier="curious"),
        tmp_path / "wait",
    )
    run = make_run(tmp_path / "run", [mortal, curious], [[make_trace(mortal, str(folder)), make_trace(curious, "soon")]])
    with killing(folder, 2) as killed:
        assert counts_of(run, 60.0) == (1, {"crashed": 1})
    assert len(killed) == 2
    (folder / "spared").touch()
    judged.clear()
    assert counts_of(run, 1.0) == (2, {}) and judged == [[str(folder)]]
    judged.clear()
    assert counts_of(run, 1.0) == (2, {}) and judged == []


def test_only_crashes_and_shorter_limits_are_unsettled() -> None:
    rows = [
        ("a", "pass", "", 1.0, 0.0), ("a", "fail", "wrong", 0.5, 0.0), ("a", "unjudged", "timed_out", 0.0, 10.0),
        ("b", "unjudged", "timed_out", 0.0, 10.0), ("b", "unjudged", "crashed", 0.0, 99.0),
        ("", "unjudged", "no_verifier", 0.0, 0.0),
    ]  # fmt: skip
    table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=VERIFIED)
    assert unsettled(table, {"a": 10.0, "b": 10.5}) == (3, 4)
    assert unsettled(table, {"a": 10.5, "b": 9.0}) == (2, 4)
    assert unsettled(table.slice(0, 0), {}) == () and CRASHED.verdict == "unjudged"
