"""Leases: one holder at a time, for as long as it lives."""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from data.work import Leases, Worker, WorkFolder, ages, clear, read_facts

TTL_S = 30.0
HOUR_AGO = time.time() - 3600


@pytest.fixture
def folder(tmp_path: Path) -> WorkFolder:
    return WorkFolder(tmp_path)


@pytest.fixture
def workers(folder: WorkFolder) -> Iterator[list[Leases]]:
    with ExitStack() as stack:
        yield [Leases(stack.enter_context(Worker(folder, f"w{number}", TTL_S))) for number in range(3)]


def die(worker: Worker) -> None:
    """Its beat stops, and is an hour old."""
    worker._stopped.set()
    worker._thread.join()
    os.utime(worker.beat, (HOUR_AGO, HOUR_AGO))


def test_one_of_two_gets_a_unit(workers: list[Leases]) -> None:
    first, second, _ = workers
    assert first.claim(5) and not second.claim(5)
    second.look()
    assert not second.is_free(5) and second.is_free(6)
    first.release(5)
    second.look()
    assert second.is_free(5) and second.claim(5)


def test_a_claim_that_was_made_by_a_link_repeated_by_the_file_server_is_ours(workers: list[Leases]) -> None:
    first, *_ = workers
    os.link(first.worker.beat, first._path(7, 0))  # the first try went through, its answer was lost
    assert first.claim(7)


def test_a_dead_workers_units_go_to_exactly_one_other(workers: list[Leases]) -> None:
    dead, second, third = workers
    assert dead.claim(1) and dead.claim(2)
    die(dead.worker)
    for other in (second, third):
        other.look()
        assert other.is_free(1) and other.is_free(2)
    assert second.claim(1) and not third.claim(1) and third.claim(2)
    assert second.mine == {1: 1} and third.mine == {2: 1}
    names = sorted(path.name for path in second.worker.folder.leases.iterdir())
    assert names == ["0000001.0", "0000001.1", "0000002.0", "0000002.1"]
    second.release(1)
    third.release(2)
    assert not list(second.worker.folder.leases.iterdir())


def test_a_worker_that_comes_back_to_life_takes_nothing_away(workers: list[Leases]) -> None:
    """It was stopped for an hour and does not know: its release must not free what another one holds now."""
    stopped, second, third = workers
    stopped.claim(1)
    die(stopped.worker)
    second.look()
    assert second.claim(1)
    stopped.worker.renew()
    stopped.release(1)
    third.look()
    assert not third.is_free(1) and not third.claim(1)


def test_a_claim_by_somebody_who_has_not_looked_for_a_while_fails(workers: list[Leases]) -> None:
    dead, second, third = workers
    dead.claim(1)
    third.look()
    die(dead.worker)
    second.look()
    assert second.claim(1)
    third.others.clear()
    assert not third.claim(1)


def test_one_beat_renews_all_leases(workers: list[Leases]) -> None:
    holder, other, _ = workers
    for unit in range(20):
        holder.claim(unit)
    os.utime(holder.worker.beat, (HOUR_AGO, HOUR_AGO))
    holder.worker.renew()
    other.look()
    assert not any(other.is_free(unit) for unit in range(20))


def test_a_worker_that_stood_still_does_not_release_what_is_others_by_now(workers: list[Leases]) -> None:
    """It slept, the unit was taken over and released, and a third worker has claimed it under the same name."""
    sleeper, heir, third = workers
    assert sleeper.claim(5)
    os.utime(sleeper.worker.beat, (HOUR_AGO, HOUR_AGO))
    heir.look()
    assert heir.claim(5)
    heir.release(5)
    third.look()
    assert third.claim(5)
    sleeper.release(5)
    heir.look()
    assert not heir.is_free(5) and third._path(5, 0).samefile(third.worker.beat)


def test_the_beat_beats(folder: WorkFolder) -> None:
    with Worker(folder, "w", ttl_s=0.3) as worker:
        os.utime(worker.beat, (1.0, 1.0))
        deadline = time.monotonic() + 30
        while worker.beat.stat().st_mtime == 1.0:
            assert time.monotonic() < deadline, "the beat stands still"
            time.sleep(0.01)
        assert ages(folder).keys() == {"w"}
        worker.tell({"finished": 3})
    told = read_facts(folder)["w"]
    assert not ages(folder) and told["finished"] == 3 and time.time() - 60 < told.pop("seen_at") < time.time() + 60  # type: ignore[operator]
    assert json.loads(folder.facts("w").read_text()).keys() == {"finished", "seen_at"}


def test_what_the_dead_left_is_cleared_and_the_living_keep_theirs(workers: list[Leases]) -> None:
    dead, living, _ = workers
    folder = dead.worker.folder
    for number, leases in enumerate((dead, living)):
        leases.claim(number)
        (folder.journal / f"{leases.worker.name}.000000.log").touch()
    die(dead.worker)
    clear(folder, TTL_S)
    assert [path.name for path in folder.leases.iterdir()] == ["0000001.0"]
    assert [path.name for path in folder.journal.iterdir()] == [f"{living.worker.name}.000000.log"]
    assert set(ages(folder)) == {leases.worker.name for leases in workers[1:]}
    living.look()
    assert living.claim(5), "a late comer still finds its folders"


def _claim_all(root: Path, name: str, units: int, answers: "multiprocessing.Queue[list[int]]") -> None:
    with Worker(WorkFolder(root), name, TTL_S) as worker:
        leases = Leases(worker)
        answers.put([unit for unit in range(units) if leases.claim(unit)])
        time.sleep(0.5)


def test_processes_that_race_share_the_units_without_overlap(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")  # a fork of a process where torch has threads may hang
    answers: multiprocessing.Queue[list[int]] = spawn.Queue()
    processes = [
        spawn.Process(target=_claim_all, args=(tmp_path, f"p{number}", 300, answers), daemon=True) for number in range(4)
    ]
    for process in processes:
        process.start()
    claimed = [answers.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(unit for units in claimed for unit in units) == list(range(300))
