"""A drain has its time; after it the process ends, whatever it is in the middle of."""

import asyncio
import signal
import time

import pytest

from configs.draining import draining
from configs.errors import Stopped


def test_a_drain_that_takes_too_long_ends_even_inside_an_event_loop() -> None:
    """The loop logs what a callback raises, and goes on: but not for ever, and not for this."""

    def work(loop: asyncio.AbstractEventLoop) -> None:
        time.sleep(0.01)
        loop.call_soon(work, loop)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    loop.call_soon(work, loop)
    started = time.monotonic()
    with pytest.raises(Stopped, match="not drained within generate.drain_seconds 0.2"), draining(0.2) as drain:
        signal.raise_signal(signal.SIGTERM)
        assert drain.requested == "SIGTERM"
        while True:
            loop.call_later(0.05, loop.stop)
            loop.run_forever()
    assert time.monotonic() - started < 5.0
    loop.close()


def test_one_wish_heard_twice_is_one_wish_and_a_second_one_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped, match="stopped by SIGUSR2 again"), draining(60.0) as drain:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr("configs.draining.SAME_WISH_S", 0.0)
        signal.raise_signal(signal.SIGUSR2)
    assert drain.requested == "SIGTERM"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
