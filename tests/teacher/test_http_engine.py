"""The http engine against a small server that speaks the protocol, in this process, over real sockets."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from configs import schema
from configs.errors import UnusableInput
from data.byte_tokenizer import build_byte_tokenizer
from data.engine import Request
from teacher.folders import EMBEDDED
from teacher.http_engine import HttpEngine

MARKERS = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<think>",
    "</think>",
)
Reply = tuple[int, dict[str, Any]]


@dataclass
class Server:
    """Answers with what `reply` says; remembers bodies, keys and connections."""

    url: str
    reply: Callable[[dict[str, Any]], Reply]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    connections: set[tuple[str, int]] = field(default_factory=set)


def said(finish_reason: str = "stop", **message: str | None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", **message}}]}


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            state.bodies.append(body)
            state.keys.append(self.headers.get("authorization", ""))
            state.connections.add(self.client_address)
            self.answer(*(state.reply(body) if self.path == "/v1/chat/completions" else (404, {})))

        def answer(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{http.server_port}/v1", lambda body: (200, said(content="4", reasoning_content="2+2")))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    template = (EMBEDDED / "chat_template.jinja").read_text()
    return build_byte_tokenizer(MARKERS, eos="<|endoftext|>", pad="<|endoftext|>", chat_template=template)


def engine_for(server: Server, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> HttpEngine:
    return HttpEngine(schema.HttpEngine(base_urls=(server.url,), concurrency=4, **changes), "tiny", tokenizer, first_wait_s=0.01)


def request(index: int = 0) -> Request:
    messages = ({"role": "user", "content": f"question {index}"},)
    return Request(f"r{index}", (1, 2), (3,), max_tokens=50, temperature=0.5, top_p=0.9, seed=2**40 + index, messages=messages)  # type: ignore[arg-type]


def test_a_completion_holds_the_ids_of_reasoning_answer_and_stop(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    (completion,) = engine_for(server, tokenizer).generate([request()])
    assert tokenizer.decode(list(completion.token_ids)) == "2+2</think>4<|user|>"
    assert (completion.request_id, completion.finish_reason, completion.logprobs) == ("r0", "stop", ())


def test_the_body_says_what_the_recipe_asks(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    list(engine_for(server, tokenizer).generate([request(5)]))
    assert server.bodies == [
        {
            "model": "tiny", "messages": [{"role": "user", "content": "question 5"}], "max_tokens": 50, "temperature": 0.5,
            "top_p": 0.9, "seed": (2**40 + 5) % 2**31, "stop": ["<|user|>", "<|observation|>", "<|endoftext|>"], "stream": False,
        }
    ]  # fmt: skip


def test_many_requests_share_a_few_connections(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    completions = list(engine_for(server, tokenizer).generate(request(index) for index in range(60)))
    assert {completion.request_id for completion in completions} == {f"r{index}" for index in range(60)}
    assert len(server.connections) <= 4


def test_the_key_comes_from_the_named_variable(
    server: Server, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "abc")
    list(engine_for(server, tokenizer, api_key_env="MY_KEY").generate([request()]))
    assert server.keys == ["Bearer abc"]


def test_a_busy_server_is_asked_again(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    server.reply = lambda body: (503, {}) if len(server.bodies) < 3 else (200, said(content="ok"))
    (completion,) = engine_for(server, tokenizer).generate([request()])
    assert completion.finish_reason == "stop" and len(server.bodies) == 3


def test_a_server_that_stays_busy_aborts_the_request_and_not_the_run(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    server.reply = lambda body: (429, {}) if "question 1" in body["messages"][0]["content"] else (200, said(content="ok"))
    completions = {c.request_id: c for c in engine_for(server, tokenizer).generate([request(0), request(1), request(2)])}
    assert [completions[f"r{index}"].finish_reason for index in range(3)] == ["stop", "abort", "stop"]
    assert completions["r1"].token_ids == () and len(server.bodies) == 2 + ATTEMPTS


def test_a_refused_request_is_one_clear_line(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    server.reply = lambda body: (400, {"error": "max_tokens is too large"})
    with pytest.raises(UnusableInput, match=r"HTTP 400: .*max_tokens is too large"):
        list(engine_for(server, tokenizer).generate([request()]))
    server.reply = lambda body: (401, {"error": "no key"})
    with pytest.raises(UnusableInput, match=r"HTTP 401: .*set OPENAI_API_KEY"):
        list(engine_for(server, tokenizer).generate([request()]))


def test_load_tells_a_wrong_address_before_anything_is_asked(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    engine_for(server, tokenizer).load()
    nowhere = HttpEngine(schema.HttpEngine(base_urls=("http://127.0.0.1:9/v1",)), "tiny", tokenizer)
    with pytest.raises(UnusableInput, match="no answer"):
        nowhere.load()


@pytest.mark.parametrize(
    ("answer", "opens_think", "expected"),
    [
        (said(content="4", reasoning_content="2+2"), True, ("stop", "2+2</think>4")),
        (said(content="4", reasoning="2+2"), True, ("stop", "2+2</think>4")),
        (said(content="4", reasoning="2+2"), False, ("stop", "<think>2+2</think>4")),
        (said(content="<think>2+2</think>4"), True, ("stop", "2+2</think>4")),
        (said(content="<think>2+2</think>4"), False, ("stop", "<think>2+2</think>4")),
        (said(content="2+2 and on"), True, ("stop", "2+2 and on")),
        (said(content=None, reasoning="2+2 and on"), True, ("stop", "2+2 and on")),
        (said(content="4"), False, ("stop", "4")),
        (said("length", content=None, reasoning="2+"), True, ("length", "2+")),
        (said("length", content="2+"), True, ("length", "2+")),
        (said("length", content="The ans", reasoning="2+2"), True, ("length", "2+2</think>The ans")),
        (said("content_filter", content="4"), True, ("abort", "")),
        ({"choices": [], "usage": {"completion_tokens": 3}}, True, ("abort", "")),
    ],
)
def test_think_tags_are_put_back_where_a_parser_cut_them_off(
    answer: dict[str, Any], opens_think: bool, expected: tuple[str, str]
) -> None:
    assert read_choice(answer, opens_think) == expected
