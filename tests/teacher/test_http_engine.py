"""The http engine against a server that behaves, over real sockets: what is asked, how much at once, what is kept."""

import dataclasses
import gc
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import schema
from configs.errors import UnusableInput
from data.engine import Handout, Partial, Request
from teacher.http_engine import HttpEngine
from tests.teacher.http_asks import CLOSE, STOP, ask, by_id, engine_for, request, tokenizer
from tests.teacher.mock_server import Asked, MockServer, Reply, completed, encoded, events, said, serving, token

OUTPUT = 40


@pytest.fixture
def server() -> Iterator[MockServer]:
    with serving() as found:
        yield found


def by_ids(asked: Asked) -> Reply:
    """OUTPUT letters that depend on the request's id and the position alone, from where the prompt ends."""
    position = len(asked.body["prompt"]) - 2
    end = min(OUTPUT, position + asked.body["max_tokens"])
    ids = [token(asked.request_id, index) for index in range(position, end)]
    chunks = [completed([one], None) for one in ids]
    if not asked.body["stream"]:
        return Reply(body=encoded(completed(ids + [STOP] * (end == OUTPUT), "stop" if end == OUTPUT else "length")))
    return Reply(events=events([*chunks, completed([STOP], "stop")] if end == OUTPUT else [*chunks, completed([], "length")]))


def whole(request_id: str) -> tuple[int, ...]:
    return (*(token(request_id, index) for index in range(OUTPUT)), STOP)


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_a_chat_body_says_what_the_recipe_asks(server: MockServer) -> None:
    ask(engine_for(server), request(5))
    assert server.bodies == [
        {
            "model": "tiny", "messages": [{"role": "user", "content": "question 5"}], "max_tokens": 50, "temperature": 0.5,
            "top_p": 0.9, "seed": (2**40 + 5) % 2**31, "stop": ["<|user|>", "<|observation|>", "<|endoftext|>"], "stream": False,
        }
    ]  # fmt: skip
    ask(engine_for(server, logprobs=True, top_logprobs=5), request(top_k=7))
    assert server.bodies[1].items() >= {"logprobs": True, "top_logprobs": 5, "top_k": 7}.items()


def test_a_chat_server_sees_the_prompts_tools(server: MockServer) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    ask(engine_for(server), dataclasses.replace(request(0), tools=json.dumps(tools)), request(1))
    assert [body.get("tools") for body in server.bodies] == [tools, None]


def test_headers_name_the_request_the_model_and_the_prompts_version(server: MockServer) -> None:
    ask(engine_for(server), request(prompt_version="plan\n@é1"))
    headers = server.asked[0].headers
    assert headers["x-tracestill-request-id"] == "r0" and headers["x-tracestill-model-id"] == "tiny"
    assert headers["x-tracestill-prompt-version"] == "plan%0A@%C3%A91"


def test_a_completion_by_ids_sends_the_prompts_ids_and_takes_the_servers(server: MockServer) -> None:
    server.reply = by_ids
    (completion,) = ask(engine_for(server, api="completions"), request())
    assert completion.token_ids == whole("r0") and completion.finish_reason == "stop"
    body = server.bodies[0]
    assert body["prompt"] == [1, 2] and body["max_tokens"] == 50 and body["stop_token_ids"] == [STOP]
    assert body["return_token_ids"] is True and server.asked[0].path == "/v1/completions"


def test_a_prefix_is_continued_with_the_budget_that_remains(server: MockServer) -> None:
    """Pitfall 11: a rollout that is resumed with its full budget overruns the context."""
    server.reply = by_ids
    engine = engine_for(server, api="completions")
    prefix = whole("r0")[:15]
    (completion,) = ask(engine, request(prefix_ids=prefix, max_tokens=30, min_tokens=20))
    assert completion.token_ids == whole("r0")[:30] and completion.finish_reason == "length"
    body = server.bodies[0]
    assert (body["prompt"], body["max_tokens"], body["min_tokens"]) == ([1, 2, *prefix], 15, 5)


