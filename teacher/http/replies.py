"""What a reply says: a JSON body, or a stream of server-sent events, of chat or of plain completions.

Pure, and the same code for a stream that is still running (its partial output) and for kept bytes. What a server may leave
out is absent here; what it must not do (text that is no string, JSON that is none) raises, and `reading` makes that an abort.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TOKEN_ID = re.compile(r"token_id:(\d+)")


class Usage(NamedTuple):
    """Tokens that the server bills."""

    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Reply:
    """What the events of one reply add up to; an unstreamed body is one event.

    reason: the server's own finish_reason, "" while the output is open. ids: the server's, where it returns any. logprobs:
    natural, one a token, of all tokens that came with one. stop_reason: vLLM's, the string or id that ended the output.
    choices: how many events held one. error: what the server said instead of going on.
    """

    reason: str = ""
    texts: list[str] = field(default_factory=list)
    reasonings: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: int | str | None = None
    model: str = ""
    usage: Usage | None = None
    choices: int = 0
    error: str = ""

    def add(self, event: Mapping[str, Any]) -> None:
        self.model = self.model or str(event.get("model") or "")
        self.usage = usage_of(event.get("usage")) or self.usage
        if event.get("error"):
            self.error = " ".join(str(event["error"]).split())[:200]
        for choice in event.get("choices") or ():
            if not choice.get("index"):  # n is 1; whatever else a server sends is not ours
                self._add_choice(choice)

    def _add_choice(self, choice: Mapping[str, Any]) -> None:
        said = choice.get("message") or choice.get("delta") or {}
        self.choices += 1
        self.texts.append(_text(choice.get("text") or said.get("content")))
        self.reasonings.append(_text(said.get("reasoning_content") or said.get("reasoning")))
        self.reason = str(choice.get("finish_reason") or self.reason)
        if (stop_reason := choice.get("stop_reason")) is not None:
            self.stop_reason = stop_reason
        tokens = tokens_of(choice.get("logprobs") or {})
        self.ids += choice.get("token_ids") or choice.get("response_token_ids") or tokens.ids  # vLLM; SGLang
        self.logprobs += tokens.logprobs

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def tokens(self) -> int:
        """Output tokens; events where the server gives no ids, which is nearly the same."""
        return len(self.ids) or self.choices

    @property
    def reasoning(self) -> str:
        return "".join(self.reasonings)

    def spoken(self, prompt_opens_think: bool) -> str:
        """The text as the model wrote it, think tags included.

        Servers hand the reasoning over as `reasoning_content`, as `reasoning`, or inside the content. Where a parser cut it
        out, the tag between reasoning and answer is put back; no tag is invented for text that came without one, so that
        reasoning which never closed stays open.
        """
        reasoning, content = self.reasoning, self.text
        text = f"<think>{reasoning}" + (f"</think>{content}" if content else "") if reasoning else content
        return text.removeprefix("<think>") if prompt_opens_think else text


def usage_of(usage: object) -> Usage | None:
    """None where the server does not say: a bill that cannot be read is no reason to lose the reply."""
    match usage:
        case {"prompt_tokens": int(prompt), "completion_tokens": int(output)}:
            return Usage(prompt, output)
        case _:
            return None


class Tokens(NamedTuple):
    """Of one logprobs object; empty where it has none that can be used."""

    ids: list[int]
    logprobs: list[float]


def tokens_of(logprobs: Mapping[str, Any]) -> Tokens:
    """Chat lists objects, plain completions parallel lists. Token names are ids where a server was told to say so (vLLM:
    `token_id:123`)."""
    content: Sequence[Mapping[str, Any]] | None = logprobs.get("content")
    if content is not None:
        names, values = [entry.get("token") for entry in content], [entry.get("logprob") for entry in content]
    else:
        names, values = logprobs.get("tokens") or (), logprobs.get("token_logprobs") or ()
    numbers = [float(value) for value in values if value is not None]
    found = [TOKEN_ID.fullmatch(str(name)) for name in names]
    ids = [int(match[1]) for match in found if match]
    return Tokens(ids if len(ids) == len(names) else [], numbers if len(numbers) == len(values) else [])


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"a text that is a {type(value).__name__}")
    return value


def read_body(body: bytes) -> Reply:
    """Raises ValueError when the body is not one JSON object."""
    event = json.loads(body)
    if not isinstance(event, dict):
        raise ValueError(f"a JSON {type(event).__name__}")
    reply = Reply()
    reply.add(event)
    return reply


class EventStream:
    """Server-sent events as they come, in pieces cut anywhere. An event that is no JSON ends what is read of the stream: what
    follows a hole cannot be joined to what was before it."""

    def __init__(self) -> None:
        self.reply = Reply()
        self._rest = b""
        self._broken = False

    def feed(self, piece: bytes) -> None:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if not self._broken and (data := _data_of(line)):
                self._add(data)

    def end(self) -> Reply:
        """The reply, with a last event that came without its newline; half an event is left out."""
        data, self._rest = _data_of(self._rest), b""
        if not self._broken and data:
            self._add(data)
        return self.reply

    def _add(self, data: bytes) -> None:
        try:
            event = json.loads(data)
        except ValueError:
            self._broken = True
            return
        self.reply.add(event)


def _data_of(line: bytes) -> bytes:
    """The payload of a `data:` line; nothing for comments, event names, blank lines and the closing [DONE]."""
    if not line.startswith(b"data:"):
        return b""
    data = line[5:].strip()
    return b"" if data == b"[DONE]" else data


def read_stream(body: bytes) -> Reply:
    stream = EventStream()
    stream.feed(body)
    return stream.end()


def error_words(body: bytes) -> str:
    """What a refusal says, on one line of at most 200 characters."""
    return " ".join(body.decode(errors="replace").split())[:200]


def listed_models(body: bytes) -> Iterator[tuple[str, str]]:
    """(id, root) of GET /models; root is the folder behind an alias, where the server tells (vLLM). Nothing when the list
    cannot be read."""
    try:
        entries = json.loads(body)["data"]
        yield from [(str(entry["id"]), str(entry.get("root") or "")) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError):
        return
