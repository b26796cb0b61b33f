"""The decode loop: slots, refill, lockstep.

A row of the batch is a slot. Rows 0..n-1 are live; a row that finishes is overwritten by the last live one, and new
requests join at the end. Two kinds of forward pass alternate. *Prefill* feeds new rows all but the last token of their
prompts (many tokens a row, right-padded, no result wanted). *Advance* feeds every row one token, first the prompt's
last one, then what it said, and samples the next. So sampling happens in one place.

Several ranks that share one model (ZeRO-3 gathers, expert all-to-alls) must make the same number of top-level forward
passes, whatever each has to do: `any_rank_has_work` is asked before every pass, and a rank without rows of its own
feeds one dummy token until nobody has any left. Otherwise the first rank to finish leaves the others waiting for ever.

Legend: B rows of a pass, S new tokens a row, T cache columns, V vocabulary.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from data.engine import Completion, Request
from data.records import FinishReason
from teacher.cache import SlotCache
from teacher.experts import ExpertWatch
from teacher.sampling import Noise, sample, uniforms

PADDING_ID = 0  # any valid id: padding stands after a row's tokens, where causality hides it, and is overwritten later


class Forward(Protocol):
    """A top-level call of the model. ids_BS, positions_BS: int64. mask_B1ST: bool, True where a token may look (a float
    mask of ones would silently be added to the scores). Returns logits [B, keep, V] of each row's last `keep` tokens."""

    def __call__(self, ids_BS: Tensor, positions_BS: Tensor, mask_B1ST: Tensor, cache: SlotCache | None, keep: int) -> Tensor: ...


class Limits(NamedTuple):
    """num_slots: rows that decode together. max_length: prompt and output tokens a row may hold. refill_slots: free
    rows worth a prefill pass; 1 refills at once. A pass has a fixed price (all of ZeRO-3's gathers), so leaving a
    handful of rows idle for a few steps saves most prefill passes. prefill_tokens: most tokens, padding included, of
    one prefill pass; longer prompts go in several, because the indexer's scores grow with S x T."""

    num_slots: int
    max_length: int
    refill_slots: int = 1
    prefill_tokens: int = 8192


def decode(
    forward: Forward,
    requests: Iterable[Request],
    watch: ExpertWatch,
    cache: SlotCache,
    limits: Limits,
    *,
    banned_V: Tensor | None = None,
    any_rank_has_work: Callable[[bool], bool] = bool,
) -> Iterator[Completion]:
    """Completions as they finish, one per request. Requests are taken in the order given, as slots fall free.

    What a request gets does not depend on that order, on the number of slots or on what other ranks do. A prompt that is
    empty or leaves no room for one output token comes back with finish_reason `abort` and no tokens. banned_V: ids never
    emitted. any_rank_has_work: collective, told whether this rank has work; one process is its own answer.
    """
    batch, source = Batch(forward, watch, cache, limits, banned_V), iter(requests)
    while True:
        if batch.wants_requests:
            yield from batch.admit(source)
        if not any_rank_has_work(bool(batch.rows)):
            return
        if batch.is_loading:
            batch.prefill()
        elif batch.rows:
            yield from batch.advance()
        else:
            batch.idle()


