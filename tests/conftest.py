"""Properties are drawn the same way every time, and never fail because the machine is busy; signals and logging are left as
found."""

import logging
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A command line that ran in this process leaves its handlers behind, and what stops the suite would only raise in them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """configure_logging() puts a handler on what is stderr at that moment, which pytest closes with the test, and lets every
    module say its INFO lines to the caplog of the tests that follow."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
