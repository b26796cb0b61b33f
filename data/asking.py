"""The build asks a model: the base student what it can produce, a judge what it makes of an answer.

What a model said is on disk before anybody reads it. Replies lie in verdicts/replies/NAME-KEY/ as committed segments, under a
key of all that they depend on; they were paid for, so they are sealed with the verdicts and a later build asks only what is
new. A build that is killed loses what it had not committed: at most COMMIT_SECONDS, and what was in flight. Where what a server
returned could not be read, its bytes are kept as they came: they were paid for, and answer nothing.

Models come from outside (`Models`): this package opens no engine of its own.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from configs.errors import UnusableInput
from configs.progress import Count, Report
from data.engine import Completion, Engine, Handout, Request
from data.records import Message
from data.store import RunFolder, SegmentLog, commit_segment, read_segment

COMMIT_REPLIES = 1024
COMMIT_SECONDS = 10.0

REFUSALS = ("refused", "content_filter", "tool_call")
"""Errors of a request that a server which answers others will give to it again: too long for its context, against its rules."""
_SETTLED = ("", *REFUSALS)

REPLY = pa.schema(
    [
        ("request_id", pa.string()), ("text", pa.string()), ("finish_reason", pa.string()), ("output_tokens", pa.int32()),
        ("seconds", pa.float64()), ("cost", pa.float64()), ("prompt_tokens", pa.int32()), ("error", pa.string()),
    ]
)  # fmt: skip


class Tokens(NamedTuple):
    """Of one request and its reply. prompt: 0 where nobody counts them."""

    prompt: int
    output: int


def _our_count(completion: Completion) -> Tokens:
    return Tokens(0, len(completion.token_ids))


class Codec(NamedTuple):
    """A model's tokenizer, as far as requests and replies need it. encode: chat turns to ids, generation prompt included; an
    engine that renders the turns itself may do with none. decode: ids to text, stop token left out. opens_think: the generation
    prompt holds `<think>` already. row_tokens: of a conversation's last turn, as training would see it: (reasoning, answer).
    tokens: what a completion is counted as."""

    encode: Callable[[tuple[Message, ...]], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    stop_ids: tuple[int, ...] = ()
    opens_think: bool = False
    row_tokens: Callable[[tuple[Message, ...]], tuple[int, int]] = lambda messages: (0, 0)
    tokens: Callable[[Completion], Tokens] = _our_count


class Model(NamedTuple):
    """A model that may be asked. identity: of everything besides the request that its replies depend on, without loading it.
    codec, engine: opened when first needed, and only then."""

    identity: Callable[[], str]
    codec: Callable[[], Codec]
    engine: Callable[[], Engine]


class ControlWords(NamedTuple):
    """Words that the teacher's or the student's tokenizer turns into control tokens. identity: of the tokenizers, without loading
    them. read: loads them."""

    identity: Callable[[], str]
    read: Callable[[], tuple[str, ...]]


class Models(NamedTuple):
    """What the front door brings to a build. None: nobody can be asked, and what would have to ask is refused. Without
    control_words the control_tokens filter looks for the recipe's own words only. trained_ids: opens the student's tokenizer for
    data/row_check.py; without it no row is checked."""

    student: Model | None = None
    judge: Model | None = None
    control_words: ControlWords | None = None
    trained_ids: Callable[[], Callable[[Sequence[Mapping[str, object]], str, str], Sequence[int]]] | None = None


NOBODY = Models()


class Reply(NamedTuple):
    """What a model said to one request, before anything parsed it. request_id: a hash of what was asked. error: why there is no
    reply, with finish_reason `abort`, or "". One of REFUSALS settles the request; after any other (`bad_reply`) it is still to
    be asked, and text is what the server returned instead: each attempt as the engine packs it, what is no UTF-8 as `\\xff`."""

    request_id: str
    text: str
    finish_reason: str
    output_tokens: int
    seconds: float
    cost: float
    prompt_tokens: int = 0
    error: str = ""


class ReplyLog:
    """The replies under one name and key. Raises UnusableInput for a segment whose bytes changed: it was paid for, so whether to
    ask again is its owner's to say (by deleting it with its sidecar)."""

    def __init__(self, run: RunFolder, name: str, key: str) -> None:
        self.folder: Path = run.verdicts / "replies" / f"{name}-{key}"
        self._log, self._known, self._fresh = SegmentLog(self.folder), set[str](), list[Reply]()
        self._since = time.monotonic()
        self._segments = list(self._log.look()) if self.folder.is_dir() else []
        for segment in self._segments:
            said = read_segment(segment)
            pairs = zip(said["request_id"].to_pylist(), said["error"].to_pylist(), strict=True)
            self._known.update(request_id for request_id, error in pairs if error in _SETTLED)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._known

    def __len__(self) -> int:
        return len(self._known)

    def add(self, reply: Reply) -> None:
        """Durable after COMMIT_REPLIES of them, after COMMIT_SECONDS, or when `commit` is called."""
        self._fresh.append(reply)
        if reply.error in _SETTLED:
            self._known.add(reply.request_id)
        self.commit(after_s=0.0 if len(self._fresh) >= COMMIT_REPLIES else COMMIT_SECONDS)

    def extend(self, replies: Iterable[Reply]) -> None:
        """All of them are durable."""
        for reply in replies:
            self.add(reply)
        self.commit()

    def commit(self, *, after_s: float = 0.0) -> None:
        """What was added is durable, if the last commit is so long ago."""
        if time.monotonic() - self._since < after_s:
            return
        if self._fresh:
            self.folder.mkdir(parents=True, exist_ok=True)
            table = pa.Table.from_pylist([reply._asdict() for reply in self._fresh], schema=REPLY)
            self._segments.append(commit_segment(self.folder, table, worker="build", facts={}))
            self._fresh.clear()
        self._since = time.monotonic()

    def read(self) -> Iterator[Reply]:
        """Every committed reply that settles its request, the first of those to one."""
        seen: set[str] = set()
        for reply in self._committed():
            if reply.error in _SETTLED and reply.request_id not in seen:
                seen.add(reply.request_id)
                yield reply

    def paid_in_vain(self) -> Iterator[Reply]:
        """What servers returned that could not be read."""
        return (reply for reply in self._committed() if reply.error not in _SETTLED)

    def _committed(self) -> Iterator[Reply]:
        for segment in self._segments:
            yield from (Reply(**row) for row in read_segment(segment).to_pylist())


