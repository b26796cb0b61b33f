"""Judges many answers in worker processes that can be killed.

Each worker answers item by item over a pipe, so that the deadline is one item's and the item that broke a worker is
known: it is `timed_out`, or asked once more (a machine short of memory kills whom it likes) and then `crashed`; a new worker
takes over, and the rest of its batch is judged as if nothing had happened. Workers are spawned, never forked: whoever calls
this may hold torch's threads. They are started when first needed and live as long as the pool, because a build asks segment by
segment and a start costs 2 s of imports.

Before a worker sees an answer, the verifier's own `quick` is asked here, and what has been judged before is remembered.

Measured: 5,000 wrong short answers to reasoning-gym items take two workers 1 s, after a start of 2 s that is the import (5 to
9 s while two trainings used both cores); right ones are settled without a worker in 20 ms.
"""

import dataclasses
import hashlib
import itertools
import logging
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import NamedTuple

from configs.errors import TracestillError
from configs.launch import StageFailed, die_with_parent
from configs.progress import Count, Report
from data.records import Prompt, VerdictName
from data.verify import VERIFIERS, Verifier

log = logging.getLogger(__name__)

BATCH, SMALLEST_BATCH = 64, 8
"""Items that a worker is handed at once: few where all are few, so that no worker waits for another's last one, and not so few
that two workers import for two seconds what one could have judged."""
START_S = 900.0
"""How long a worker may take to import a verifier: 2 s on an idle machine, 3 minutes on one with 6 processes a core."""
MEMORY_BYTES = 8 << 30
"""Address space of a worker. `10**10**10` in an answer must end as a MemoryError there, not as a dead node."""
REMEMBERED = 1 << 18
"""Most judgements that a pool remembers, about 50 MB; the oldest is forgotten first."""
LLM_JUDGE = "llm_judge"
"""The verifier that is a model, asked once filters have spoken (data/grading.py): no function of prompt and answer, no worker's
business."""
EXIT_S = 5.0
"""How long a worker that has closed its pipe may take to end."""
ATTEMPTS = 2
"""Workers that may die over one answer before it is to blame: the first may have been somebody else's. And as many that may be
killed, one after the other, before they have judged anything."""


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
NOT_ASKED = Judgement("unjudged", "not_asked", 0.0)
TIMED_OUT = Judgement("unjudged", "timed_out", 0.0)
CRASHED = Judgement("unjudged", "crashed", 0.0)
RIGHT = Judgement("pass", "", 1.0)


def limits_s(verifiers: Mapping[str, Verifier], timeout_s: float) -> dict[str, float]:
    """Seconds that each verifier may take for one answer: what the caller allows, or more where the verifier says so."""
    return {name: max(timeout_s, verifier.timeout_s) for name, verifier in verifiers.items()}


def from_score(score: float) -> Judgement:
    """Only 1.0 passes. A score outside [0, 1] (or NaN) is a broken verifier, not a wrong answer."""
    if score == 1.0:
        return RIGHT
    return Judgement("fail", "wrong", score) if 0.0 <= score < 1.0 else CRASHED


def key_of(item: Item, verifiers: Mapping[str, Verifier] = VERIFIERS) -> bytes:
    """16 bytes that two items share exactly when they are the same work: verifier, its version, reference, details, answer. The
    same over processes, builds and machines. A judgement may be kept under its key for as long as it is not `unjudged`: another
    machine, or this one when it is idle, may get further."""
    prompt = item.prompt
    version = verifiers[prompt.verifier].version if prompt.verifier else 0
    state = hashlib.blake2b(digest_size=16)
    for part in (prompt.verifier, str(version), prompt.answer, prompt.details, item.answer):
        encoded = part.encode("utf-8", "surrogatepass")  # a tokenizer may leave half a pair
        state.update(len(encoded).to_bytes(8, "little"))
        state.update(encoded)
    return state.digest()


def judge(
    items: Sequence[Item],
    *,
    timeout_s: float,
    num_workers: int | None = None,
    verifiers: Mapping[str, Verifier] = VERIFIERS,
    report: Report | None = None,
) -> list[Judgement]:
    """One judgement an item, in order, by a pool that lives for this call. See Pool."""
    with Pool(verifiers, timeout_s=timeout_s, num_workers=num_workers) as pool:
        return pool.judge(items, report=report)


