"""The pool: every request once, longest expected first, found again by identity and never by position."""

from pathlib import Path

import numpy as np
import pytest

from data.prompt_set import PromptIndex
from data.records import digest, trace_identity
from data.store import Segment
from generate import pool as pools
from generate.pool import Pool


def make_index(tasks: list[str], characters: list[int]) -> PromptIndex:
    ids = np.array([list(bytes.fromhex(digest(number))) for number in range(len(tasks))], dtype=np.uint8).reshape(-1, 16)
    names = tuple(dict.fromkeys(tasks))
    codes = np.array([names.index(task) for task in tasks], dtype=np.int32)
    return PromptIndex(ids, codes, names, np.array(characters, dtype=np.int64), np.arange(len(tasks)))


def make_pool(tasks: list[str], characters: list[int], samples: int = 1, wanted: np.ndarray | None = None) -> Pool:
    index = make_index(tasks, characters)
    return Pool(index, samples=samples, teacher_fingerprint="t", sampling_fingerprint="s", wanted=wanted)


def segment(pool: Pool, requests: list[int], tokens: int, reason: str = "stop") -> Segment:
    facts = {
        "trace_ids": [pool.trace_id(request) for request in requests], "finish_reasons": [reason] * len(requests),
        "output_tokens": [tokens] * len(requests),
    }  # fmt: skip
    return Segment(Path("s.arrow"), len(requests), "", "", facts)


def order(pool: Pool) -> list[int]:
    return [request for unit in pool.next_units(lambda unit: True) for request in pool.open_requests(unit)]


def test_identity_is_that_of_the_record() -> None:
    pool = make_pool(["a", "b"], [1, 1], samples=2)
    assert [pool.trace_id(request) for request in range(4)] == [
        trace_identity(digest(request // 2), request % 2, "t", "s") for request in range(4)
    ]
    assert pool.find([pool.trace_id(3), "00" * 16, pool.trace_id(0)]).tolist() == [3, -1, 0]


def test_an_unseen_task_comes_first_then_the_longest_by_task_and_by_prompt() -> None:
    pool = make_pool(["short", "long", "new", "short", "long"], [5, 6, 1, 50, 60])
    pool.add(segment(pool, [], 0))
    seen = make_pool(["short", "long", "new", "short", "long", "short", "long"], [5, 6, 1, 50, 60, 7, 7])
    seen.add(segment(seen, [5], 10))
    seen.add(segment(seen, [6], 500))
    assert order(seen) == [2, 4, 1, 3, 0]


def test_what_is_done_is_not_asked_again_and_an_abort_only_when_told_to() -> None:
    pool = make_pool(["a"] * 4, [4, 3, 2, 1])
    assert pool.add(segment(pool, [1], 3)) == 0 and pool.add(segment(pool, [0], 3, "abort"), asks_aborted_again=True) == 0
    assert order(pool) == [0, 2, 3] and pool.num_open == 3
    pool.add(segment(pool, [0], 3, "abort"))
    pool.add(segment(pool, [1], 3))  # a superseded copy
    assert order(pool) == [2, 3] and pool.num_open == 2


def test_traces_that_this_run_never_asks_are_counted() -> None:
    pool, other = make_pool(["a"], [1]), make_pool(["a"] * 3, [1, 1, 1])
    assert pool.add(segment(other, [0, 1, 2], 3)) == 2


def test_units_that_are_held_are_passed_over_and_begun_ones_come_first() -> None:
    pool = make_pool(["a"] * 5, [5, 4, 3, 2, 1])
    assert list(pool.next_units(lambda unit: unit != 1, first=[4, 1, 4])) == [4, 0, 2, 3]


def test_large_pools_are_leased_in_units_that_hold_every_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "MOST_UNITS", 10)
    generator = np.random.default_rng(0)
    tasks = [f"t{number}" for number in generator.integers(0, 3, 47)]
    pool = make_pool(tasks, generator.integers(1, 99, 47).tolist(), samples=2)
    assert pool.unit_size == 10 and pool.num_units == 10
    assert sorted(order(pool)) == list(range(94))
    unit = pool.unit_of(17)
    pool.add(segment(pool, [17], 1))
    assert 17 not in pool.open_requests(unit) and len(pool.open_requests(unit)) in (9, 3)


def test_only_the_wanted_prompts_are_asked() -> None:
    pool = make_pool(["a"] * 3, [1, 2, 3], samples=2, wanted=np.array([True, False, True]))
    assert sorted(order(pool)) == [0, 1, 4, 5] and pool.num_open == 4
