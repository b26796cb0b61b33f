"""Waits between asks: pure arithmetic."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher.http.waits import LONGEST_WAIT_S, jittered_wait, retry_after_s

NOW = 784111777.0  # Sun, 06 Nov 1994 08:49:37 GMT


@given(st.integers(1, 10_000), st.integers(0, 1000))
def test_a_wait_lies_between_nothing_and_the_doubled_first_one(failures: int, seed: int) -> None:
    assert 0.0 <= jittered_wait(failures, 0.5, random.Random(seed)) <= min(LONGEST_WAIT_S, 0.5 * 2.0 ** min(failures - 1, 20))


def test_clients_refused_together_come_back_spread_over_the_whole_wait() -> None:
    draw = random.Random(0)
    waits = sorted(jittered_wait(4, 1.0, draw) for _ in range(1000))
    assert waits[50] < 0.8 and waits[500] == pytest.approx(4.0, abs=0.4) and waits[950] > 7.2


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", 0.0), ("0", 0.0), ("7", 7.0), (" 1.5 ", 1.5), ("-3", 0.0), ("soon", 0.0), ("²", 0.0), ("1e3", 0.0),
        ("Sun, 06 Nov 1994 08:49:47 GMT", 10.0), ("Sun, 06 Nov 1994 08:49:27 GMT", 0.0),
        ("Sunday, 06-Nov-94 08:49:47 GMT", 10.0), ("Sun, 06 Nov 1994 08:49:47 -0000", 10.0),
        ("Sun, 99 Nov 1994 08:49:47 GMT", 0.0),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(header: str, seconds: float) -> None:
    assert retry_after_s(header, NOW) == seconds


@given(st.text(max_size=40))
def test_no_header_makes_it_raise_or_wait_backwards(header: str) -> None:
    assert retry_after_s(header, NOW) >= 0.0