class Pool:
    """Judges lists of items, one after the other, with workers that are kept in between. Leaving the context kills them; so does
    the end of this process, however it ends.

    timeout_s bounds one answer's scoring, in seconds of wall time; a verifier that states more gets that. num_workers: the
    machine's cores when None. memo: judgements by key_of, read and added to; the caller may fill it from an earlier build.
    """

    def __init__(
        self,
        verifiers: Mapping[str, Verifier] = VERIFIERS,
        *,
        timeout_s: float,
        num_workers: int | None = None,
        memo: MutableMapping[bytes, Judgement] | None = None,
    ) -> None:
        self.verifiers = verifiers
        self.limits_s = limits_s(verifiers, timeout_s)
        self.num_workers = num_workers or len(os.sched_getaffinity(0))
        self.memo: MutableMapping[bytes, Judgement] = {} if memo is None else memo
        self.workers: list[_Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """No worker is left."""
        while self.workers:
            self.workers.pop().kill()

    def judge(self, items: Sequence[Item], *, report: Report | None = None) -> list[Judgement]:
        """One judgement an item, in order. Equal work is done once, also over calls.

        Raises:
            TracestillError: a verifier found that this machine cannot judge at all.
            StageFailed: a worker cannot even start.
        """
        short = [short_cut(item, self.verifiers) for item in items]
        keys = [key_of(item, self.verifiers) if found is None else b"" for item, found in zip(items, short, strict=True)]
        missing = {key: item for key, item in zip(keys, items, strict=True) if key and key not in self.memo}
        found = dict(zip(missing, self._ask_workers(list(missing.values()), report), strict=True))
        known = {key: self.memo[key] for key in keys if key and key not in found} | found
        self._remember(found)
        return [known[key] if judgement is None else judgement for key, judgement in zip(keys, short, strict=True)]

    def self_check(self, prompts: Sequence[Prompt]) -> list[bool]:
        """For each prompt whether its reference scores 1.0 by its verifier, without any short cut, or there is nothing to check.
        What data.verify.self_check says, with deadlines: a reference that hangs fails."""
        checked = [index for index, prompt in enumerate(prompts) if prompt.verifier and prompt.answer]
        judgements = self._ask_workers([Item(prompts[index], prompts[index].answer) for index in checked], None)
        passed = {index for index, judgement in zip(checked, judgements, strict=True) if judgement == RIGHT}
        return [index in passed or self._judgeable(prompt) for index, prompt in enumerate(prompts)]

    def _judgeable(self, prompt: Prompt) -> bool:
        """Without a reference."""
        if not prompt.verifier or prompt.answer:
            return not prompt.verifier
        check = self.verifiers[prompt.verifier].check
        try:
            return check is not None and check(prompt)
        except TracestillError:
            raise
        except Exception:  # as in self_check: any failure means that answers cannot be judged
            return False

    def _remember(self, found: Mapping[bytes, Judgement]) -> None:
        self.memo.update(found)
        for key in list(itertools.islice(self.memo, max(0, len(self.memo) - REMEMBERED))):
            del self.memo[key]

    def _ask_workers(self, items: Sequence[Item], report: Report | None) -> list[Judgement]:
        if not items:
            return []
        try:
            return _Round(self, items).run(report)
        except BaseException:
            self.close()  # what they still owe is nobody's any more
            raise


def short_cut(item: Item, verifiers: Mapping[str, Verifier]) -> Judgement | None:
    """The judgement where no worker is needed."""
    prompt, answer = item
    if not prompt.verifier:
        return NO_VERIFIER
    if not answer:
        return NO_ANSWER
    if prompt.verifier == LLM_JUDGE:
        return NOT_ASKED
    verifier = verifiers[prompt.verifier]
    if verifier.inline:
        return from_score(verifier.score(prompt, answer))
    score = None if verifier.quick is None else verifier.quick(prompt, answer)
    return None if score is None else from_score(score)


# --- the parent's side -------------------------------------------------------------------------------------------


class _Said(NamedTuple):
    """What a worker tells. Neither: it is ready for its batch. abort: the reason why nothing can be judged on this machine."""

    judgement: Judgement | None = None
    abort: TracestillError | None = None


class _Worker:
    """One process and the items it owes, oldest first. ready: it has started, and imported what they need. proved: it has judged
    something. deadline (monotonic seconds): the oldest item's, or of getting ready."""

    def __init__(self, verifiers: Mapping[str, Verifier], limits_s: Mapping[str, float]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, dict(verifiers)), daemon=True)
        self.process.start()
        theirs.close()  # or its death would not end our recv
        self.limits_s = limits_s
        self.sweeps = {name: verifier.sweep for name, verifier in verifiers.items() if verifier.sweep is not None}
        self.swept: set[str] = set()
        self.ready, self.gone, self.proved = False, False, False
        self.owes: deque[tuple[int, float]] = deque()
        self.deadline = time.monotonic() + START_S

    @property
    def idle(self) -> bool:
        return not self.owes

    def give(self, batch: Sequence[int], items: Sequence[Item]) -> bool:
        """False when the worker died before it could take the batch: no item is to blame."""
        try:
            self.connection.send([_trimmed(items[index]) for index in batch])
        except (BrokenPipeError, ConnectionResetError):
            return False
        self.owes.extend((index, self.limits_s[items[index].prompt.verifier]) for index in batch)
        self.swept.update(self.sweeps.keys() & {items[index].prompt.verifier for index in batch})
        self.ready, self.deadline = False, time.monotonic() + START_S
        return True

    def hear(self, results: dict[int, Judgement]) -> None:
        """Takes everything the worker has said so far, without waiting for more. Raises what it says that ends everything."""
        try:
            while self.connection.poll():
                said: _Said = self.connection.recv()
                if said.abort is not None:
                    raise said.abort
                if said.judgement is not None:
                    results[self.owes.popleft()[0]] = said.judgement
                    self.proved = True
                self.ready = True
                self.deadline = time.monotonic() + self.owes[0][1] if self.owes else float("inf")
        except (EOFError, ConnectionResetError):
            self.gone = True

    def kill(self) -> None:
        """The worker has ended, and nothing is left of what it had started for its items."""
        if self.gone:  # its pipe is closed, and it may be about to say why: its traceback and its exit code are worth a wait
            self.process.join(EXIT_S)
        self.process.kill()
        self.process.join()
        self.connection.close()
        for name in sorted(self.swept):
            self.sweeps[name]()


