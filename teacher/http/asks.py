"""What a server is sent: which part of an output one ask is for, as a JSON body and headers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from configs import schema
from configs.errors import UnusableInput
from data.engine import Request
from teacher.http.raw import ENCODER
from teacher.http.reading import Reader

MAX_STOPS = 4
BEYOND_OPENAI = ("top_k", "min_p", "min_tokens")  # sent only when the recipe asks: vLLM and SGLang know them
PATHS = {"chat": "chat/completions", "completions": "completions"}


@dataclass(frozen=True, slots=True)
class Ask:
    """One HTTP request for (a part of) one output. given, given_logprobs, phase: as in raw.Line."""

    body: bytes
    given: tuple[int, ...] = ()
    given_logprobs: tuple[float, ...] = ()
    phase: Literal["whole", "reasoning"] = "whole"


class Asks:
    """From requests to bodies, under one recipe.

    chat: the server owns the template, so nothing can be continued; a request that comes with a prefix is asked anew.
    completions: prompt ids and all output ids so far go out as they are, with the budget that remains. A reasoning budget is
    kept in two phases: what is left of it is asked for, and reasoning that has not closed by then is closed by us. Such a
    completion has no logprobs: nobody gave one for the tag.
    """

    def __init__(self, engine: schema.HttpEngine, model: str, reader: Reader) -> None:
        self.engine, self.model, self.reader = engine, model, reader

    def next(self, request: Request, given: tuple[int, ...], given_logprobs: tuple[float, ...]) -> Ask | None:
        """The ask that continues the request's prefix and what earlier asks gave; None when nothing is left to ask for.

        Raises:
            UnusableInput: the request wants what the protocol cannot carry.
        """
        if self.engine.api == "chat":
            return Ask(encode(chat_body(request, self.model, self.reader.dialect.stop_tokens, self.engine)))
        said = request.prefix_ids + given
        left, free = request.max_tokens - len(said), self._free_reasoning(request, said)
        if free is not None and free <= 0 and left > len(self._closing(request)):
            said += self._closing(request)
            left -= len(self._closing(request))
        if left <= 0:
            return None
        bounded = free is not None and 0 < free < left
        tokens = min(left, free) if free is not None and bounded else left
        body = completion_body(request, said, tokens, self.model, self.reader, self.engine)
        return Ask(encode(body), said, request.prefix_logprobs + given_logprobs, "reasoning" if bounded else "whole")

    def _closing(self, request: Request) -> tuple[int, ...]:
        return (request.reasoning_end,) if request.reasoning_end >= 0 else self.reader.close_ids

    def _free_reasoning(self, request: Request, said: tuple[int, ...]) -> int | None:
        """Tokens before the closing tag, which is the last of the budget; None when it binds nothing: there is none, or the
        block has closed."""
        if not request.reasoning_budget or contains(said, self._closing(request)):
            return None
        if said and not self.reader.dialect.prompt_opens_think and not contains(said, self.reader.open_ids):
            return None  # an answer without reasoning
        return request.reasoning_budget - len(self._closing(request)) - len(said)


def contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    """`part` is in `ids`, in one piece. A think tag is one id in every tokenizer we met."""
    if len(part) == 1:
        return part[0] in ids
    wanted = tuple(part)
    return any(tuple(ids[start : start + len(wanted)]) == wanted for start in range(len(ids) - len(wanted) + 1))


def encode(body: Mapping[str, Any]) -> bytes:
    return ENCODER.encode(body).encode()  # ASCII: a lone surrogate in a prompt has no UTF-8


def chat_body(request: Request, model: str, stop_tokens: Sequence[str], engine: schema.HttpEngine) -> dict[str, Any]:
    """The JSON body of one chat completion.

    Raises:
        UnusableInput: the request asks for what the protocol cannot carry.
    """
    if request.reasoning_budget:
        raise UnusableInput(
            f"request {request.request_id}: reasoning_budget {request.reasoning_budget}: a chat server cannot be told; "
            "set teacher.engine.api=completions (vLLM, SGLang) or leave the budget out"
        )
    top = {"top_logprobs": engine.top_logprobs} if engine.top_logprobs else {}
    return {
        "model": model,
        "messages": [dict(message) for message in request.messages],
        "max_tokens": request.max_tokens,
        **_common(request, stop_tokens, engine),
        **({"tools": json.loads(request.tools)} if request.tools else {}),
        **({"logprobs": True} | top if engine.logprobs else {}),
    }


def completion_body(
    request: Request, said: tuple[int, ...], max_tokens: int, model: str, reader: Reader, engine: schema.HttpEngine
) -> dict[str, Any]:
    """The JSON body of one completion by token ids. Special tokens stay in the text, or its ids could not be counted.

    Raises:
        UnusableInput: the request asks for what the protocol cannot carry.
    """
    body = {
        "model": model,
        "prompt": [*request.prompt_ids, *said],
        "max_tokens": max_tokens,
        **_common(request, reader.dialect.stop_tokens, engine),
        **({"logprobs": engine.top_logprobs} if engine.logprobs else {}),
        "stop_token_ids": list(request.stop_ids or reader.stop_ids),
        "return_token_ids": True,
        "skip_special_tokens": False,
    }
    if request.min_tokens:
        body["min_tokens"] = min(max_tokens, max(0, request.min_tokens - len(said)))
    return body


def _common(request: Request, stop_tokens: Sequence[str], engine: schema.HttpEngine) -> dict[str, Any]:
    """The stops are sent because a server knows only what generation_config.json tells it, where role markers are often
    missing; the protocol takes four. Seeds are cut to 31 bits: some servers read a C int."""
    if len(stop_tokens) + len(request.stop_strings) > MAX_STOPS and request.stop_strings:
        raise UnusableInput(
            f"sampling.stop_strings: {len(request.stop_strings)} beside the template's own {len(stop_tokens)} stops; "
            f"servers take {MAX_STOPS} in all: name fewer"
        )
    if request.loop_guard is not None:
        raise UnusableInput("sampling.loop_guard: a server cannot be told; leave it out, or use engine type deepspeed or local")
    return {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed % (1 << 31),
        "stop": [*stop_tokens, *request.stop_strings][:MAX_STOPS],
        "stream": engine.stream,
        **({"stream_options": {"include_usage": True}} if engine.stream else {}),
        **{name: value for name in BEYOND_OPENAI if (value := getattr(request, name))},
    }


def headers_of(request: Request, model: str) -> dict[str, str]:
    """What a gateway's log needs to find a request again."""
    return {
        "Content-Type": "application/json",
        "X-Tracestill-Request-Id": visible(request.request_id),
        "X-Tracestill-Model-Id": visible(model),
        "X-Tracestill-Prompt-Version": visible(request.prompt_version),
    }


def visible(text: str) -> str:
    """Percent-encoded where it holds anything but visible ASCII, the only thing that a header can hold."""
    plain = text.isascii() and text.isprintable() and " " not in text and "%" not in text
    return text if plain else quote(text, safe=VISIBLE)


VISIBLE = "!\"#$&'()*+,/:;<=>?@[\\]^`{|}~"
