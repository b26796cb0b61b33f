"""The decode loop: slots, refill, lockstep.

A row of the batch is a slot. Ready rows stand first, rows that still load their prompts behind them; a row that finishes
is overwritten by the last of its kind, and new requests join at the end. Two kinds of forward pass alternate. *Prefill*
feeds the loading rows the next chunk of all but the last token of their prompts (right-padded, no result wanted).
*Advance* feeds every ready row one token, first the prompt's last one, then what it said, and samples the next. So
sampling happens in one place, and a long prompt never holds up rows that are already speaking.

When the cache's budget is short, rows go back to the queue with what they have said and are read in again later: noise
knows only (request seed, output position), so they go on as they would have.

Several ranks that share one model (ZeRO-3 gathers, expert all-to-alls) must make the same number of top-level forward
passes, whatever each has to do: they agree before every pass on whether to go on, and a rank without rows of its own
feeds one dummy token until nobody has any left. Otherwise the first rank to finish leaves the others waiting for ever.

Legend: B rows of a pass, S new tokens a row, T cache columns, V vocabulary.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from configs.errors import TracestillError, UnusableInput
from data.engine import Completion, Handout, Request
from data.records import FinishReason
from teacher.admission import rectangle
from teacher.cache import SlotCache
from teacher.experts import ExpertWatch
from teacher.row import Detokenize, Row
from teacher.sampling import Best, Noise, Pairs, Truncation, best_logits, sample, uniforms

log = logging.getLogger(__name__)

PADDING_ID = 0  # any valid id: padding stands after a row's tokens, where causality hides it, and is overwritten later


class Forward(Protocol):
    """A top-level call of the model. ids_BS, positions_BS: int64. mask_B1ST: bool, True where a token may look (a float
    mask of ones would silently be added to the scores). Returns logits [B, keep, V] of each row's last `keep` tokens."""

    def __call__(self, ids_BS: Tensor, positions_BS: Tensor, mask_B1ST: Tensor, cache: SlotCache | None, keep: int) -> Tensor: ...


class Limits(NamedTuple):
    """num_slots: rows that decode together. max_length: prompt and output tokens a row may hold. cache_tokens: slots x
    columns that the cache may take, None for as much as it likes. refill_idle: steps that slots have stood free, summed over
    them, before a prefill pass is worth its price (which is nearly a step's: all of ZeRO-3's gathers); 1 refills at once.
    Where rows end every step that saves most prefill passes, where one ends in a hundred it costs nothing. prefill_tokens,
    prefill_pairs: most tokens, and most (token, column) pairs, of one prefill pass, padding included: its mask has a byte for
    each pair, and its activations grow with the tokens."""

    num_slots: int
    max_length: int
    cache_tokens: int | None = None
    refill_idle: int = 1
    prefill_tokens: int = 8192
    prefill_pairs: int = 1 << 30


class NotNumbers(TracestillError):
    """Logits that are NaN: damaged weights, or an overflow."""


def as_it_is(sampled: Tensor) -> Tensor:
    return sampled


class Agreed(IntEnum):
    """What a rank would do next, and what all do: the largest of what they say."""

    DONE = 0
    WORK = 1
    STOP = 2


def decode(
    forward: Forward,
    requests: Iterable[Request],
    watch: ExpertWatch,
    cache: SlotCache,
    limits: Limits,
    *,
    banned_V: Tensor | None = None,
    detokenize: Detokenize | None = None,
    handout: Handout | None = None,
    agree: Callable[[int], int] = int,
    share: Callable[[Tensor], Tensor] = as_it_is,
) -> Iterator[Completion]:
    """Completions as they finish, one per request. Requests are taken in the order given, as slots fall free.

    What a request gets does not depend on that order, on the number of slots, on the cache's budget or on what other
    ranks do. A prompt that is empty or leaves no room for one output token comes back with finish_reason `abort` and no
    tokens. banned_V: ids never emitted. detokenize: for stop strings. handout: unfinished outputs, and the wish to stop.
    agree: collective, gives all ranks the largest of their answers; one process is its own answer. share: gives ranks that
    answer the same requests together what the first of them has sampled, or one rounding apart they would part for ever.

    Raises:
        UnusableInput: a request that the cache's budget could not hold at its longest.
        NotNumbers: the model's logits are not; nothing is said then.
    """
    handout = handout or Handout()
    batch = Batch(forward, requests, watch, cache, limits, banned_V, detokenize, handout, share)
    while True:
        if batch.wants_requests:
            yield from batch.admit()
        match agree(Agreed.STOP if handout.stop() else Agreed.WORK if batch.rows else Agreed.DONE):
            case Agreed.DONE:
                return
            case Agreed.STOP:
                batch.hand_out()
                handout.stopped()
                return
        batch.settle()
        if batch.loads_next:
            batch.prefill()
        elif batch.rows:
            yield from batch.advance()
        else:
            batch.idle()


