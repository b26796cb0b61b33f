"""What this worker asks next: claimed, seen to be still undone, and with what an earlier holder had of it."""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from configs.errors import UnusableInput
from data.journal import Estate, Salvage
from data.records import Prompt
from data.store import SegmentLog
from data.work import Leases, ages
from generate.pool import Pool

QUICK_S = 0.25
"""Claims of less work than this are worth making larger: each lists two folders, which takes milliseconds."""
MOST_UNITS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Ask:
    """One (prompt, sample) that is ours to answer. attempt: 1, and one more for each earlier holder of its lease."""

    request: int
    trace_id: str
    prompt: Prompt
    sample_index: int
    unit: int
    attempt: int
    salvage: Salvage | None = None


class Claims:
    """Asks for as long as there are any, in the pool's order. read_prompts: the prompts at these
    positions of the prompt set. cost_committed (dollars), tokens_committed: of all workers, superseded copies too."""

    def __init__(
        self,
        pool: Pool,
        log: SegmentLog,
        leases: Leases,
        read_prompts: Callable[[Sequence[int]], list[Prompt]],
        *,
        may_admit: Callable[[], bool],
        asks_aborted_again: bool = False,
    ) -> None:
        self.pool, self.log, self.leases, self.read_prompts, self.may_admit = pool, log, leases, read_prompts, may_admit
        self.estate = Estate(leases.worker.folder.journal)
        self.queue: deque[Ask] = deque()
        self.unfinished: Counter[int] = Counter()
        """Unit -> requests of it that are ours and not committed."""
        self._at_once, self._claimed_at = 1, -float("inf")
        self.cost_committed, self.tokens_committed = 0.0, 0
        self.catch_up(asks_aborted_again=asks_aborted_again)

    def catch_up(self, *, asks_aborted_again: bool = False) -> None:
        """What others have committed is done. Raises UnusableInput for traces that this recipe would never ask for."""
        self._caught_up_at = time.monotonic()
        for segment in self.log.look():
            self.cost_committed += float(segment.facts.get("cost", 0.0))
            self.tokens_committed += sum(segment.facts["output_tokens"])
            if strangers := self.pool.add(segment, asks_aborted_again=asks_aborted_again):
                raise UnusableInput(
                    f"{self.log.folder}: {strangers} of {segment.rows} traces of segment {segment.path.stem} belong to another "
                    "teacher, sampling or prompt set; use another --run-dir"
                )

    def next(self) -> Ask | None:
        """None when nothing is left that nobody is at, or nothing more may be asked: then what is claimed and not asked is
        free for others."""
        while self.may_admit():
            if time.monotonic() - self._caught_up_at > self.leases.worker.ttl_s:
                self.catch_up()  # we may have been stopped for so long that others took over what is queued
            while self.queue:
                ask = self.queue.popleft()
                if not self.pool.is_done[ask.request]:
                    return self._with_salvage(ask)
                self._let_go(ask.unit)
            if not self._claim_more():
                return None
        self._give_back()
        return None

    def _with_salvage(self, ask: Ask) -> Ask:
        """Read only now: long outputs with their logits are a hundred megabytes each, and a claim may be of many."""
        salvage = self.estate.take(ask.trace_id)
        if salvage is None:
            return ask
        return replace(ask, salvage=salvage, attempt=max(ask.attempt, 2))  # a holder that ended in order has freed its lease

    def _give_back(self) -> None:
        while self.queue:
            self._let_go(self.queue.popleft().unit)

    def _claim_more(self) -> bool:
        """Whether something was claimed. It may turn out to be done: a claim comes before the look at what is done, so that
        nothing that was committed before it is asked again."""
        try:
            now = self.leases.worker.renew()
        except FileNotFoundError:  # we stood still until the others had ended, sealed and cleared up
            return False
        self.leases.look()
        living = {name for name, age in ages(self.leases.worker.folder, now).items() if self._lives(age)}
        self.estate.look(living)
        units = self._claim(self._num_wanted(len(living)))
        self.catch_up()
        self._queue_up(units)
        return bool(units)

    def _lives(self, age: float) -> bool:
        return age <= self.leases.worker.ttl_s

    def _num_wanted(self, num_workers: int) -> int:
        """Twice as many as last time when those lasted for a moment only, but never so many that others go without."""
        now = time.monotonic()
        quick = now - self._claimed_at < QUICK_S
        self._at_once, self._claimed_at = min(self._at_once * 2, MOST_UNITS_AT_ONCE) if quick else max(1, self._at_once // 2), now
        return max(1, min(self._at_once, self.pool.num_open_units // (4 * max(1, num_workers))))

    def _claim(self, wanted: int) -> list[int]:
        claimed: list[int] = []
        for unit in self.pool.next_units(self.leases.is_free, self._begun_units()):
            if self.leases.claim(unit):
                claimed.append(unit)
            if len(claimed) == wanted:
                break
        return claimed

    def _begun_units(self) -> list[int]:
        """Those of which a worker that is gone had something in hand."""
        trace_ids = self.estate.trace_ids
        requests = self.pool.find(trace_ids)
        is_open = (requests >= 0) & ~self.pool.is_done[requests]
        for place in np.flatnonzero(~is_open).tolist():
            self.estate.forget(trace_ids[place])
        return sorted({self.pool.unit_of(request) for request in requests[is_open].tolist()})

    def _queue_up(self, units: Sequence[int]) -> None:
        """Their prompts are read together: units of single requests are neighbours in the file, and a read has its price."""
        requests_of = {unit: self.pool.open_requests(unit) for unit in units}
        positions = [self.pool.position(request) for requests in requests_of.values() for request in requests]
        prompts = iter(self.read_prompts(positions))
        for unit, requests in requests_of.items():
            if not requests:
                self.leases.release(unit)
                continue
            self.unfinished[unit] = len(requests)
            samples, attempt = self.pool.samples, self.leases.mine[unit] + 1
            for request in requests:
                self.queue.append(Ask(request, self.pool.trace_id(request), next(prompts), request % samples, unit, attempt))

    def committed(self, asks: Sequence[Ask]) -> None:
        """Their traces are durable: nobody needs their leases."""
        self.catch_up()
        self.pool.finish(np.array([ask.request for ask in asks], dtype=np.int64))
        for ask in asks:
            self._let_go(ask.unit)

    def _let_go(self, unit: int) -> None:
        """Of one more request of the unit; the last one frees it."""
        self.unfinished[unit] -= 1
        if not self.unfinished[unit]:
            del self.unfinished[unit]
            self.leases.release(unit)