def reply_folders(run: RunFolder) -> list[Path]:
    """Of every name and key that there is."""
    return sorted(path for path in (run.verdicts / "replies").glob("*") if path.is_dir())


def kept_replies(run: RunFolder) -> list[Path]:
    """Every committed reply of the run, under whatever name and key, to be sealed: each segment and its sidecar."""
    found = (segment.path for folder in reply_folders(run) for segment in SegmentLog(folder).look())
    return sorted(path for data in found for path in (data, data.with_suffix(".json")))


def ask(
    log: ReplyLog, requests: Iterable[Request], model: Model, tell: Report, *, total: int, doing: str,
    refusals: ReplyLog | None = None,
) -> Mapping[str, int]:  # fmt: skip
    """Each request has a reply in the log when this returns, except those that failed: their number, by error. The engine is
    loaded only if something has to be asked. total: requests that there may be, for the progress line. refusals: where requests
    go that the model has refused for good while it answered others, now and not in an earlier build; they are not asked again,
    and have not failed.

    Whatever ends this (a signal, an engine that dies), replies that came are committed.
    """
    known = (log,) if refusals is None else (log, refusals)
    missing = (request for request in requests if not any(request.request_id in replies for replies in known))
    if (first := next(missing, None)) is None:
        return {}
    failed, refused, done, answered = Counter[str](), list[Reply](), 0, False
    raw: dict[str, bytes] = {}
    handout = Handout(
        stop=lambda: _commit_in_time(log), keep=lambda request_id, said: raw.update({request_id: raw.get(request_id, b"") + said})
    )
    codec, engine = model.codec(), model.engine()
    engine.load()
    try:
        for completion in engine.generate(chain([first], missing), handout):
            returned = raw.pop(completion.request_id, b"")
            if completion.finish_reason != "abort":
                log.add(_reply(completion, codec))
                answered = True
            elif refusals is not None and completion.error in REFUSALS:
                refused.append(_reply(completion, codec, returned))
            else:
                failed[completion.error or "abort"] += 1
                if returned and completion.error not in _SETTLED:
                    log.add(_reply(completion, codec, returned))
            if refusals is not None and answered and refused:  # now: a build that is killed would have its answers and not these
                refusals.extend(refused)
                refused.clear()
            tell(Count(done := done + 1, total, doing, unit="requests"))
    finally:
        log.commit()
        engine.close()
    if not answered:  # a model that answers nobody is not itself today, or the recipe is wrong
        failed.update(reply.error for reply in refused)
    return failed


def _commit_in_time(log: ReplyLog) -> bool:
    """An engine asks several times a second whether to stop, also while no reply comes: replies that did are durable by then."""
    log.commit(after_s=COMMIT_SECONDS)
    return False


def _reply(completion: Completion, codec: Codec, returned: bytes = b"") -> Reply:
    """returned: what stands for a text that could not be read."""
    tokens = codec.tokens(completion)
    text = returned.decode(errors="backslashreplace") if returned else codec.decode(completion.token_ids)
    return Reply(
        completion.request_id, text, completion.finish_reason, tokens.output, completion.seconds, completion.cost, tokens.prompt,
        completion.error,
    )  # fmt: skip


def all_answered(failed: Mapping[str, int], whom: str) -> None:
    """Raises UnusableInput where a request failed: what is missing decides about rows, and is not guessed."""
    if failed:
        reasons = ", ".join(f"{number} {error}" for error, number in sorted(failed.items()))
        raise UnusableInput(
            f"data build: {sum(failed.values())} requests to {whom} failed ({reasons}); what was answered is kept: "
            "mend the cause, then give the same command"
        )