def test_a_prefix_that_is_already_whole_costs_nothing(server: MockServer) -> None:
    engine = engine_for(server, api="completions")
    found = by_id(ask(engine, request(0, prefix_ids=(9, STOP)), request(1, prefix_ids=(9,) * 50)))
    assert (found["r0"].finish_reason, found["r0"].token_ids) == ("stop", (9, STOP))
    assert (found["r1"].finish_reason, len(found["r1"].token_ids)) == ("length", 50)
    assert server.asked == []


def test_reasoning_is_closed_at_its_budget_and_the_answer_gets_the_rest(server: MockServer) -> None:
    kept: list[bytes] = []
    server.reply = by_ids
    engine = engine_for(server, api="completions", price_output_per_million=1e6)
    asked = request(reasoning_budget=13, reasoning_end=CLOSE, max_tokens=60)
    (completion,) = ask(engine, asked, handout=Handout(keep=lambda _, raw: kept.append(raw)))
    assert [body["max_tokens"] for body in server.bodies] == [12, 47]
    assert completion.token_ids == (*whole("r0")[:12], CLOSE, *whole("r0")[13:])
    assert completion.finish_reason == "stop" and completion.cost == pytest.approx(12 + 28)
    first, last = (engine.read(asked, raw) for raw in kept)
    assert (first.error, first.token_ids) == ("unfinished", whole("r0")[:12]) and last.token_ids == completion.token_ids


def test_reasoning_that_closes_early_needs_no_second_ask(server: MockServer) -> None:
    server.reply = lambda asked: Reply(body=encoded(completed([9, CLOSE, 8, STOP])))
    (completion,) = ask(engine_for(server, api="completions"), request(reasoning_budget=13))
    assert completion.token_ids == (9, CLOSE, 8, STOP) and len(server.asked) == 1
    server.reply = lambda asked: Reply(body=encoded(completed([9, CLOSE, 8] if len(server.asked) == 2 else [7, STOP],
                                                              "length" if len(server.asked) == 2 else "stop")))  # fmt: skip
    (completion,) = ask(engine_for(server, api="completions"), request(reasoning_budget=4))
    assert completion.token_ids == (9, CLOSE, 8, 7, STOP)  # the answer had begun: nothing is forced into it


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reasoning_budget": 5}, "api=completions"),
        ({"stop_strings": ("a", "b")}, "sampling.stop_strings"),
        ({"loop_guard": (1, 3)}, "sampling.loop_guard"),
    ],
)
def test_what_the_protocol_cannot_carry_is_refused_in_one_line(server: MockServer, changes: dict, words: str) -> None:
    with pytest.raises(UnusableInput, match=words):
        ask(engine_for(server), request(**changes))


# --- how much at once ------------------------------------------------------------------------------------------------


def test_many_requests_share_a_few_connections(server: MockServer) -> None:
    completions = ask(engine_for(server), *(request(index) for index in range(60)))
    assert {completion.request_id for completion in completions} == {f"r{index}" for index in range(60)}
    assert server.connections <= 4


def test_more_than_a_thousand_connections_at_once(server: MockServer) -> None:
    """Pitfall 9: clients that stop at 100, or at 1,024 open files, or at a thread each."""
    server.full = 1100
    server.reply = lambda asked: Reply(body=encoded(said(content="4")), hold=True)
    before = threading.active_count()
    threads = 0

    def requests() -> Iterator[Request]:
        nonlocal threads
        for index in range(1300):
            threads = max(threads, threading.active_count())
            yield request(index)

    completions = list(engine_for(server, concurrency=1100, deadline_s=100.0).generate(requests()))
    assert len(completions) == 1300 and {completion.finish_reason for completion in completions} == {"stop"}
    # A connection that was lost on a busy machine is opened again: 1,101 were counted once; one a request would be 1,300.
    assert 1024 < server.peak <= 1100 and server.connections <= 1110 and threads - before <= 4


