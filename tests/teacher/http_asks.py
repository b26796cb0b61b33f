"""Requests and engines for the tests of the http engine."""

import functools
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from configs import schema
from data.byte_tokenizer import build_byte_tokenizer
from data.engine import Completion, Handout, Request
from teacher.folders import EMBEDDED
from teacher.http_engine import HttpEngine
from tests.teacher.mock_server import MockServer

MARKERS = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>",
)  # fmt: skip
STOP = 260
"""The id of <|user|>."""
CLOSE = 264
"""The id of </think>."""


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    template = (EMBEDDED / "chat_template.jinja").read_text()
    return build_byte_tokenizer(MARKERS, eos="<|endoftext|>", pad="<|endoftext|>", chat_template=template)


def request(index: int = 0, **changes: Any) -> Request:
    fields: dict[str, Any] = {
        "request_id": f"r{index}", "prompt_ids": (1, 2), "stop_ids": (STOP,), "max_tokens": 50, "temperature": 0.5, "top_p": 0.9,
        "seed": 2**40 + index, "messages": ({"role": "user", "content": f"question {index}"},), "prompt_version": "plain@1",
    }  # fmt: skip
    return Request(**(fields | changes))


def engine_for(server: MockServer, **changes: Any) -> HttpEngine:
    fields: dict[str, Any] = {"base_urls": server.url, "concurrency": 4, "deadline_s": 20.0, "drain_s": 2.0}
    return HttpEngine(schema.HttpEngine(**(fields | changes)), "tiny", tokenizer(), first_wait_s=0.01)


def ask(engine: HttpEngine, *requests: Request, handout: Handout | None = None) -> list[Completion]:
    return list(engine.generate(requests, handout))


def by_id(completions: Iterable[Completion]) -> dict[str, Completion]:
    return {completion.request_id: completion for completion in completions}