class Batch:
    """The live rows and the passes over them. Rows [0, num_ready) decode; the rest load their prompts, all at the same
    column."""

    def __init__(
        self, forward: Forward, requests: Iterable[Request], watch: ExpertWatch, cache: SlotCache, limits: Limits,
        banned_V: Tensor | None, detokenize: Detokenize | None, handout: Handout, share: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        self.forward, self.watch, self.cache, self.share = forward, watch, cache, share
        self.limits, self.banned_V, self.detokenize, self.handout = limits, banned_V, detokenize, handout
        self.max_length, self.device = limits.max_length, cache.device
        self.source = map(Row.of, requests)
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []
        self.num_ready = 0
        self.idle_steps = 0
        self.has_just_loaded = False

    # --- who is in ---

    @property
    def wants_requests(self) -> bool:
        return not self.rows or (self.idle_steps >= self.limits.refill_idle and self.num_ready == len(self.rows))

    def admit(self) -> list[Completion]:
        """Takes rows until the slots or the budget are full or there are none left; returns those that need no pass."""
        done: list[Completion] = []
        first, self.idle_steps = len(self.rows), 0
        while len(self.rows) < self.limits.num_slots and (row := self._next_row()) is not None:
            if (completion := self._answer_at_once(row)) is not None:
                done.append(completion)
            elif self._make_room([*self.rows, row], max(one.reach(self.max_length) for one in [*self.rows, row])):
                self.rows.append(row)
            else:
                self.waiting.appendleft(row)
                break
        self.watch.start(slice(first, len(self.rows)))
        self._put_ready_first()
        return done

    def _next_row(self) -> Row | None:
        return self.waiting.popleft() if self.waiting else next(self.source, None)

    def _answer_at_once(self, row: Row) -> Completion | None:
        """Of a request that cannot be answered, or whose prefix is already all of the answer."""
        request = row.request
        if not 0 < len(request.prompt_ids) < self.max_length or request.max_tokens < 1:
            length, most, said = (
                len(request.prompt_ids),
                self.max_length - 1,
                "request %s: a prompt of %d tokens, expected 1 to %d",
            )
            if 0 < length <= most:
                log.warning("request %s: max_tokens %d, expected at least 1", request.request_id, request.max_tokens)
            else:
                log.warning(said, request.request_id, length, most)
            return Completion(request.request_id, (), (), "abort", time.time(), 0.0, error="no_room")
        longest, budget = min(len(request.prompt_ids) + request.max_tokens, self.max_length), self.limits.cache_tokens
        if budget is not None and longest > budget:
            raise UnusableInput(
                f"request {request.request_id}: prompt and max_tokens may take {longest} tokens of cache, the budget holds "
                f"{budget}; raise teacher.engine.cache_bytes, lower sampling.max_tokens, or take a layout that leaves more "
                "(tracestill plan)"
            )
        reason = row.finish_reason(self.max_length, self.detokenize)
        return None if reason is None else row.complete(reason)

    def _make_room(self, rows: Sequence[Row], columns: int) -> bool:
        """The cache holds `columns` of as many rows, or, when the budget cannot, nothing has changed."""
        if len(rows) > self.cache.num_slots or columns > self.cache.num_columns:
            shape = rectangle(len(rows), columns, num_slots=self.limits.num_slots, cache_tokens=self.limits.cache_tokens)
            if shape is None:
                return False
            self.cache.reserve(shape)
        return True

    def settle(self) -> None:
        """Sends rows back until the cache can take the next pass."""
        while self.rows and not self._make_room(self.rows, max(max(row.length, row.to_load) for row in self.rows) + 1):
            self._send_back()

    # --- the three passes ---

    @property
    def loads_next(self) -> bool:
        """Chunks of prompts and decode steps take turns."""
        return self.num_ready < len(self.rows) and not (self.has_just_loaded and self.num_ready > 0)

    def prefill(self) -> None:
        """One pass over the next columns of the loading rows' prompts, the last token of each left out."""
        loading = self.rows[self.num_ready :]
        start, longest = loading[0].length, max(row.to_load for row in loading)
        chunk = min(self.limits.prefill_tokens, self.limits.prefill_pairs // longest) // len(loading)
        stop = min(longest, start + max(1, chunk))
        prompts = [row.context[start : min(stop, row.to_load)] for row in loading]
        ids_BS = torch.tensor([prompt + (PADDING_ID,) * (stop - start - len(prompt)) for prompt in prompts], device=self.device)
        positions_S = torch.arange(start, stop, device=self.device)
        mask_ST = torch.arange(stop, device=self.device) <= positions_S[:, None]
        rows = slice(self.num_ready, len(self.rows))
        self.watch.watch(rows, positions_S < self._column([row.to_load for row in loading]))
        self.cache.select_span(rows, start, stop)
        self.forward(ids_BS, positions_S.expand_as(ids_BS), mask_ST.expand(len(loading), 1, -1, -1), self.cache, keep=1)
        for row in loading:
            row.length = min(stop, row.to_load)
        self._put_ready_first()
        self.has_just_loaded = True

    def advance(self) -> list[Completion]:
        """One pass that gives every ready row one more token; returns the rows that it finished."""
        rows = self.rows[: self.num_ready]
        ids_B1, positions_B1 = self._column([row.next_input for row in rows]), self._column([row.length for row in rows])
        columns = max(row.length for row in rows) + 1
        mask_BT = torch.arange(columns, device=self.device) <= positions_B1
        self.watch.watch(slice(0, len(rows)), torch.ones_like(ids_B1, dtype=torch.bool))
        self.cache.select_next(positions_B1, columns)
        logits_BV = self.forward(ids_B1, positions_B1, mask_BT[:, None, None], self.cache, keep=1)[:, -1]
        sampled = sample(logits_BV, self._noise(rows), self.banned_V, self._forbidden(rows), self._forced(rows))
        ids, logprobs = self.share(torch.stack([sampled.ids_B.double(), sampled.logprobs_B])).tolist()  # one transfer a step
        if any(map(math.isnan, logprobs)):
            raise NotNumbers(
                f"the teacher's logits are not numbers for {sum(map(math.isnan, logprobs))} of {len(rows)} rows; "
                "check the weights and the dtype"
            )
        for row, token_id, logprob in zip(rows, ids, logprobs, strict=True):
            row.say(int(token_id), logprob)
        self._keep_best(rows, logits_BV)
        self._hand_out_some(rows)
        self.has_just_loaded = False
        done = self._retire()
        self.idle_steps += self.limits.num_slots - len(self.rows)
        return done

    def idle(self) -> None:
        self.watch.ignore()
        dummy_pass(self.forward, self.device)

    # --- what the rows ask of the sampler ---

    def _column(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)[:, None]

    def _noise(self, rows: Sequence[Row]) -> Noise | None:
        requests = [row.request for row in rows]
        if all(request.temperature == 0 for request in requests):
            return None
        temperatures_B, top_p_B, min_p_B = torch.tensor(
            [(r.temperature, r.top_p, r.min_p) for r in requests], dtype=torch.float64, device=self.device
        ).T
        seeds_B, positions_B, top_k_B = torch.tensor(
            [(row.request.seed, len(row.token_ids), row.request.top_k) for row in rows], device=self.device
        ).T
        takes_all = all(r.top_p >= 1 and r.top_k == 0 and r.min_p == 0 for r in requests)
        truncation = None if takes_all else Truncation(top_p_B, top_k_B, min_p_B)
        return Noise(temperatures_B, truncation, uniforms(seeds_B, positions_B))

    def _pairs(self, pairs: list[tuple[int, int]]) -> Pairs | None:
        return Pairs(*torch.tensor(pairs, device=self.device).T) if pairs else None

    def _forbidden(self, rows: Sequence[Row]) -> Pairs | None:
        """Stop ids of the rows that have not said min_tokens yet."""
        young = [(slot, row.request) for slot, row in enumerate(rows) if len(row.token_ids) + 1 < row.request.min_tokens]
        return self._pairs([(slot, token_id) for slot, request in young for token_id in request.stop_ids])

    def _forced(self, rows: Sequence[Row]) -> Pairs | None:
        """The end of the reasoning of rows whose budget for it is spent."""
        return self._pairs([(slot, row.request.reasoning_end) for slot, row in enumerate(rows) if row.must_end_reasoning])

    def _keep_best(self, rows: Sequence[Row], logits_BV: Tensor) -> None:
        asking = [(slot, row) for slot, row in enumerate(rows) if row.request.top_logits]
        if not asking:
            return
        temperatures = sorted({temperature for _, row in asking for temperature in row.request.log_z_temperatures})
        most = max(row.request.top_logits for _, row in asking)
        best = Best(*(column.cpu() for column in best_logits(logits_BV, most, temperatures)))
        for slot, row in asking:
            count, wanted = row.request.top_logits, [temperatures.index(one) for one in row.request.log_z_temperatures]
            one = slice(slot, slot + 1)
            kept = (best.ids_BK[one, :count], best.logits_BK[one, :count], best.log_z_BC[one, wanted])
            row.best.append(Best(*(column.clone() for column in kept)))  # a view would keep all its neighbours' too

    # --- who is out ---

    def hand_out(self) -> None:
        """Every output that is begun and not finished."""
        for row in [*self.rows, *self.waiting]:
            self.handout.take(row.partial())

    def _hand_out_some(self, rows: Sequence[Row]) -> None:
        every = self.handout.every_tokens
        for row in rows if every else ():
            if len(row.token_ids) % every == 0:
                self.handout.take(row.partial())

    def _retire(self) -> list[Completion]:
        """Finished rows leave; others move into their places."""
        reasons: dict[int, FinishReason] = {
            slot: reason
            for slot, row in enumerate(self.rows[: self.num_ready])
            if (reason := row.finish_reason(self.max_length, self.detokenize))
        }
        tasks = [row.request.task for row in self.rows]
        done = [self.rows[slot].complete(reason, self.watch.finish(slot, tasks[slot])) for slot, reason in reasons.items()]
        self._keep([slot for slot in range(len(self.rows)) if slot not in reasons])
        return done

    def _send_back(self) -> None:
        """The row that is quickest to read in again leaves; it will be the first to come back."""
        slot = min(range(len(self.rows)), key=lambda slot: self.rows[slot].length)
        row = self.rows[slot]
        self._keep([other for other in range(len(self.rows)) if other != slot])
        self.waiting.appendleft(row.start_over())

    def _keep(self, slots: Sequence[int]) -> None:
        ready = [slot for slot in slots if slot < self.num_ready]
        loading = [slot for slot in slots if slot >= self.num_ready]
        self._arrange(compacted(ready, 0) + compacted(loading, len(ready)), len(ready))

    def _put_ready_first(self) -> None:
        joined = range(self.num_ready, len(self.rows))
        ready = [slot for slot in joined if self.rows[slot].is_ready]
        loading = [slot for slot in joined if not self.rows[slot].is_ready]
        num_ready = self.num_ready + len(ready)
        self._arrange([*range(self.num_ready), *compacted(ready, self.num_ready), *compacted(loading, num_ready)], num_ready)

    def _arrange(self, order: Sequence[int], num_ready: int) -> None:
        """Row order[i] becomes row i, in the cache and in the expert counts too."""
        moves = [(old, new) for new, old in enumerate(order) if old != new]
        if moves:
            if columns := max(self.rows[old].length for old, _ in moves):  # rows that join hold nothing yet
                self.cache.move_rows(moves, columns)
            self.watch.move_rows(moves)
        self.rows = [self.rows[old] for old in order]
        self.num_ready = num_ready


def dummy_pass(forward: Forward, device: torch.device, cache: SlotCache | None = None) -> None:
    """One token of nobody's, so that other ranks' collectives find this rank present."""
    zero_11 = torch.zeros(1, 1, dtype=torch.long, device=device)
    forward(zero_11, zero_11, (zero_11 == 0)[None, None], cache, keep=1)


def compacted(slots: Sequence[int], first: int) -> list[int]:
    """`slots` in an order that fills the places first, first + 1, ... and moves as few of them as possible."""
    places = range(first, first + len(slots))
    movers = iter([slot for slot in slots if slot not in places])
    staying = set(slots)
    return [place if place in staying else next(movers) for place in places]