def _trimmed(item: Item) -> Item:
    """Without what no verifier reads: the messages of a repository prompt are a megabyte."""
    return Item(dataclasses.replace(item.prompt, messages=(), tools="", evidence="", provenance=""), item.answer)


class _Round:
    """One list of items on its way through a pool's workers."""

    def __init__(self, pool: Pool, items: Sequence[Item]) -> None:
        self.pool, self.items = pool, items
        self.batch = min(BATCH, max(SMALLEST_BATCH, -(-len(items) // (4 * pool.num_workers))))
        self.waiting: deque[int] = deque(range(len(items)))
        self.results: dict[int, Judgement] = {}
        self.deaths: Counter[int] = Counter()
        self.stillborn = 0

    def run(self, report: Report | None) -> list[Judgement]:
        workers = self.pool.workers
        while len(self.results) < len(self.items):
            self._start_workers()
            for worker in list(workers):
                worker.hear(self.results)
                if worker.gone or time.monotonic() > worker.deadline:
                    workers.remove(worker)
                    self._bury(worker)
                elif worker.ready and worker.idle and self.waiting:
                    batch = [self.waiting.popleft() for _ in range(min(self.batch, len(self.waiting)))]
                    if not worker.give(batch, self.items):
                        self.waiting.extendleft(reversed(batch))
            if report is not None:
                report(Count(len(self.results), len(self.items), "judging"))
            if len(self.results) < len(self.items) and workers:
                _wait(workers)
        return [self.results[index] for index in range(len(self.items))]

    def _start_workers(self) -> None:
        """As many as have a batch to do, those that are idle included, up to the pool's number."""
        workers = self.pool.workers
        idle = sum(worker.idle for worker in workers)
        wanted = min(self.pool.num_workers - len(workers), -(-len(self.waiting) // self.batch) - idle)
        workers += [_Worker(self.pool.verifiers, self.pool.limits_s) for _ in range(wanted)]

    def _bury(self, worker: _Worker) -> None:
        """Ends the worker, blames the item it was at, and gives the others back; that one too, if it may have been chance."""
        worker.kill()
        if not worker.ready and not worker.proved:
            self._bury_stillborn(worker)
        if worker.ready and worker.owes:
            self.deaths[worker.owes[0][0]] += worker.gone
            if not worker.gone or self.deaths[worker.owes[0][0]] == ATTEMPTS:
                self._blame(worker.owes.popleft()[0], CRASHED if worker.gone else TIMED_OUT)
        # One that died idle, between two calls, has not seen what it was handed; its successor has to prove itself.
        self.waiting.extendleft(index for index, _ in reversed(worker.owes))

    def _bury_stillborn(self, worker: _Worker) -> None:
        """Raises StageFailed, unless it was killed and its successor may have better luck."""
        self.stillborn += 1
        code = worker.process.exitcode or 0
        if worker.gone and code < 0 and self.stillborn < ATTEMPTS:
            return
        how = f"did not answer within {START_S:.0f} s"
        if worker.gone:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise StageFailed(f"a verifier worker {how} while it started; its traceback, if any, is on standard error")

    def _blame(self, index: int, judgement: Judgement) -> None:
        self.results[index], prompt = judgement, self.items[index].prompt
        log.warning("verifier %s %s on prompt %s (%s)", prompt.verifier, judgement.reason, prompt.prompt_id, prompt.task)


def _wait(workers: Sequence[_Worker]) -> None:
    """Returns when a worker has said something or died, or when the next deadline is over."""
    until = min(worker.deadline for worker in workers) - time.monotonic()
    wait([worker.connection for worker in workers], None if until == float("inf") else max(0.0, until))


# --- the worker's side -------------------------------------------------------------------------------------------


def _serve(connection: Connection, verifiers: Mapping[str, Verifier]) -> None:
    """Says an empty word when it is there, another once it has imported what a batch needs, then a judgement an item of it, until
    the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    die_with_parent()  # even while an answer hangs; had it died before, the pipe says so
    prepared: set[str] = set()
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)  # a scorer that prints must not end up in the caller's --json line
        try:
            connection.send(_Said())
            while True:
                batch: list[Item] = connection.recv()
                try:
                    _prepare({item.prompt.verifier for item in batch} - prepared, verifiers, prepared)
                except TracestillError as error:
                    connection.send(_Said(abort=error))
                    continue
                connection.send(_Said())
                for prompt, answer in batch:
                    connection.send(_score(verifiers[prompt.verifier], prompt, answer))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _prepare(names: Iterable[str], verifiers: Mapping[str, Verifier], prepared: set[str]) -> None:
    """Imports first, without a bound on memory, so that a tight one hits answers only."""
    _bound(resource.RLIMIT_AS)
    for name in sorted(names):
        if (prepare := verifiers[name].prepare) is not None:
            prepare()
        prepared.add(name)
    _bound(resource.RLIMIT_AS, MEMORY_BYTES)
    _bound(resource.RLIMIT_CORE, 0)


def _bound(what: int, value: int | None = None) -> None:
    """The soft limit is `value`, or as high as the hard one allows."""
    _, hard = resource.getrlimit(what)
    unbounded = resource.RLIM_INFINITY
    resource.setrlimit(what, (hard if value is None else value if hard == unbounded else min(value, hard), hard))


def _score(verifier: Verifier, prompt: Prompt, answer: str) -> _Said:
    try:
        return _Said(from_score(verifier.score(prompt, answer)))
    except TracestillError as error:  # this machine cannot judge: no verdict on any answer
        return _Said(abort=error)
    except TimeoutError:
        return _Said(TIMED_OUT)
    except (Exception, SystemExit):  # a scorer that fails says nothing about the answer
        log.debug("verifier %s raised on prompt %s", prompt.verifier, prompt.prompt_id, exc_info=True)
        return _Said(CRASHED)
