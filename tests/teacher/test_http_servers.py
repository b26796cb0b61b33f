"""Several servers: the least loaded healthy one is asked; they may die, come back, come and go; none may change its model."""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs import schema
from configs.errors import UnusableInput
from configs.load import load_recipe
from data.engine import Handout, Request
from teacher.folders import fingerprint_teacher
from teacher.http.listening import BACKLOG
from teacher.http_engine import HttpEngine
from tests.teacher.http_asks import ask, engine_for, request, tokenizer
from tests.teacher.mock_server import Asked, MockServer, Reply, encoded, said

GOOD = said(content="4", reasoning_content="2+2")


@pytest.fixture
def servers() -> Iterator[list[MockServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(MockServer(lambda asked: Reply(body=encoded(GOOD), wait_s=0.01))) for _ in range(3)]


def engine_of(servers: list[MockServer], **changes: Any) -> HttpEngine:
    return engine_for(servers[0], **({"base_urls": tuple(server.url for server in servers), "health_s": 0.1} | changes))


# --- before the first request ----------------------------------------------------------------------------------------


def test_load_tells_a_wrong_address_before_anything_is_asked(servers: list[MockServer]) -> None:
    engine_for(servers[0]).load()
    with pytest.raises(UnusableInput, match=r"base_urls: no answer \(http://127.0.0.1:9/v1: .*refused.*\); start a server"):
        HttpEngine(schema.HttpEngine(base_urls=("http://127.0.0.1:9/v1",)), "tiny", tokenizer()).load()


def test_one_server_of_several_is_enough_to_start(servers: list[MockServer]) -> None:
    servers[1].vanish()
    engine = engine_of(servers[:2])
    engine.load()
    assert len(ask(engine, request(0), request(1))) == 2 and len(servers[0].asked) == 2


def test_a_server_without_the_recipes_model_is_named_with_what_it_has(servers: list[MockServer]) -> None:
    servers[0].models = Reply(body=encoded({"data": [{"id": "other"}]}))
    with pytest.raises(UnusableInput, match="serves other and not tiny; set teacher.engine.model"):
        engine_for(servers[0]).load()


@pytest.mark.parametrize(
    "answer", [Reply(404), Reply(500), Reply(body=b"<html>"), Reply(body=b'{"data": []}'), Reply(body=b'{"data": [3]}')], ids=str
)
def test_a_list_that_cannot_be_read_says_nothing_against_a_server(servers: list[MockServer], answer: Reply) -> None:
    servers[0].models = answer
    engine_for(servers[0]).load()


def test_a_refused_key_shows_when_loading(servers: list[MockServer]) -> None:
    servers[0].models = Reply(401, b"no key")
    with pytest.raises(UnusableInput, match="HTTP 401: no key; set OPENAI_API_KEY in the environment"):
        engine_for(servers[0]).load()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://user:secret@host/v1", "user name or password"), ("http://host/v1?key=secret", "query"),
        ("host:8000/v1", "not a URL"), ("ftp://host/v1", "not a URL"), ("http://host:x/v1", "not a URL"), ("", "not a URL"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_used_is_refused_without_repeating_it(url: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        schema.HttpEngine(base_urls=(url,))
    with pytest.raises(UnusableInput, match=words) as caught:
        load_recipe("embedded", [f"teacher.engine={{type: http, base_urls: ['{url}']}}"])
    assert "secret" not in str(caught.value)


def test_the_old_name_of_the_key_is_pointed_to_the_new_one() -> None:
    with pytest.raises(UnusableInput, match="did you mean base_urls"):
        load_recipe("embedded", ["teacher.engine={type: http, base_url: 'http://host/v1'}"])


def test_addresses_are_no_part_of_who_the_teacher_is_but_its_name_and_precision_are() -> None:
    def fingerprint(**changes: Any) -> str:
        return fingerprint_teacher(schema.Teacher(engine=schema.HttpEngine(**changes)))

    assert fingerprint() == fingerprint(base_urls="http://elsewhere/v1", concurrency=5) == fingerprint(servers_file="hosts")
    assert len({fingerprint(), fingerprint(model="x"), fingerprint(dtype="fp8"), fingerprint(api="completions")}) == 4


# --- while it runs ---------------------------------------------------------------------------------------------------


def test_requests_spread_by_load_and_a_slow_server_gets_fewer(servers: list[MockServer]) -> None:
    servers[0].reply = lambda asked: Reply(body=encoded(GOOD), wait_s=0.1)
    ask(engine_of(servers, concurrency=9), *(request(index) for index in range(120)))
    slow, *quick = (len(server.asked) for server in servers)
    assert slow < min(quick) * 0.8 and max(server.peak for server in servers) <= 9


def test_a_server_that_dies_and_comes_back_costs_no_request(servers: list[MockServer], caplog: pytest.LogCaptureFixture) -> None:
    def kill_and_revive() -> None:
        time.sleep(0.2)
        servers[0].vanish()
        time.sleep(0.4)
        before.append(len(servers[0].asked))
        servers[0].listen()

    before: list[int] = []
    thread = threading.Thread(target=kill_and_revive)
    thread.start()

    def requests() -> Iterator[Request]:
        for index in range(300):
            time.sleep(0.005)
            yield request(index)

    with caplog.at_level(logging.WARNING):
        found = list(engine_of(servers[:2]).generate(requests()))
    thread.join()
    assert len(found) == 300 and {one.finish_reason for one in found} == {"stop"}
    assert len(servers[0].asked) > before[0] > 0
    assert "refused" in caplog.text and "answers again" in caplog.text


def test_with_every_server_gone_requests_wait_for_one_to_come_back(servers: list[MockServer]) -> None:
    servers[0].vanish()
    threading.Timer(0.5, servers[0].listen).start()
    found = ask(engine_of(servers[:1]), *(request(index) for index in range(5)))
    assert {one.finish_reason for one in found} == {"stop"}


def test_with_no_server_until_the_deadline_the_abort_says_no_server(servers: list[MockServer]) -> None:
    servers[0].vanish()
    (completion,) = ask(engine_of(servers[:1], deadline_s=0.5), request())
    assert (completion.finish_reason, completion.error) == ("abort", "no_server")


def test_a_gateway_without_its_server_counts_as_down(servers: list[MockServer]) -> None:
    servers[0].models = Reply(503)
    engine = engine_of(servers[:2])
    engine.load()
    ask(engine, *(request(index) for index in range(10)))
    assert len(servers[0].asked) == 0 and len(servers[1].asked) == 10


def test_a_busy_server_hands_its_requests_to_another(servers: list[MockServer]) -> None:
    servers[0].reply = lambda asked: Reply(429, headers={"Retry-After": "30"})
    found = ask(engine_of(servers[:2], deadline_s=5.0), *(request(index) for index in range(40)))
    assert {one.finish_reason for one in found} == {"stop"} and len(servers[0].asked) <= 4


# --- servers that come and go ----------------------------------------------------------------------------------------


def test_servers_may_be_named_in_a_file_that_changes(servers: list[MockServer], tmp_path: Path) -> None:
    path = tmp_path / "servers.txt"
    path.write_text(f"# node one\n{servers[0].url}/  # first\n\n")
    for server in servers:
        server.reply = lambda asked: Reply(body=encoded(GOOD), wait_s=0.04)
    engine = engine_of(servers, base_urls=(), servers_file=str(path))
    engine.load()

    def requests() -> Iterator[Request]:
        for index in range(150):
            if index == 50:
                path.write_text(f"{servers[1].url}\n")
            if index == 100:
                path.write_text("http://bad url:x\n")  # a wrong line must not end the run
            yield request(index)

    found = list(engine.generate(requests()))
    assert {one.finish_reason for one in found} == {"stop"}
    assert len(servers[0].asked) > 40 and len(servers[1].asked) > 40
    assert {asked.request_id for asked in servers[0].asked[-5:]}.isdisjoint({f"r{index}" for index in range(120, 150)})


def test_servers_may_register_in_a_folder(servers: list[MockServer], tmp_path: Path) -> None:
    """One file a server, renewed by its job; what a dead node has left behind is too old."""
    threading.Timer(0.5, lambda: (tmp_path / "7.url").write_text(f"{servers[0].url}\n")).start()  # it is waited for
    (tmp_path / "8.url").write_text("http://127.0.0.1:9/v1\n")
    os.utime(tmp_path / "8.url", (time.time() - 90, time.time() - 90))
    (tmp_path / ".9.url.tmp").write_text("http://127.0.0.1:10/v1\n")
    for server in servers:
        server.reply = lambda asked: Reply(body=encoded(GOOD), wait_s=0.04)
    engine = engine_of(servers, base_urls=(), servers_file=str(tmp_path))
    engine.load()
    assert [server.url for server in engine.servers.listed] == [servers[0].url]

    def requests() -> Iterator[Request]:
        for index in range(100):
            if index == 50:
                (tmp_path / "7.url").unlink()
                (tmp_path / "10.url").write_text(f"{servers[1].url}\n")
            yield request(index)

    found = list(engine.generate(requests()))
    assert {one.finish_reason for one in found} == {"stop"}
    assert servers[0].asked and servers[1].asked
    assert sorted(path.name for path in tmp_path.glob("*.url")) == ["10.url", "8.url"]


def test_a_servers_file_that_is_missing_or_wrong_is_one_line(servers: list[MockServer], tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"servers_file .*cannot be read; expected one URL a line"):
        engine_of(servers, servers_file=str(tmp_path / "none")).load()
    (tmp_path / "hosts").write_text("http://a/v1\nhttp://me:secret@b/v1\n")
    with pytest.raises(UnusableInput, match="line 2: holds a user name or password") as caught:
        engine_of(servers, servers_file=str(tmp_path / "hosts")).load()
    assert "secret" not in str(caught.value)


# --- a model that changes --------------------------------------------------------------------------------------------


def changing(asked: Asked) -> Reply:
    model = "tiny-v1" if int(asked.request_id[1:]) < 20 else "tiny-v2"
    return Reply(body=encoded(GOOD | {"model": model}), wait_s=0.01)


def test_a_server_whose_replies_name_another_model_ends_the_run(servers: list[MockServer]) -> None:
    servers[0].reply = changing
    came = []
    with pytest.raises(UnusableInput, match=rf"{servers[0].url}: its model changed .* was 'tiny-v1', is 'tiny-v2'"):
        for completion in engine_for(servers[0]).generate(request(index) for index in range(400)):
            came.append(completion.request_id)
    in_flight = 4 + BACKLOG  # asked, or kept and not yet read
    assert set(came) <= {f"r{index}" for index in range(20)} and len(servers[0].asked) <= 20 + in_flight


@pytest.mark.parametrize("told_by", ["replies", "lists"])
def test_a_server_that_changes_its_model_between_two_workers_is_refused_too(
    servers: list[MockServer], tmp_path: Path, told_by: str
) -> None:
    def serves(name: str) -> None:
        if told_by == "replies":
            servers[0].reply = lambda asked: Reply(body=encoded(GOOD | {"model": name}))
        else:
            servers[0].models = Reply(body=encoded({"data": [{"id": "tiny", "root": f"/models/{name}"}]}))

    def work() -> None:
        engine = engine_for(servers[0])
        engine.remember_in(tmp_path / "servers")
        engine.load()
        assert len(ask(engine, request())) == 1

    serves("v1")
    work()
    work()
    serves("v2")
    with pytest.raises(UnusableInput, match=rf"{servers[0].url}: its model changed during the run: was '.*v1', is '.*v2'"):
        work()
    assert {json.loads(path.read_text())["url"] for path in (tmp_path / "servers").iterdir()} == {servers[0].url}


def test_of_two_workers_that_start_together_the_second_believes_the_first(servers: list[MockServer], tmp_path: Path) -> None:
    """Neither found anything written when it began; the model changed between their first replies."""
    first, second = engine_for(servers[0]), engine_for(servers[0])
    for engine in (first, second):
        engine.remember_in(tmp_path / "servers")
    servers[0].reply = lambda asked: Reply(body=encoded(GOOD | {"model": "v1"}))
    assert len(ask(first, request())) == 1
    servers[0].reply = lambda asked: Reply(body=encoded(GOOD | {"model": "v2"}))
    with pytest.raises(UnusableInput, match="its model changed during the run: was 'v1', is 'v2'"):
        ask(second, request())


def test_a_reply_of_another_model_that_was_kept_does_not_count_for_whoever_reads_it_later(
    servers: list[MockServer], tmp_path: Path
) -> None:
    """It is on the disk before anybody can know who gave it, and the worker that found out is gone."""
    kept = list[bytes]()
    engine = engine_for(servers[0], concurrency=1)
    engine.remember_in(tmp_path / "servers")
    for model in ("v1", "v2"):
        servers[0].reply = lambda asked, model=model: Reply(body=encoded(GOOD | {"model": model}))
        with contextlib.suppress(UnusableInput):
            ask(engine, request(), handout=Handout(keep=lambda _, raw: kept.append(raw)))
    heir = engine_for(servers[0], base_urls=servers[1].url)  # which does not even know that server
    heir.remember_in(tmp_path / "servers")
    assert [heir.read(request(), raw).error for raw in kept] == ["", "other_model"]


def test_a_server_that_lists_another_model_than_before_ends_the_run(servers: list[MockServer]) -> None:
    server = servers[0]

    def requests() -> Iterator[Request]:
        for index in range(200):
            if index == 20:
                server.models = Reply(body=encoded({"data": [{"id": "other"}]}))
            time.sleep(0.01)
            yield request(index)

    with pytest.raises(UnusableInput, match="was 'tiny', is 'other'"):
        list(engine_of([server]).generate(requests()))


def test_an_alias_whose_folder_changes_is_another_model(servers: list[MockServer]) -> None:
    engine = engine_for(servers[0])
    servers[0].models = Reply(body=json.dumps({"data": [{"id": "tiny", "root": "/a"}]}).encode())
    engine.load()
    servers[0].models = Reply(body=json.dumps({"data": [{"id": "tiny", "root": "/b"}]}).encode())
    with pytest.raises(UnusableInput, match="was '/a', is '/b'"):
        engine.load()


def test_each_server_may_have_an_alias_of_its_own(servers: list[MockServer]) -> None:
    for index, server in enumerate(servers):
        reply = Reply(body=encoded(GOOD | {"model": f"alias-{index}"}))
        server.reply = lambda asked, reply=reply: reply
    assert len(ask(engine_of(servers), *(request(index) for index in range(30)))) == 30