def test_requests_are_pulled_only_when_there_is_room(server: MockServer) -> None:
    server.reply = lambda asked: Reply(body=encoded(said(content="4")), wait_s=0.05)
    pulled: list[int] = []

    def requests() -> Iterator[Request]:
        for index in range(100):
            pulled.append(index)
            yield request(index)

    completions = engine_for(server, concurrency=3).generate(requests())
    next(completions)
    assert server.peak <= 3 and len(pulled) <= 9  # three with the server, and those whose replies are being parsed
    completions.close()


def test_a_slow_source_does_not_keep_what_is_there_waiting(server: MockServer) -> None:
    def requests() -> Iterator[Request]:
        for index in range(6):
            time.sleep(0.1)
            yield request(index)

    started, came = time.monotonic(), []
    for _ in engine_for(server).generate(requests()):
        came.append(time.monotonic() - started)
    assert len(came) == 6 and came[0] < came[-1] - 0.1  # not all at the end


def test_a_callers_long_pause_is_no_ones_timeout(server: MockServer) -> None:
    """The loop's clock stands still while the caller commits; replies wait in the sockets and are not lost."""
    server.reply = lambda asked: Reply(body=encoded(said(content="4")), wait_s=0.05)
    completions = engine_for(server, deadline_s=0.5, timeout_s=0.4).generate(request(index) for index in range(8))
    found = [next(completions)]
    time.sleep(0.8)
    found += completions
    assert [completion.error for completion in found] == [""] * 8 and len(server.asked) == 8


def test_an_error_of_the_source_comes_back_after_what_was_paid_for(server: MockServer) -> None:
    def requests() -> Iterator[Request]:
        yield request(0)
        yield request(1)
        raise OSError("the lease folder is gone")

    completions = engine_for(server).generate(requests())
    assert {next(completions).request_id, next(completions).request_id} == {"r0", "r1"}
    with pytest.raises(OSError, match="lease folder"):
        next(completions)


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_every_reply_is_kept_before_it_is_parsed_and_reads_the_same_later(server: MockServer) -> None:
    kept: dict[str, bytes] = {}
    server.reply = lambda asked: Reply(body=b"no json" if asked.request_id == "r1" else encoded(said(content="4 é")))
    requests = [request(index) for index in range(3)]
    engine = engine_for(server, attempts=1)
    found = by_id(ask(engine, *requests, handout=Handout(keep=kept.__setitem__)))
    assert kept["r1"].endswith(b"\nno json") and found["r1"].error == "bad_reply"
    elsewhere = HttpEngine(schema.HttpEngine(), "tiny", tokenizer())
    for one in (requests[0], requests[2]):
        assert elsewhere.read(one, kept[one.request_id]).token_ids == found[one.request_id].token_ids


