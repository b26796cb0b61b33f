"""Every request of a run, and which are worth starting first.

Request i asks for sample i % samples of prompt i // samples. All workers compute the same pool from the sealed prompt set,
as arrays: a million requests take about 60 MB, and no prompt's text is in memory before it is asked. Requests are leased
in *units*, single ones in small runs and up to 61 of a million, which are neighbours in task and prompt length. A unit
says who is at what and nothing more: what is done is known by trace_id, and of a unit that was half done by a killed
worker only the missing requests are asked again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from data.columns import words_of
from data.copies import keys_of
from data.prompt_set import PromptIndex
from data.records import trace_keys
from data.store import Segment

MOST_UNITS = 16_384


class Pool:
    """Requests, done and to be done. prompts: the training side of the prompt set. wanted: bool [num_prompts], the prompts
    that are asked now; all when None."""

    def __init__(
        self,
        prompts: PromptIndex,
        *,
        samples: int,
        teacher_fingerprint: str,
        sampling_fingerprint: str,
        wanted: np.ndarray | None = None,
    ) -> None:
        self.prompts, self.samples = prompts, samples
        self.keys_N2 = _keys(prompts, samples, teacher_fingerprint, sampling_fingerprint)
        self.is_done = np.zeros(len(self.keys_N2), dtype=bool)
        if wanted is not None:
            self.is_done |= ~np.repeat(wanted, samples)
        self._by_key = np.argsort(self.keys_N2[:, 0], kind="stable").astype(np.int32)
        self._sorted_keys = self.keys_N2[self._by_key, 0]
        self.tasks = np.repeat(prompts.task_codes_N, samples)
        longest_first = np.lexsort((-np.repeat(prompts.characters_N, samples), self.tasks))
        self.unit_size = -(-len(self.keys_N2) // MOST_UNITS) or 1
        self._order = longest_first.astype(np.int32)
        self._unit_of = np.empty(len(self._order), dtype=np.int32)
        self._unit_of[self._order] = np.arange(len(self._order), dtype=np.int32) // self.unit_size
        self._num_open = np.bincount(self._unit_of[~self.is_done], minlength=self.num_units)
        self._units = _units_by_task(self.tasks[self._order[:: self.unit_size]], len(prompts.tasks))
        self._tokens = np.zeros((len(prompts.tasks), 2))
        """Output tokens and traces of each task, as observed."""

    def __len__(self) -> int:
        return len(self.keys_N2)

    @property
    def num_units(self) -> int:
        return -(-len(self.keys_N2) // self.unit_size)

    @property
    def num_open(self) -> int:
        return int(self._num_open.sum())

    @property
    def num_open_units(self) -> int:
        return int((self._num_open > 0).sum())

    def trace_id(self, request: int) -> str:
        high, low = self.keys_N2[request].tolist()
        return f"{high:016x}{low:016x}"

    def position(self, request: int) -> int:
        """Of its prompt, in the prompt set."""
        return int(self.prompts.positions_N[request // self.samples])

    def find(self, trace_ids: Sequence[str] | str) -> np.ndarray:
        """int64 [n]: the number of each request; -1 for one that this run never asks."""
        keys = keys_of(trace_ids)
        places = np.searchsorted(self._sorted_keys, keys[:, 0])
        found = np.full(len(keys), -1, dtype=np.int64)
        for row, place in enumerate(places.tolist()):
            while place < len(self._by_key) and self._sorted_keys[place] == keys[row, 0]:
                if self.keys_N2[self._by_key[place], 1] == keys[row, 1]:
                    found[row] = self._by_key[place]
                    break
                place += 1  # two keys that share their first 64 bits
        return found

    def add(self, segment: Segment, *, asks_aborted_again: bool = False) -> int:
        """What a committed segment did is done, and counted for what its tasks take. Returns how many of its traces this run
        never asks."""
        facts = segment.facts
        requests = self.find(facts["trace_ids"])
        known = requests >= 0
        tokens = np.asarray(facts["output_tokens"], dtype=np.float64)
        done = known.copy()
        if asks_aborted_again:
            done &= np.array([reason != "abort" for reason in words_of(facts["finish_reasons"])], dtype=bool)
        np.add.at(self._tokens[:, 0], self.tasks[requests[known]], tokens[known])
        np.add.at(self._tokens[:, 1], self.tasks[requests[known]], 1)
        self.finish(requests[done])
        return int((~known).sum())

    def finish(self, requests: np.ndarray) -> None:
        """These need not be asked any more."""
        new = np.unique(requests[~self.is_done[requests]])
        self.is_done[new] = True
        np.subtract.at(self._num_open, self._unit_of[new], 1)

    def unit_of(self, request: int) -> int:
        return int(self._unit_of[request])

    def open_requests(self, unit: int) -> list[int]:
        members = self._order[unit * self.unit_size : (unit + 1) * self.unit_size]
        return members[~self.is_done[members]].tolist()

    def expected_tokens(self) -> np.ndarray:
        """float64 [num_tasks]: mean output tokens as observed. Of a task not seen yet the longest are expected, so that
        surprises come early."""
        tokens, traces = self._tokens.T
        means = np.divide(tokens, traces, out=np.full(len(tokens), -1.0), where=traces > 0)
        return np.where(traces > 0, means, means.max(initial=0.0) + 1.0)

    def next_units(self, is_free: Callable[[int], bool], first: Iterable[int] = ()) -> Iterator[int]:
        """Open units that are free, longest expected first: by what their task takes, then by prompt length. `first`: units
        that go before all others, because something of them has been said already."""
        given = set[int]()
        for unit in first:
            if self._num_open[unit] and is_free(unit) and unit not in given:
                given.add(unit)
                yield unit
        for task in np.argsort(-self.expected_tokens(), kind="stable").tolist():
            for unit in self._units[task].open(self._num_open):
                if unit not in given and is_free(unit):
                    yield unit


class _Units:
    """Of one task, in order of length. Those that are done at its head are never looked at again."""

    def __init__(self, units: np.ndarray) -> None:
        self.units, self.head = units, 0

    def open(self, num_open: np.ndarray) -> Iterator[int]:
        while self.head < len(self.units) and not num_open[self.units[self.head]]:
            self.head += 1
        for unit in self.units[self.head :]:
            if num_open[unit]:
                yield int(unit)


def _units_by_task(task_of_unit: np.ndarray, num_tasks: int) -> list[_Units]:
    return [_Units(np.flatnonzero(task_of_unit == task)) for task in range(num_tasks)]


def _keys(prompts: PromptIndex, samples: int, teacher_fingerprint: str, sampling_fingerprint: str) -> np.ndarray:
    """uint64 [N, 2]: identity of every request."""
    content = bytearray()
    for row in range(len(prompts)):
        content += trace_keys(prompts.prompt_id(row), samples, teacher_fingerprint, sampling_fingerprint)
    return np.frombuffer(bytes(content), ">u8").astype(np.uint64).reshape(-1, 2)
