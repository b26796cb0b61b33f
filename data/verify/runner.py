"""Judges many answers at once in worker processes that can be killed.

Each worker answers item by item over a pipe, so that the deadline is one item's and the item that broke a worker is
known: it is `timed_out` or `crashed`, a new worker takes over, and the rest of its batch is judged as if nothing had
happened. Workers are spawned, never forked: whoever calls this may hold torch's threads.

Measured: 5,000 wrong short answers to reasoning-gym items take two workers 1 s, after a start of 2 s that is the import (5 to
9 s while two trainings used both cores); right ones are settled without a worker in 20 ms.
"""

import faulthandler
import logging
import multiprocessing
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from configs.progress import Count, Report
from data.records import Prompt, VerdictName
from data.verify import VERIFIERS, Verifier

log = logging.getLogger(__name__)

BATCH = 64
START_S = 900.0
"""How long a worker may take to import its verifiers: 2 s on an idle machine, 3 minutes on one with 6 processes a core."""
MEMORY_BYTES = 8 << 30
"""Address space of a worker. `10**10**10` in an answer must end as a MemoryError there, not as a dead node."""
_ORPHAN_GRACE_S = 30.0


class Item(NamedTuple):
    """One answer to judge by its prompt's verifier."""

    prompt: Prompt
    answer: str


class Judgement(NamedTuple):
    """pass has reason ""; fail is `wrong` or `no_answer`; unjudged is `timed_out`, `crashed` or `no_verifier`, at score 0.0."""

    verdict: VerdictName
    reason: str
    score: float


NO_ANSWER = Judgement("fail", "no_answer", 0.0)
NO_VERIFIER = Judgement("unjudged", "no_verifier", 0.0)
TIMED_OUT = Judgement("unjudged", "timed_out", 0.0)
CRASHED = Judgement("unjudged", "crashed", 0.0)
RIGHT = Judgement("pass", "", 1.0)


def from_score(score: float) -> Judgement:
    """Only 1.0 passes. A score outside [0, 1] (or NaN) is a broken verifier, not a wrong answer."""
    if score == 1.0:
        return RIGHT
    return Judgement("fail", "wrong", score) if 0.0 <= score < 1.0 else CRASHED


def judge(
    items: Sequence[Item],
    *,
    timeout_s: float,
    num_workers: int | None = None,
    verifiers: Mapping[str, Verifier] = VERIFIERS,
    report: Report | None = None,
) -> list[Judgement]:
    """One judgement an item, in order. Equal (prompt_id, answer) pairs are judged once.

    timeout_s bounds one answer's scoring, in seconds of wall time. num_workers: the machine's cores when None.
    Raises RuntimeError when a worker cannot even start.
    """
    memo: dict[tuple[str, str], Judgement] = {}
    hard: list[Item] = []
    for item in {(item.prompt.prompt_id, item.answer): item for item in items}.values():
        judgement = _short_cut(item, verifiers)
        if judgement is None:
            hard.append(item)
        else:
            memo[item.prompt.prompt_id, item.answer] = judgement
    judgements = (
        _judge_in_workers(hard, timeout_s, num_workers or len(os.sched_getaffinity(0)), verifiers, report) if hard else []
    )
    for item, judgement in zip(hard, judgements, strict=True):
        memo[item.prompt.prompt_id, item.answer] = judgement
    return [memo[item.prompt.prompt_id, item.answer] for item in items]


def _short_cut(item: Item, verifiers: Mapping[str, Verifier]) -> Judgement | None:
    """The judgement where no worker is needed. The reference itself is right because the prompt set was self-checked."""
    prompt, answer = item
    if not prompt.verifier:
        return NO_VERIFIER
    if not answer:
        return NO_ANSWER
    if answer == prompt.answer:
        return RIGHT
    verifier = verifiers[prompt.verifier]
    return from_score(verifier.score(prompt, answer)) if verifier.inline else None


# --- the parent's side -------------------------------------------------------------------------------------------


