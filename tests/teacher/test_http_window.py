"""Additive increase, multiplicative decrease: a server simulated by arithmetic."""

import pytest

from teacher.http.window import STEPS, Window


def answer(window: Window, count: int, *, sent_at: float, seconds: float = 1.0, size: int = 1000) -> None:
    for _ in range(count):
        window.in_flight = window.size
        window.answered(sent_at, sent_at + seconds, size)


def test_it_starts_at_the_recipes_bound_and_never_passes_it() -> None:
    window = Window(32)
    answer(window, 200, sent_at=0.0)
    assert window.size == 32


def test_a_complaint_halves_it_once_for_all_that_was_sent_before() -> None:
    window = Window(64)
    for _ in range(64):
        window.complained(sent_at=0.0, now=1.0)
    assert window.size == 32
    window.complained(sent_at=1.5, now=2.0)
    assert window.size == 16


def test_complaints_never_close_it() -> None:
    window = Window(8)
    for moment in range(50):
        window.complained(sent_at=float(moment), now=float(moment) + 0.5)
    assert window.size == 1 and window.limit == 1.0


@pytest.mark.parametrize("bound", [4, 32, 1024])
def test_it_is_back_at_the_bound_after_as_many_round_trips_however_large_it_is(bound: int) -> None:
    window = Window(bound)
    window.complained(0.0, 1.0)
    trips = 0
    while window.size < bound:
        answer(window, window.size, sent_at=2.0 + trips)
        trips += 1
    assert STEPS // 4 <= trips <= STEPS + 1 or bound < STEPS


def test_a_server_that_writes_three_times_slower_at_the_same_load_is_relieved() -> None:
    window = Window(32)
    answer(window, 64, sent_at=0.0, seconds=1.0)
    answer(window, 64, sent_at=10.0, seconds=2.0)  # twice is weather
    assert window.size == 32
    answer(window, 32, sent_at=20.0, seconds=4.0)
    assert window.size < 20


def test_long_outputs_and_fuller_batches_are_no_latency() -> None:
    """Ten times as long for ten times the text; eight times slower each with sixteen times as many beside it."""
    window = Window(32)
    answer(window, 64, sent_at=0.0, seconds=1.0, size=1000)
    answer(window, 64, sent_at=10.0, seconds=10.0, size=10_000)
    assert window.size == 32
    crowded = Window(32)
    for load, seconds in ((2, 1.0), (32, 8.0)):
        for _ in range(64):
            crowded.in_flight = load
            crowded.answered(0.0, seconds, 1000)
    assert crowded.size == 32


def test_a_thin_stream_of_requests_is_no_latency() -> None:
    """At the end of a run few are in flight, and each is answered no faster than before."""
    window = Window(32)
    answer(window, 64, sent_at=0.0)
    for _ in range(64):
        window.in_flight = 1
        window.answered(10.0, 11.0, 1000)
    assert window.size == 32


def test_milliseconds_are_no_latency() -> None:
    """A busy machine makes a reply of 2 ms one of 20; that says nothing of the server."""
    window = Window(32)
    answer(window, 64, sent_at=0.0, seconds=0.002)
    answer(window, 64, sent_at=10.0, seconds=0.02)
    assert window.size == 32