@dataclass(slots=True)
class Row:
    """A live request. `length` counts its tokens whose keys and values are in the cache."""

    request: Request
    length: int
    started_at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def next_input(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.request.prompt_ids[-1]

    def finish_reason(self, max_length: int) -> FinishReason | None:
        if self.token_ids[-1] in self.request.stop_ids:
            return "stop"
        is_full = len(self.token_ids) >= self.request.max_tokens or self.length + 1 >= max_length
        return "length" if is_full else None


class Batch:
    """The live rows and the passes over them. Rows [0, num_ready) decode; the rest still load their prompts."""

    def __init__(self, forward: Forward, watch: ExpertWatch, cache: SlotCache, limits: Limits, banned_V: Tensor | None) -> None:
        self.forward, self.watch, self.cache, self.limits, self.banned_V = forward, watch, cache, limits, banned_V
        self.device = cache.device
        self.rows: list[Row] = []
        self.num_ready = 0
        self.loaded_columns = 0

    @property
    def is_loading(self) -> bool:
        return self.num_ready < len(self.rows)

    @property
    def wants_requests(self) -> bool:
        free = self.limits.num_slots - len(self.rows)
        return not self.rows or (free >= self.limits.refill_slots and not self.is_loading)

    def admit(self, source: Iterator[Request]) -> list[Completion]:
        """Takes requests until the slots are full or there are none left; returns those that cannot be answered."""
        refused: list[Completion] = []
        while len(self.rows) < self.limits.num_slots and (request := next(source, None)) is not None:
            if not 0 < len(request.prompt_ids) < self.limits.max_length or request.max_tokens < 1:
                refused.append(Completion(request.request_id, (), (), "abort", time.time(), 0.0))
            else:
                self.rows.append(Row(request, length=len(request.prompt_ids) - 1))
        self.watch.start(slice(self.num_ready, len(self.rows)))
        if max((row.length for row in self.rows[self.num_ready :]), default=0) == 0:
            self.num_ready = len(self.rows)
        return refused

    def prefill(self) -> None:
        """One pass over the next columns of the loading rows' prompts, the last token of each left out."""
        loading = self.rows[self.num_ready :]
        longest = max(row.length for row in loading)
        start = self.loaded_columns
        stop = min(longest, start + max(1, self.limits.prefill_tokens // len(loading)))
        prompts = [row.request.prompt_ids[start : min(stop, row.length)] for row in loading]
        ids_BS = torch.tensor([prompt + (PADDING_ID,) * (stop - start - len(prompt)) for prompt in prompts], device=self.device)
        positions_S = torch.arange(start, stop, device=self.device)
        mask_ST = torch.arange(stop, device=self.device) <= positions_S[:, None]
        rows = slice(self.num_ready, len(self.rows))
        self.watch.watch(rows, positions_S < torch.tensor([[row.length] for row in loading], device=self.device))
        self.cache.select_span(rows, start, stop)
        self.forward(ids_BS, positions_S.expand_as(ids_BS), mask_ST.expand(len(loading), 1, -1, -1), self.cache, keep=1)
        self.loaded_columns = stop
        if stop == longest:
            self.num_ready, self.loaded_columns = len(self.rows), 0

    def advance(self) -> list[Completion]:
        """One pass that gives every row one more token; returns the rows that it finished."""
        rows = self.rows
        columns = max(row.length for row in rows) + 1
        ids_B1, positions_B1 = self._column([row.next_input for row in rows]), self._column([row.length for row in rows])
        mask_BT = torch.arange(columns, device=self.device) <= positions_B1
        self.watch.watch(slice(0, len(rows)), torch.ones_like(ids_B1, dtype=torch.bool))
        self.cache.select_next(positions_B1, columns)
        logits_BV = self.forward(ids_B1, positions_B1, mask_BT[:, None, None], self.cache, keep=1)[:, -1]
        sampled = sample(logits_BV, self._noise(), self.banned_V)
        ids, logprobs = torch.stack([sampled.ids_B.double(), sampled.logprobs_B]).tolist()  # one transfer a step
        for row, token_id, logprob in zip(rows, ids, logprobs, strict=True):
            row.token_ids.append(int(token_id))
            row.logprobs.append(logprob)
            row.length += 1
        return self._retire(columns)

    def idle(self) -> None:
        """One dummy token, so that other ranks' collectives find this rank present."""
        self.watch.ignore()
        zero_11 = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.forward(zero_11, zero_11, (zero_11 == 0)[None, None], None, keep=1)

    def _column(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)[:, None]

    def _noise(self) -> Noise | None:
        requests = [row.request for row in self.rows]
        if all(request.temperature == 0 for request in requests):
            return None
        temperatures_B, top_p_B = torch.tensor(
            [(r.temperature, r.top_p) for r in requests], dtype=torch.float64, device=self.device
        ).T
        seeds_B, positions_B = torch.tensor([(row.request.seed, len(row.token_ids)) for row in self.rows], device=self.device).T
        takes_all = all(request.top_p >= 1 for request in requests)
        return Noise(temperatures_B, None if takes_all else top_p_B, uniforms(seeds_B, positions_B))

    def _retire(self, columns: int) -> list[Completion]:
        """Finished rows leave; the last live rows move into their places."""
        reasons: dict[int, FinishReason] = {
            slot: reason for slot, row in enumerate(self.rows) if (reason := row.finish_reason(self.limits.max_length))
        }
        if not reasons:
            return []
        done = [self._complete(slot, reason) for slot, reason in reasons.items()]
        num_left = len(self.rows) - len(reasons)
        holes = (slot for slot in reasons if slot < num_left)
        moves = [(slot, next(holes)) for slot in range(num_left, len(self.rows)) if slot not in reasons]
        for source, target in moves:
            self.rows[target] = self.rows[source]
        if moves:
            self.cache.move_rows(moves, columns)
            self.watch.move_rows(moves)
        del self.rows[num_left:]
        self.num_ready = num_left
        return done

    def _complete(self, slot: int, reason: FinishReason) -> Completion:
        row = self.rows[slot]
        seconds = time.perf_counter() - row.started
        load = self.watch.finish(slot, row.request.task)
        return Completion(
            row.request.request_id, tuple(row.token_ids), tuple(row.logprobs), reason, row.started_at, seconds, load
        )
