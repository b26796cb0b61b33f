"""Threads that parse and tokenise, so that sockets never wait for it: 16 KB of text take a tokenizer 4 ms."""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

THREADS = max(1, min(4, (os.cpu_count() or 1) - 1))
GATHER_S = 0.02
REPORT_S = 0.005
T = TypeVar("T")


class Job(NamedTuple):
    work: Callable[[], Any]
    future: "asyncio.Future[Any]"


class Readers:
    """Work is handed over every GATHER_S at most, all that arrived in it together, and comes back in batches too: each
    hand-over costs more than sending a request (0.8 ms, most of it a fight for the GIL), and nobody waits for 20 ms more of a
    trace."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._pool = loop, ThreadPoolExecutor(THREADS, thread_name_prefix="http-reader")
        self._arrived: list[Job] = []
        self._handed_over = float("-inf")
        self._closed = False

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, done in a thread."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._arrived.append(Job(work, future))
        if len(self._arrived) == 1:
            self._loop.call_at(max(self._loop.time(), self._handed_over + GATHER_S), self._hand_over)
        return await future

    def close(self) -> None:
        """Waits for what a thread is at, not for what is queued."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)

    def _hand_over(self) -> None:
        jobs, self._arrived, self._handed_over = self._arrived, [], self._loop.time()
        for start in range(min(THREADS, len(jobs))):
            self._pool.submit(self._do, jobs[start::THREADS])

    def _do(self, jobs: list[Job]) -> None:
        """In a thread. Reports what is done every REPORT_S, so that the first does not wait for a long one behind it."""
        done: list[tuple[Job, Any, BaseException | None]] = []
        reported = time.monotonic()
        for job in jobs:
            if self._closed:
                return
            try:
                done.append((job, job.work(), None))
            except BaseException as error:
                done.append((job, None, error))
            if time.monotonic() - reported > REPORT_S:
                self._report(done)
                done, reported = [], time.monotonic()
        self._report(done)

    def _report(self, done: list[tuple[Job, Any, BaseException | None]]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._settle, done)

    def _settle(self, done: list[tuple[Job, Any, BaseException | None]]) -> None:
        for job, result, error in done:
            if job.future.cancelled():
                continue
            if error is not None:
                job.future.set_exception(error)
            else:
                job.future.set_result(result)
