"""The key is in the headers of requests and nowhere else."""

import logging
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from data.engine import Handout
from tests.teacher.http_asks import ask, engine_for, request
from tests.teacher.mock_server import Reply, encoded, said, serving

KEY = "sk-very-secret-1234567890"
PASSWORD = "proxy-password-42"


def test_the_key_comes_from_the_named_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving() as server:
        engine = engine_for(server, api_key_env="MY_KEY")
        engine.load()
        ask(engine, request())
        assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    with serving() as server:
        ask(engine_for(server), request())
        assert "authorization" not in server.asked[0].headers


def test_nothing_that_a_run_writes_or_says_holds_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A hostile server quotes the key in replies, in refusals and in the list of its models."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said_aloud: list[str] = []
    with caplog.at_level(logging.DEBUG), serving() as server:
        engine = engine_for(server, stream=False, attempts=1)
        server.reply = lambda asked: Reply(body=encoded(said(content=f"you sent {asked.headers['authorization']}")))
        handout = Handout(keep=lambda name, raw: (tmp_path / name).write_bytes(raw) and None)  # type: ignore[func-returns-value]
        said_aloud += map(repr, ask(engine, request(0), request(1), handout=handout))
        server.reply = lambda asked: Reply(500, f"no: {KEY}".encode()) if len(server.asked) < 6 else Reply(429, reset=True)
        said_aloud += map(repr, ask(engine_for(server, deadline_s=0.3), request(2), handout=handout))
        for status in (401, 400):
            server.reply = lambda asked, status=status: Reply(status, f"Incorrect API key provided: {KEY}".encode())
            with pytest.raises(UnusableInput) as caught:
                engine = engine_for(server)
                ask(engine, *(request(index) for index in range(20)), handout=handout)
            said_aloud += [str(caught.value), repr(caught.value), *_chain(caught.value)]
        said_aloud += [repr(engine), repr(vars(engine)), engine.version, repr(engine.servers.all)]
        server.models = Reply(403, f"bad {KEY}".encode())
        with pytest.raises(UnusableInput) as caught:
            engine.load()
        said_aloud.append(str(caught.value))
    written = [path.read_text() for path in tmp_path.iterdir()]
    assert len(written) == 2 and "you sent Bearer ***" in written[0]
    for text in (*written, *said_aloud, caplog.text):
        assert KEY not in text


def test_a_proxys_password_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:{PASSWORD}@127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with serving() as server:
        with pytest.raises(UnusableInput, match="the proxy of the environment does not answer") as caught:
            engine_for(server).load()
        assert PASSWORD not in "".join([str(caught.value), *_chain(caught.value)])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        engine_for(server).load()


def _chain(error: BaseException) -> list[str]:
    """What a traceback would show of the errors behind this one."""
    behind = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [repr(behind), *_chain(behind)] if behind else []
