"""The seam between whoever needs text (generation, evaluation, judges) and whatever model writes it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from data.records import FinishReason, Message


@dataclass(frozen=True, slots=True)
class Request:
    """One completion asked for.

    prompt_ids: the rendered prompt, generation prompt included. stop_ids: any of them ends the output. seed: 63 bits;
    noise at output position i depends on (seed, i) alone. temperature 0 is greedy. messages: the same prompt as chat
    turns, for engines that own the template (http). task: label under which expert load is counted.
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


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """How one request's tokens spread over the routed experts, averaged over sparse layers.

    max_over_mean: 1 is even. entropy: exp(H) / E in (0, 1]. hottest: (layer, expert) pairs, busiest first.
    """

    max_over_mean: float
    entropy: float
    hottest: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back. token_ids end with the stop token when finish_reason is `stop`; logprobs has one natural log
    per id, under the unmodified (temperature 1, no top-p) distribution. seconds: admission to last token."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    started_at: float
    seconds: float
    expert_load: ExpertLoad | None = None


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """Routed tokens since load: counts[task][layer][expert]; padding, finished rows and dummy steps are not in it."""

    counts: dict[str, list[list[int]]]


class Engine(Protocol):
    """A model that completes token sequences. Completions come back as they finish, in any order, one per request."""

    name: str
    version: str

    def load(self) -> None: ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]: ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Per-token natural-log probabilities; the first token of a sequence has no prediction and gets 0.0."""
        ...

    def expert_stats(self) -> ExpertStats | None: ...

    def close(self) -> None: ...
