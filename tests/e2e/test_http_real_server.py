"""The http engine against servers that were not written for it: `transformers serve`, always; a vLLM, where one is named."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from configs import schema
from data.chat import dialect_of, encode_prompt
from data.engine import Completion, Handout, Partial, Request
from data.records import Message
from student.folders import EMBEDDED as STUDENT
from teacher.http_engine import HttpEngine
from tests.e2e.commands import environment

QUESTIONS = ("What is 3 + 4?", "What is 12 + 30?", "What is 250 + 17?", "What is 9 + 9 + 9?")


@contextmanager
def serving(folder: Path, log: Path) -> Iterator[str]:
    """`transformers serve FOLDER` on a free port; yields its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)],
            env=environment() | {"HF_HUB_OFFLINE": "1"}, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def request_of(tokenizer: PreTrainedTokenizerBase, index: int, **changes: Any) -> Request:
    messages: tuple[Message, ...] = ({"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]},)
    fields: dict[str, Any] = {
        "request_id": f"r{index}", "prompt_ids": tuple(encode_prompt(tokenizer, messages)),
        "stop_ids": dialect_of(tokenizer).stop_ids(tokenizer), "max_tokens": 128, "temperature": 0.0, "top_p": 1.0, "seed": index,
        "messages": messages, "prompt_version": "plain@1",
    }  # fmt: skip
    return Request(**(fields | changes))


def by_id(completions: list[Completion]) -> dict[str, Completion]:
    return {completion.request_id: completion for completion in completions}


@pytest.mark.long
def test_transformers_serve_gives_the_same_in_one_piece_and_as_a_stream(tmp_path: Path) -> None:
    """One process of the real server: load, greedy answers, streams with partial outputs, a bound that is met."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    kept: dict[str, list[bytes]] = {}
    partials: list[Partial] = []
    requests = [request_of(tokenizer, index) for index in range(4)]
    with serving(STUDENT, tmp_path / "server.log") as url:

        def ask(requests: list[Request], **changes: Any) -> dict[str, Completion]:
            engine = HttpEngine(
                schema.HttpEngine(base_urls=(url,), concurrency=2, deadline_s=90.0, **changes), str(STUDENT), tokenizer
            )
            engine.load()
            handout = Handout(every_tokens=4, take=partials.append, keep=lambda name, raw: kept.setdefault(name, []).append(raw))
            found = by_id(list(engine.generate(requests, handout)))
            for request in requests:
                again, completion = engine.read(request, kept[request.request_id][-1]), found[request.request_id]
                assert (again.token_ids, again.finish_reason) == (completion.token_ids, completion.finish_reason)
            return found

        whole = ask(requests)
        streamed = ask(requests, stream=True)
        (short,) = ask([request_of(tokenizer, 0, max_tokens=5)]).values()
    for name, completion in whole.items():
        assert completion.finish_reason == "stop", (tmp_path / "server.log").read_text()[-2000:]
        assert len(completion.token_ids) > 4 and streamed[name].token_ids == completion.token_ids
        assert [id in requests[0].stop_ids for id in completion.token_ids[-2:]] == [False, True]
    assert short.finish_reason == "length" and len(short.token_ids) <= 6  # its five tokens, and a tag put back
    assert partials and all(partial.token_ids for partial in partials)


@pytest.mark.skipif("TRACESTILL_VLLM_URL" not in os.environ, reason="set TRACESTILL_VLLM_URL: see docs/http.md")
def test_vllm_continues_by_token_ids_with_logprobs() -> None:
    """Greedy: a prefix of its own output, continued, is that output; its ids are those it would have been asked for in text."""
    model = os.environ["TRACESTILL_VLLM_MODEL"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = {"base_urls": os.environ["TRACESTILL_VLLM_URL"], "api": "completions", "logprobs": True, "concurrency": 4}

    def ask(request: Request, **changes: Any) -> Completion:
        engine = HttpEngine(schema.HttpEngine(**(settings | changes)), os.environ.get("TRACESTILL_VLLM_NAME", model), tokenizer)
        engine.load()
        (completion,) = engine.generate([request])
        return completion

    whole = ask(request_of(tokenizer, 0))
    assert whole.finish_reason in ("stop", "length") and len(whole.logprobs) == len(whole.token_ids) > 4
    half = len(whole.token_ids) // 2
    prefix = {"prefix_ids": whole.token_ids[:half], "prefix_logprobs": whole.logprobs[:half]}
    rest = ask(request_of(tokenizer, 0, **prefix), stream=True)
    assert rest.token_ids == whole.token_ids and len(rest.logprobs) == len(rest.token_ids)
    assert ask(request_of(tokenizer, 0), api="chat").token_ids == whole.token_ids
