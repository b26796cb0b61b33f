"""The seam between whoever needs text (generation, evaluation, judges) and whatever model writes it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from configs.sampling import Sampling
from configs.schema import KeptLogits
from data.records import FinishReason, Message


class LoopGuard(NamedTuple):
    """Ends an output whose last `repeats` x period tokens are one cycle of at most `longest_period` tokens."""

    longest_period: int = 128
    repeats: int = 16


@dataclass(frozen=True, slots=True)
class Request:
    """One completion asked for.

    prompt_ids: the rendered prompt, generation prompt included. stop_ids: any of them ends the output; stop_strings: so
    does any of these in its text; neither before min_tokens output tokens. seed: 63 bits; noise at output position i
    depends on (seed, i) alone. temperature 0 is greedy; top_k 0 and min_p 0 are off. messages, tools: the same prompt as
    chat turns, and its tool schemas as JSON text, for engines that own the template (http). task: label under which expert
    load is counted.

    prefix_ids, prefix_logprobs: output of an earlier attempt that was handed out. It counts against max_tokens, the
    noise goes on at its end, and the completion holds it. top_logits: keep that many best logits of every new token,
    with log Z at each of log_z_temperatures. prompt_version: name and content hash of the prompt's template, told to
    servers in a header. reasoning_budget: output tokens by which the reasoning block is closed, `reasoning_end` (the id of
    its closing tag) being the last of them; 0 is no bound.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    messages: tuple[Message, ...] = ()
    task: str = ""
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    loop_guard: LoopGuard | None = None
    prefix_ids: tuple[int, ...] = ()
    prefix_logprobs: tuple[float, ...] = ()
    top_logits: int = 0
    log_z_temperatures: tuple[float, ...] = (1.0,)
    prompt_version: str = ""
    tools: str = ""
    reasoning_budget: int = 0
    reasoning_end: int = -1


def request_under(
    sampling: Sampling,
    *,
    request_id: str,
    prompt_ids: Sequence[int],
    stop_ids: tuple[int, ...],
    seed: int,
    messages: tuple[Message, ...] = (),
    task: str = "",
    logits: KeptLogits | None = None,
) -> Request:
    """A request under a recipe's sampling section, all of it."""
    guard = sampling.loop_guard
    return Request(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        stop_ids=stop_ids,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        messages=messages,
        task=task,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        min_tokens=sampling.min_tokens,
        stop_strings=sampling.stop_strings,
        loop_guard=None if guard is None else LoopGuard(guard.longest_period, guard.repeats),
        top_logits=0 if logits is None else logits.top_k,
        log_z_temperatures=(1.0,) if logits is None else logits.temperatures,
    )


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """How one request's tokens spread over the routed experts, averaged over sparse layers.

    max_over_mean: 1 is even. entropy: exp(H) / E in (0, 1]. hottest: (layer, expert) pairs, busiest first.
    """

    max_over_mean: float
    entropy: float
    hottest: tuple[tuple[int, int], ...]


class TopLogits(NamedTuple):
    """The best logits of T tokens, for distillation. ids_TK: int32, likeliest first. logits_TK: float32, as the model
    gave them. log_z_TC: float64, log sum exp(logits / temperature) over the whole vocabulary, a column for each of the
    request's temperatures: log p = logit / temperature - log z."""

    ids_TK: np.ndarray
    logits_TK: np.ndarray
    log_z_TC: np.ndarray


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back. token_ids end with the stop token when finish_reason is `stop`; logprobs has one natural log
    per id, under the unmodified (temperature 1, no top-p) distribution, or nothing where an engine has none. seconds:
    admission to last token. top: of the tokens after the request's prefix. error: why it is an `abort`, in one countable
    word (`busy`, `timed_out`, `bad_reply`); "" for every other reason to end. cost: dollars, where the engine knows. exact:
    the ids are the model's own, not a second tokenisation of its text."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    started_at: float
    seconds: float
    expert_load: ExpertLoad | None = None
    top: TopLogits | None = None
    error: str = ""
    cost: float = 0.0
    exact: bool = True

    @property
    def may_continue(self) -> bool:
        """What was said is a beginning that the model can be asked to go on from. The last ids of a text that was torn need not
        be the model's; those of one that was to end there are its tokens, or spell the same."""
        return bool(self.token_ids) and (self.error == "unfinished" or (self.error == "torn" and self.exact))


class Partial(NamedTuple):
    """The output of a request so far; prefix_ids and prefix_logprobs of one that continues it. top: of the tokens after
    the prefix that the request itself came with."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: TopLogits | None = None


def _nobody(partial: Partial) -> None: ...


def _unkept(request_id: str, raw: bytes) -> None: ...


def _never() -> bool:
    return False


def _nothing() -> None: ...


@dataclass(frozen=True, slots=True)
class Handout:
    """How a caller gets at outputs that are not finished. take: called with each live output every `every_tokens` of
    its tokens (0: never), and once more when `stop` first answers True: then `generate` ends on all ranks, after the
    same forward pass, with nothing more than its partial outputs lost. keep: called with a request's id and what a server
    returned for it, byte for byte, before anything parses that. stopped: called on every rank when that of any one of them
    has ended `generate`. All run in the loop: keep them short."""

    every_tokens: int = 0
    take: Callable[[Partial], None] = _nobody
    stop: Callable[[], bool] = _never
    keep: Callable[[str, bytes], None] = _unkept
    stopped: Callable[[], None] = _nothing


class Source(Iterator[Request]):
    """Requests as `take` comes by them. Its None ends the iteration for now only: an engine asks again while it has others to
    answer, because a worker that dies leaves some."""

    def __init__(self, take: Callable[[], Request | None]) -> None:
        self.take = take

    def __next__(self) -> Request:
        if (request := self.take()) is None:
            raise StopIteration
        return request


class Scores(NamedTuple):
    """Of one given sequence: the natural-log probability of each token after those before it (0.0 for the first, which
    nothing predicts), and the logits that predicted tokens 1, 2, ... when they were asked for."""

    logprobs: tuple[float, ...]
    top: TopLogits | None = None


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """Routed tokens since load: counts[task][layer][expert]; padding, finished rows and dummy steps are not in it."""

    counts: dict[str, list[list[int]]]


class Engine(Protocol):
    """A model that completes token sequences. Completions come back as they finish, in any order, one per request. Requests
    are taken when there is room, and asked for again after their end while others are being answered (Source)."""

    name: str
    version: str

    def load(self) -> None: ...

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]: ...

    def score(
        self, sequences: Sequence[Sequence[int]], top_logits: int = 0, log_z_temperatures: Sequence[float] = (1.0,)
    ) -> list[Scores]: ...

    def expert_stats(self) -> ExpertStats | None: ...

    def close(self) -> None: ...


OTHER_MODEL = "other_model"
"""The error of a reply that does not count: another model gave it than the run's."""


class ReadsReplies(Protocol):
    """An engine whose answers come from somewhere else, as bytes that Handout.keep was given."""

    def remember_in(self, folder: Path) -> None:
        """What the run's servers turn out to be is kept in this folder, for the workers to come."""
        ...

    def read(self, request: Request, raw: bytes) -> Completion:
        """The completion that `raw` holds for `request`. Bytes that cannot be read are an `abort`, never an exception."""
        ...

    def price(self, prompt_tokens: int, output_tokens: int) -> float:
        """Dollars."""
        ...
