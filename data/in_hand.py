"""Answers that a process has in hand, as its journal keeps them: written down token by token, taken up by another process
where they were left.

Legend: T tokens, K kept logits, C temperatures.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import numpy as np

from data.engine import Completion, Partial, Request, TopLogits
from data.expert_load import CountedLoad, summarise
from data.journal import Entry, Journal, Salvage

TOP = ("top_ids", "top_logits", "log_z")


class Asked(Protocol):
    """Who asks. trace_id: under which the journal keeps it. salvage: what an earlier process left of it."""

    @property
    def trace_id(self) -> str: ...

    @property
    def salvage(self) -> Salvage | None: ...


Asker = TypeVar("Asker", bound=Asked)


@dataclass(slots=True)
class InHand(Generic[Asker]):
    """A request that was asked. journalled: how many of its output tokens the journal's newest file holds, and said: which.
    replies: what a server returned for it so far, the last of which is the answer. paid: dollars for those that an earlier
    holder got."""

    ask: Asker
    request: Request
    journalled: int = 0
    said: tuple[int, ...] = ()
    replies: list[bytes] = field(default_factory=list)
    paid: float = 0.0
    asked_at: float = field(default_factory=time.time)

    @property
    def prefix_top(self) -> TopLogits | None:
        return None if self.ask.salvage is None else top_of(self.ask.salvage.arrays)

    def checkpoint(self, journal: Journal, partial: Partial) -> None:
        """The journal holds the output as far as it has come."""
        start = 0 if journal.wants_whole or not journal.holds(self.ask.trace_id) else self.journalled
        if partial.token_ids[:start] != self.said[:start]:  # a server's text, which a tokenizer has cut in another place
            start = 0
        if len(partial.token_ids) > start:
            arrays = self._arrays(partial.token_ids, partial.logprobs, partial.top, start)
            journal.append(Entry("partial", self.ask.trace_id, {"start": start}, arrays), is_whole=start == 0)
            self.journalled, self.said = len(partial.token_ids), partial.token_ids

    def finish(self, journal: Journal, completion: Completion) -> Completion:
        """The journal holds all of the answer; the completion has the logits of its prefix, and what all of it cost."""
        completion = replace(completion, cost=completion.cost + self.paid)
        if self.replies:  # it holds the bytes that the answer was read from
            return completion
        start = self.journalled if journal.holds(self.ask.trace_id) else 0
        arrays = self._arrays(completion.token_ids, completion.logprobs, completion.top, start)
        if isinstance(completion.expert_load, CountedLoad):
            arrays["experts"] = np.asarray(completion.expert_load.counts, dtype=np.int64)
        facts = {
            "start": start, "finish_reason": completion.finish_reason, "started_at": completion.started_at,
            "seconds": completion.seconds, "error": completion.error,
        }  # fmt: skip
        journal.append(Entry("finished", self.ask.trace_id, facts, arrays), is_whole=start == 0)
        return replace(completion, top=joined(self.prefix_top, completion.top))

    def keep(self, journal: Journal, raw: bytes) -> None:
        """The journal holds what a server returned, the replies before it too."""
        self.replies.append(raw)
        self.journalled = 0  # what is said after a reply stands alone
        sizes = [len(reply) for reply in self.replies]
        journal.append(Entry("reply", self.ask.trace_id, {"sizes": sizes}, {}, b"".join(self.replies)), is_whole=True)

    def _arrays(
        self, token_ids: tuple[int, ...], logprobs: tuple[float, ...], top: TopLogits | None, start: int
    ) -> dict[str, np.ndarray]:
        arrays = {
            "ids": np.asarray(token_ids[start:], dtype=np.int32),
            "logprobs": np.asarray(logprobs[start:], dtype=np.float32),
        }
        if (whole := joined(self.prefix_top, top)) is not None:
            arrays |= {name: part[start:] for name, part in zip(TOP, whole, strict=True)}
        return arrays


def continued(request: Request, salvage: Salvage) -> Request:
    """The request with what was said of it as its prefix. max_tokens stays: a prefix counts against it."""
    logprobs = salvage.arrays.get("logprobs", np.empty(0))
    return replace(request, prefix_ids=salvage.token_ids, prefix_logprobs=tuple(logprobs.tolist()))


def finished_earlier(trace_id: str, salvage: Salvage) -> Completion:
    """The completion that a worker had finished and not committed."""
    ending = salvage.ending
    assert ending is not None and ending.kind == "finished"
    facts, arrays = ending.header, salvage.arrays
    load = summarise(arrays["experts"]) if "experts" in arrays else None
    return Completion(
        trace_id, salvage.token_ids, tuple(arrays["logprobs"].tolist()), facts["finish_reason"], facts["started_at"],  # type: ignore[arg-type]
        facts["seconds"], load, top_of(arrays), facts["error"],  # type: ignore[arg-type]
    )  # fmt: skip


def replies_of(salvage: Salvage) -> list[bytes]:
    """A server's replies for a trace, in order."""
    found, start = list[bytes](), 0
    if salvage.reply is not None:
        sizes = salvage.reply.header["sizes"]
        assert isinstance(sizes, list)
        for size in sizes:
            found.append(salvage.reply.raw[start : start + size])
            start += size
    return found


def top_of(arrays: Mapping[str, np.ndarray]) -> TopLogits | None:
    return TopLogits(*(arrays[name] for name in TOP)) if "top_ids" in arrays else None


def joined(prefix: TopLogits | None, rest: TopLogits | None) -> TopLogits | None:
    """Logits of all of an output's tokens."""
    if prefix is None or rest is None:
        return rest if prefix is None else prefix
    return TopLogits(*(np.concatenate(both) for both in zip(prefix, rest, strict=True)))
