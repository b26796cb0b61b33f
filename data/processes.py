"""Pure functions over many inputs in worker processes, a few inputs at a time in memory, results as they come.

Spawned, never forked: whoever builds may hold torch's threads. A worker whose parent died ends, and one that is killed ends
the build with a line that says so.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.abc import MetaPathFinder
from typing import Any, TypeVar

from configs.launch import StageFailed, die_with_parent

Input = TypeVar("Input")
Output = TypeVar("Output")

IN_FLIGHT = 2
"""Inputs a worker: one it is at, one that waits for it."""


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def map_unordered(
    function: Callable[[Input], Output],
    inputs: Iterable[Input],
    *,
    num_workers: int,
    set_up: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[Output]:
    """function(input) of every input, in whatever order they are done; the first exception ends it.

    set_up(*arguments) runs once in each process before its first input; with num_workers 0, that is this one.
    Raises StageFailed when a worker dies.
    """
    if num_workers == 0:
        if set_up is not None:
            set_up(*arguments)
        yield from map(function, inputs)
        return
    executor = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(set_up, arguments)
    )
    try:
        yield from _as_they_come(executor, function, iter(inputs), num_workers * IN_FLIGHT)
    except BrokenProcessPool as error:
        raise StageFailed(
            "a worker process of the data stage was killed, most likely for want of memory; "
            "free some, or lower data.processes, then give the same command: what was judged is kept"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _as_they_come(
    executor: ProcessPoolExecutor, function: Callable[[Input], Output], inputs: Iterator[Input], in_flight: int
) -> Iterator[Output]:
    running: set[Future[Output]] = set()
    for value in inputs:
        running.add(executor.submit(function, value))
        if len(running) < in_flight:
            continue
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _begin(set_up: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent tells us what it means
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)  # it went while we were imported
    sys.meta_path.insert(0, _WithoutPandas())
    if set_up is not None:
        set_up(*arguments)


class _WithoutPandas(MetaPathFinder):
    """pyarrow imports pandas with its first array, if there is one: a second and 60 MB in each worker, only to see that it was
    not given anything of pandas' own."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)
