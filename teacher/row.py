"""One live request: what is in the cache of it, what it has said, and when it is done."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from data.engine import Completion, ExpertLoad, LoopGuard, Partial, Request, TopLogits
from data.records import FinishReason
from teacher.sampling import Best

Detokenize = Callable[[Sequence[int]], str]
LOOP_CHECK_TOKENS = 32  # the guard looks this often, at fixed positions of the output: neighbours cannot move them
HEADROOM = 128  # columns beyond its present length that a row is admitted with, or it would be sent back at once


@dataclass(slots=True)
class Row:
    """context: prompt and the output that it was admitted with. length: its tokens whose keys and values are in the cache;
    it is ready when only the last one is missing, which the next decode step feeds."""

    request: Request
    context: tuple[int, ...]
    token_ids: list[int]
    logprobs: list[float]
    length: int = 0
    best: list[Best] = field(default_factory=list)
    started_at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, request: Request) -> "Row":
        context = request.prompt_ids + request.prefix_ids
        return cls(request, context, list(request.prefix_ids), list(request.prefix_logprobs))

    def start_over(self) -> "Row":
        """The row without its part of the cache: what it has said is kept, and read back with the prompt."""
        self.context, self.length = self.request.prompt_ids + tuple(self.token_ids), 0
        return self

    @property
    def to_load(self) -> int:
        return len(self.context) - 1

    @property
    def is_ready(self) -> bool:
        return self.length >= self.to_load

    @property
    def next_input(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.request.prompt_ids[-1]

    @property
    def must_end_reasoning(self) -> bool:
        """The next token is the last of the budget for reasoning, and its block is still open."""
        request = self.request
        return 0 < request.reasoning_budget == len(self.token_ids) + 1 and request.reasoning_end not in self.token_ids

    def reach(self, max_length: int) -> int:
        """Columns that it needs within the next HEADROOM steps."""
        now = max(self.length, self.to_load) + 1
        return min(now + HEADROOM, max(now, len(self.request.prompt_ids) + self.request.max_tokens), max_length)

    def say(self, token_id: int, logprob: float) -> None:
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.length += 1

    def finish_reason(self, max_length: int, detokenize: Detokenize | None) -> FinishReason | None:
        request, said = self.request, self.token_ids
        if not said:
            return None
        if len(said) >= request.min_tokens:
            if said[-1] in request.stop_ids:
                return "stop"
            if request.stop_strings and ends_with_stop_string(said, request.stop_strings, detokenize):
                return "stop"
        guard = request.loop_guard
        if guard is not None and len(said) % LOOP_CHECK_TOKENS == 0 and is_looping(said, guard):
            return "loop"
        is_full = len(said) >= request.max_tokens or len(request.prompt_ids) + len(said) >= max_length
        return "length" if is_full else None

    def partial(self) -> Partial:
        if len(self.best) > 1:  # merged once, not at every checkpoint again from single tokens
            self.best = [Best(*(torch.cat(column) for column in zip(*self.best, strict=True)))]
        return Partial(self.request.request_id, tuple(self.token_ids), tuple(self.logprobs), stack(self.best))

    def complete(self, reason: FinishReason, load: ExpertLoad | None = None) -> Completion:
        seconds = time.perf_counter() - self.started
        ids, logprobs = tuple(self.token_ids), tuple(self.logprobs)
        return Completion(self.request.request_id, ids, logprobs, reason, self.started_at, seconds, load, stack(self.best))


def ends_with_stop_string(said: Sequence[int], stop_strings: Sequence[str], detokenize: Detokenize | None) -> bool:
    """True when the newest token completes a stop string in the text. Only a tail is decoded: a character takes at most
    four byte-level tokens."""
    assert detokenize is not None, "stop strings need the model's tokenizer"
    tail = said[-4 * (max(map(len, stop_strings)) + 1) :]
    text = detokenize(tail)
    if not any(stop in text for stop in stop_strings):
        return False
    before = detokenize(tail[:-1])
    return any(_endings(text, stop) > _endings(before, stop) for stop in stop_strings)


def _endings(text: str, stop: str) -> int:
    """Occurrences, overlapping ones too: one that was complete before min_tokens does not hide the next."""
    return sum(text.startswith(stop, start) for start in range(len(text)))


def is_looping(said: Sequence[int], guard: LoopGuard) -> bool:
    """True when the end of the output is one cycle, repeated: shifted by the cycle's period the end equals itself."""
    for period in range(1, guard.longest_period + 1):
        span = period * guard.repeats
        if len(said) < span:
            return False
        if said[-1] == said[-1 - period] and said[-span:-period] == said[-span + period :]:
            return True
    return False


def stack(best: Sequence[Best]) -> TopLogits | None:
    """Blocks of tokens [n, K], in order, as one."""
    if not best:
        return None
    ids, logits, log_z = (torch.cat(column).numpy() for column in zip(*best, strict=True))
    return TopLogits(ids, logits, log_z)