def test_a_disk_that_cannot_keep_ends_the_run_with_its_own_error(server: MockServer) -> None:
    def full(request_id: str, raw: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        ask(engine_for(server), request(), handout=Handout(keep=full))


# --- stopping --------------------------------------------------------------------------------------------------------


def stream_slowly(asked: Asked) -> Reply:
    reply = by_ids(asked)
    return Reply(events=reply.events, pause_s=0.02)


def test_stopping_asks_nothing_more_and_waits_for_what_is_in_flight(server: MockServer) -> None:
    server.reply = lambda asked: Reply(body=encoded(said(content="4")), wait_s=0.3)
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    found = ask(engine_for(server), *(request(index) for index in range(50)), handout=Handout(stop=stop.is_set))
    assert len(found) == len(server.asked) == 4 and {one.finish_reason for one in found} == {"stop"}


def test_what_does_not_end_within_the_drain_is_handed_out_as_far_as_it_came(server: MockServer) -> None:
    server.reply = stream_slowly
    partials: dict[str, Partial] = {}
    kept: list[bytes] = []
    stop = threading.Event()
    threading.Timer(0.15, stop.set).start()
    engine = engine_for(server, api="completions", stream=True, drain_s=0.2)
    handout = Handout(
        stop=stop.is_set, take=lambda one: partials.update({one.request_id: one}), keep=lambda _, raw: kept.append(raw)
    )
    started = time.monotonic()
    assert ask(engine, request(0), request(1), handout=handout) == []
    assert time.monotonic() - started < 0.8
    for name in ("r0", "r1"):
        ids = partials[name].token_ids
        assert 5 < len(ids) < OUTPUT and ids == whole(name)[: len(ids)]
    assert sorted(engine.read(request(0), raw).error for raw in kept) == ["torn", "torn"]


def test_partial_outputs_are_handed_out_every_few_tokens_and_can_be_continued(server: MockServer) -> None:
    server.reply = stream_slowly
    partials: list[Partial] = []
    engine = engine_for(server, api="completions", stream=True)
    (completion,) = ask(engine, request(), handout=Handout(every_tokens=10, take=partials.append))
    assert completion.token_ids == whole("r0")
    assert [len(partial.token_ids) for partial in partials] == [10, 20, 30, 40]
    (again,) = ask(engine, request(prefix_ids=partials[1].token_ids))
    assert again.token_ids == completion.token_ids and server.bodies[-1]["max_tokens"] == 30


def test_text_without_the_servers_ids_is_no_beginning_to_go_on_from(server: MockServer) -> None:
    """Our tokenizer's cut of half a text need not be the model's."""
    chunks = [{"choices": [{"index": 0, "text": "ab", "finish_reason": None}]}] * 6
    server.reply = lambda asked: Reply(events=events(chunks), cut=6, pause_s=0.01)
    partials, kept = list[Partial](), list[bytes]()
    engine = engine_for(server, api="completions", stream=True, attempts=2)
    handout = Handout(every_tokens=3, take=partials.append, keep=lambda _, raw: kept.append(raw))
    (completion,) = ask(engine, request(), handout=handout)
    assert partials == [] and completion.error == "torn" and not completion.may_continue
    assert [body["prompt"] for body in server.bodies] == [list(request().prompt_ids)] * 2
    assert [engine.read(request(), raw).may_continue for raw in kept] == [False, False]


def test_partial_text_of_a_chat_stream_is_counted_by_our_tokenizer(server: MockServer) -> None:
    chunks = [{"choices": [{"index": 0, "delta": {"reasoning_content": "ab"}, "finish_reason": None}]}] * 6
    server.reply = lambda asked: Reply(events=events(chunks), cut=6, pause_s=0.01)
    partials: list[Partial] = []
    ask(engine_for(server, stream=True, attempts=1), request(), handout=Handout(every_tokens=3, take=partials.append))
    assert [tokenizer().decode(list(partial.token_ids)) for partial in partials] == ["ab" * 3, "ab" * 6]


def test_closing_the_generator_leaves_no_task_no_socket_and_no_thread(
    server: MockServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda asked: Reply(body=encoded(said(content="4")), wait_s=0.0 if asked.request_id == "r0" else 30.0)
    before = threading.active_count()
    completions = engine_for(server, concurrency=20).generate(request(index) for index in range(50))
    assert next(completions).request_id == "r0"
    sockets = len(_sockets())
    completions.close()
    gc.collect()
    assert len(_sockets()) <= sockets - 10 and threading.active_count() <= before
    for _ in range(3):
        del completions
        completions = engine_for(server, concurrency=20).generate(request(index) for index in range(50))
        next(completions)
    del completions
    gc.collect()
    said_by_asyncio = capfd.readouterr().err
    assert not said_by_asyncio, said_by_asyncio


def _sockets() -> list[Path]:
    folder = Path("/proc/self/fd")
    return [path for path in folder.iterdir() if os.path.lexists(path) and "socket" in _target(path)]


def _target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""