class _Worker:
    """One process and the items it owes, oldest first; `deadline` (monotonic seconds) is the oldest item's, and before
    the worker is ready its start's."""

    def __init__(self, verifiers: Mapping[str, Verifier], timeout_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, dict(verifiers), timeout_s), daemon=True)
        self.process.start()
        theirs.close()  # or its death would not end our recv
        self.timeout_s = timeout_s
        self.ready, self.gone = False, False
        self.owes: deque[int] = deque()
        self.deadline = time.monotonic() + START_S

    @property
    def idle(self) -> bool:
        return not self.owes

    def give(self, batch: Sequence[int], items: Sequence[Item]) -> bool:
        """False when the worker died before it could take the batch: no item is to blame."""
        try:
            self.connection.send([items[index] for index in batch])
        except (BrokenPipeError, ConnectionResetError):
            return False
        self.owes.extend(batch)
        self.deadline = time.monotonic() + self.timeout_s
        return True

    def hear(self, results: dict[int, Judgement]) -> None:
        """Takes everything the worker has said so far, without waiting for more."""
        try:
            while self.connection.poll():
                said: Judgement | None = self.connection.recv()
                if said is not None:
                    results[self.owes.popleft()] = said
                self.ready = True
                self.deadline = time.monotonic() + self.timeout_s if self.owes else float("inf")
        except (EOFError, ConnectionResetError):
            self.gone = True

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _judge_in_workers(
    items: Sequence[Item], timeout_s: float, num_workers: int, verifiers: Mapping[str, Verifier], report: Report | None
) -> list[Judgement]:
    used = {name: verifiers[name] for name in {item.prompt.verifier for item in items}}
    waiting: deque[int] = deque(range(len(items)))
    results: dict[int, Judgement] = {}
    workers: list[_Worker] = []
    try:
        while len(results) < len(items):
            wanted = min(num_workers - len(workers), -(-len(waiting) // BATCH) - sum(worker.idle for worker in workers))
            workers += [_Worker(used, timeout_s) for _ in range(wanted)]
            _wait(workers)
            for worker in list(workers):
                worker.hear(results)
                if worker.gone or time.monotonic() > worker.deadline:
                    _bury(worker, items, waiting, results)
                    workers.remove(worker)
                elif worker.ready and worker.idle and waiting:
                    batch = [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]
                    if not worker.give(batch, items):
                        waiting.extendleft(reversed(batch))
            if report is not None:
                report(Count(len(results), len(items), "judging"))
    finally:
        for worker in workers:
            worker.kill()
    return [results[index] for index in range(len(items))]


def _wait(workers: Sequence[_Worker]) -> None:
    """Returns when a worker has said something or died, or when the next deadline is over."""
    until = min(worker.deadline for worker in workers) - time.monotonic()
    wait([worker.connection for worker in workers], None if until == float("inf") else max(0.0, until))


def _bury(worker: _Worker, items: Sequence[Item], waiting: deque[int], results: dict[int, Judgement]) -> None:
    """Ends the worker, blames the item it was at, and gives the others back."""
    worker.kill()
    if not worker.ready:
        how = f"ended with exit code {worker.process.exitcode}" if worker.gone else f"did not answer within {START_S:.0f} s"
        raise RuntimeError(f"a verifier worker {how} while it started; its traceback is on standard error")
    if worker.owes:
        blamed = worker.owes.popleft()
        results[blamed] = CRASHED if worker.gone else TIMED_OUT
        prompt = items[blamed].prompt
        log.warning("verifier %s %s on prompt %s (%s)", prompt.verifier, results[blamed].reason, prompt.prompt_id, prompt.task)
        waiting.extendleft(reversed(worker.owes))


# --- the worker's side -------------------------------------------------------------------------------------------


def _serve(connection: Connection, verifiers: Mapping[str, Verifier], timeout_s: float) -> None:
    """Says None once it is ready, then one Judgement an item of each batch it gets, until the parent is gone."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)  # a scorer that prints must not end up in the caller's --json line
        for verifier in verifiers.values():
            if verifier.prepare is not None:
                verifier.prepare()
        _confine()
        connection.send(None)
        try:
            while True:
                for prompt, answer in connection.recv():
                    # Were the parent killed while we hang, nobody would end us: this timer needs neither it nor the GIL.
                    faulthandler.dump_traceback_later(timeout_s + _ORPHAN_GRACE_S, exit=True, file=nowhere)
                    connection.send(_score(verifiers[prompt.verifier], prompt, answer))
                faulthandler.cancel_dump_traceback_later()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _confine() -> None:
    """Ctrl-C is the parent's to handle; memory has a bound. After the imports, so that a tight bound hits answers only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _score(verifier: Verifier, prompt: Prompt, answer: str) -> Judgement:
    try:
        return from_score(verifier.score(prompt, answer))
    except (Exception, SystemExit):  # a scorer that fails says nothing about the answer
        log.debug("verifier %s raised on prompt %s", prompt.verifier, prompt.prompt_id, exc_info=True)
        return CRASHED
