"""The http engine against a server that misbehaves: nothing paid for is lost, nothing torn is passed off as whole."""

import time
from collections.abc import Callable, Iterator
from email.utils import formatdate

import pytest

from configs.errors import UnusableInput
from data.engine import Completion, Handout, Partial
from teacher.http.listening import BACKLOG
from tests.teacher.http_asks import ask, by_id, engine_for, request
from tests.teacher.mock_server import Asked, MockServer, Reply, completed, encoded, events, said, serving
from tests.teacher.test_http_engine import by_ids, whole

GOOD = Reply(body=encoded(said(content="4", reasoning_content="2+2")))


@pytest.fixture
def server() -> Iterator[MockServer]:
    with serving() as found:
        yield found


def first(count: int, bad: Reply, then: Reply = GOOD) -> Callable[[Asked], Reply]:
    """`bad` for the first so many asks of each request."""
    asks: dict[str, int] = {}

    def reply(asked: Asked) -> Reply:
        asks[asked.request_id] = asks.get(asked.request_id, 0) + 1
        return bad if asks[asked.request_id] <= count else then

    return reply


# --- refusals that cost nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        Reply(429), Reply(500), Reply(502), Reply(503), Reply(408), Reply(529), Reply(429, headers={"Retry-After": "0"}),
        Reply(429, headers={"Retry-After": "nonsense"}), Reply(reset=True), Reply(500, b"x" * 9, length=99, cut=9),
    ],
    ids=str,
)  # fmt: skip
def test_a_busy_or_broken_server_is_asked_again_for_nothing(server: MockServer, bad: Reply) -> None:
    server.reply = first(6, bad)
    kept: list[bytes] = []
    (completion,) = ask(engine_for(server, attempts=1), request(), handout=Handout(keep=lambda _, raw: kept.append(raw)))
    assert completion.finish_reason == "stop" and len(server.asked) == 7 and len(kept) == 1


@pytest.mark.parametrize("header", ["0.4", "date"])
def test_retry_after_is_honoured_in_seconds_and_as_a_date(server: MockServer, header: str) -> None:
    value = formatdate(time.time() + 1.9, usegmt=True) if header == "date" else header  # dates have whole seconds
    server.reply = first(1, Reply(429, headers={"Retry-After": value}))
    started = time.monotonic()
    (completion,) = ask(engine_for(server), request())
    assert completion.finish_reason == "stop" and 0.39 < time.monotonic() - started < 3.0


def test_a_server_that_asks_for_quiet_longer_than_the_deadline_ends_the_request_at_the_deadline(server: MockServer) -> None:
    server.reply = first(9, Reply(429, headers={"Retry-After": "3600"}))
    started = time.monotonic()
    (completion,) = ask(engine_for(server, deadline_s=0.5), request())
    assert (completion.finish_reason, completion.error) == ("abort", "busy")
    assert 0.4 < time.monotonic() - started < 1.5 and len(server.asked) == 1


def test_a_server_that_stays_busy_aborts_the_request_and_not_the_run(server: MockServer) -> None:
    server.reply = lambda asked: Reply(429) if asked.request_id == "r1" else GOOD
    found = by_id(ask(engine_for(server, deadline_s=0.7), request(0), request(1), request(2)))
    assert [found[f"r{index}"].finish_reason for index in range(3)] == ["stop", "abort", "stop"]
    assert (found["r1"].error, found["r1"].token_ids) == ("busy", ())


def test_concurrency_falls_on_refusals_and_rises_again(server: MockServer) -> None:
    """A server that takes 6 at once: 24 are tried, few are refused in the end, and it is kept busy."""

    def reply(asked: Asked) -> Reply:
        return Reply(429) if server.inside > 6 else Reply(body=GOOD.body, wait_s=0.02)

    server.reply = reply
    engine = engine_for(server, concurrency=24)
    assert {one.finish_reason for one in ask(engine, *(request(index) for index in range(240)))} == {"stop"}
    refused = len(server.asked) - 240
    window = next(iter(engine.servers.all.values())).window
    assert window.size < 24 and refused < 240
    server.reply = lambda asked: GOOD
    ask(engine, *(request(index) for index in range(400)))
    assert window.size == 24


# --- silence ---------------------------------------------------------------------------------------------------------


def test_a_server_that_hangs_is_given_up_after_the_attempts(server: MockServer) -> None:
    server.reply = lambda asked: Reply(wait_s=30.0)
    (completion,) = ask(engine_for(server, timeout_s=0.2, attempts=2), request())
    assert (completion.error, len(server.asked)) == ("timed_out", 2)


def test_a_server_that_drips_a_byte_at_a_time_meets_the_deadline_and_its_bytes_are_kept(server: MockServer) -> None:
    server.reply = lambda asked: Reply(body=GOOD.body, pause_s=0.05)
    kept: list[bytes] = []
    handout = Handout(keep=lambda _, raw: kept.append(raw))
    started = time.monotonic()
    (completion,) = ask(engine_for(server, timeout_s=0.3, deadline_s=0.6), request(), handout=handout)
    assert completion.error == "timed_out" and time.monotonic() - started < 1.5
    assert (
        len(kept) == 1
        and b'"torn":true' in kept[0]
        and kept[0].partition(b"\n")[2] == GOOD.body[: len(kept[0].partition(b"\n")[2])]
    )


# --- replies that were paid for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        Reply(body=b"<html>sorry</html>"), Reply(body=b""), Reply(body=b'{"choices": []}'),
        Reply(body=b'{"choices"', cut=10, length=500),
        Reply(body=GOOD.body, cut=40), Reply(body=GOOD.body, cut=40, reset=True, pause_s=0.001),
    ],
    ids=["html", "empty", "no-choices", "cut", "torn", "reset"],
)  # fmt: skip
def test_a_reply_that_cannot_be_read_is_kept_and_asked_for_again(server: MockServer, bad: Reply) -> None:
    server.reply = first(1, bad)
    kept: list[bytes] = []
    (completion,) = ask(engine_for(server), request(), handout=Handout(keep=lambda _, raw: kept.append(raw)))
    assert completion.finish_reason == "stop" and len(server.asked) == 2
    assert len(kept) == 2 and kept[1].endswith(GOOD.body) and b'"attempt":2' in kept[1]


def test_a_body_shorter_than_its_length_is_read_when_its_json_is_whole(server: MockServer) -> None:
    server.reply = lambda asked: Reply(body=GOOD.body, length=len(GOOD.body) + 10)
    (completion,) = ask(engine_for(server), request())
    assert completion.finish_reason == "stop" and len(server.asked) == 1


def test_a_length_shorter_than_the_body_is_no_http_and_asked_again(server: MockServer) -> None:
    """What follows the announced bytes is taken for another reply's head; the parser gives nothing out then."""
    server.reply = first(1, Reply(body=GOOD.body, length=40))
    assert ask(engine_for(server), request())[0].finish_reason == "stop" and len(server.asked) == 2


def test_replies_that_stay_unreadable_end_as_bad_reply_with_all_they_cost(server: MockServer) -> None:
    server.reply = lambda asked: Reply(body=encoded({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}))
    engine = engine_for(server, attempts=3, price_input_per_million=1.0, price_output_per_million=2.0)
    (completion,) = ask(engine, request())
    assert (completion.finish_reason, completion.error, len(server.asked)) == ("abort", "bad_reply", 3)
    assert completion.cost == pytest.approx(60e-6)


def test_length_is_a_verdict_and_no_failure(server: MockServer) -> None:
    server.reply = lambda asked: Reply(body=encoded(said("length", content=None, reasoning="2+")))
    (completion,) = ask(engine_for(server), request())
    assert completion.finish_reason == "length" and completion.error == "" and len(server.asked) == 1


@pytest.mark.parametrize(("reason", "word"), [("content_filter", "content_filter"), ("tool_calls", "tool_call")])
def test_a_servers_own_reason_to_end_is_not_asked_again(server: MockServer, reason: str, word: str) -> None:
    server.reply = lambda asked: Reply(body=encoded(said(reason, content="4")))
    (completion,) = ask(engine_for(server), request())
    assert (completion.finish_reason, completion.error, len(server.asked)) == ("abort", word, 1)


# --- torn streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
def test_a_torn_stream_of_ids_is_continued_where_it_was_cut(server: MockServer, reset: bool) -> None:
    def reply(asked: Asked) -> Reply:
        cut = {1: 12, 2: 9}.get(len(server.asked))
        return Reply(events=by_ids(asked).events, cut=cut, reset=reset and cut is not None, pause_s=0.002)

    server.reply = reply
    kept: list[bytes] = []
    engine = engine_for(server, api="completions", stream=True, attempts=1)
    (completion,) = ask(engine, request(), handout=Handout(keep=lambda _, raw: kept.append(raw)))
    assert completion.token_ids == whole("r0") and completion.finish_reason == "stop"
    assert [len(body["prompt"]) - 2 for body in server.bodies] == [0, 12, 21]
    assert engine.read(request(), kept[2]).token_ids == whole("r0")  # the last reply alone gives the whole output
    assert engine.read(request(), kept[0]).error == "torn"


def test_a_torn_chat_stream_is_asked_again_from_the_start(server: MockServer) -> None:
    chunks = events(
        [{"choices": [{"index": 0, "delta": {"content": letter}, "finish_reason": None}]} for letter in "abcd"], end=False
    )
    end = events([{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}])
    server.reply = lambda asked: Reply(events=chunks, cut=3) if len(server.asked) == 1 else Reply(events=(*chunks, *end))
    (completion,) = ask(engine_for(server, stream=True), request())
    assert completion.finish_reason == "stop" and len(completion.token_ids) == 5 and len(server.asked) == 2


def test_streams_that_stay_torn_are_an_abort_and_never_a_stop(server: MockServer) -> None:
    chunks = events([{"choices": [{"index": 0, "delta": {"content": "ab"}, "finish_reason": None}]}], end=False)
    server.reply = lambda asked: Reply(events=chunks, cut=1)
    (completion,) = ask(engine_for(server, stream=True, attempts=2), request())
    assert (completion.finish_reason, completion.error, len(server.asked)) == ("abort", "torn", 2)


def test_a_stream_that_meets_the_deadline_is_handed_out_and_kept(server: MockServer) -> None:
    server.reply = lambda asked: Reply(events=by_ids(asked).events, pause_s=0.05)
    partials: list[Partial] = []
    kept: list[bytes] = []
    handout = Handout(take=partials.append, keep=lambda _, raw: kept.append(raw))
    (completion,) = ask(engine_for(server, api="completions", stream=True, deadline_s=0.5), request(), handout=handout)
    assert completion.error == "timed_out" and len(kept) == 1
    assert 3 < len(partials[-1].token_ids) < 20 and partials[-1].token_ids == whole("r0")[: len(partials[-1].token_ids)]


# --- refusals for good -----------------------------------------------------------------------------------------------


def test_one_refused_request_is_an_abort_and_the_others_go_on(server: MockServer) -> None:
    server.reply = lambda asked: Reply(400, b'{"error": "too long"}') if asked.request_id == "r1" else GOOD
    found = by_id(ask(engine_for(server), *(request(index) for index in range(4))))
    assert [found[f"r{index}"].error for index in range(4)] == ["", "refused", "", ""]


def test_a_recipe_that_is_refused_from_the_start_ends_the_run_before_any_row_is_failed(server: MockServer) -> None:
    server.reply = lambda asked: Reply(400, b'{"error": "max_tokens is too large"}')
    yielded: list[Completion] = []
    with pytest.raises(UnusableInput, match=r"HTTP 400: .*max_tokens is too large.*correct the recipe"):
        yielded.extend(engine_for(server).generate(request(index) for index in range(1000)))
    assert yielded == [] and len(server.asked) <= 12


@pytest.mark.parametrize("body", [b"<html>Welcome</html>", b"null", b'{"choices": []}'])
def test_an_address_where_something_else_answers_ends_the_run_before_any_row_is_failed(server: MockServer, body: bytes) -> None:
    server.reply = lambda asked: Reply(body=body)
    yielded: list[Completion] = []
    with pytest.raises(UnusableInput, match="the first 8 requests all failed, the last as bad_reply"):
        yielded.extend(engine_for(server, attempts=2).generate(request(index) for index in range(1000)))
    # Both attempts of those in flight, and of those whose first reply still waits to be read: 109 have been seen.
    assert yielded == [] and len(server.asked) <= 2 * (8 + 4 + BACKLOG)


def test_a_few_requests_that_are_all_refused_are_as_many_aborts(server: MockServer) -> None:
    server.reply = lambda asked: Reply(404, b'{"error": "no such model"}')
    assert [one.error for one in ask(engine_for(server), request(0), request(1))] == ["refused", "refused"]


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_refused_key_ends_the_run_in_one_clear_line(server: MockServer, status: int) -> None:
    server.reply = lambda asked: Reply(status, b'{"error": "no key"}')
    with pytest.raises(UnusableInput, match=rf"base_urls {server.url}: HTTP {status}: .*no key.*set OPENAI_API_KEY"):
        ask(engine_for(server), request())


def test_what_was_in_flight_beside_a_fatal_reply_still_comes(server: MockServer) -> None:
    server.reply = lambda asked: Reply(401) if asked.request_id == "r3" else Reply(body=GOOD.body, wait_s=0.2)
    completions = engine_for(server).generate(request(index) for index in range(50))
    assert {next(completions).request_id for _ in range(3)} == {"r0", "r1", "r2"}
    with pytest.raises(UnusableInput, match="HTTP 401"):
        next(completions)
    assert len(server.asked) == 4


def test_a_redirect_is_not_followed_with_the_key(server: MockServer) -> None:
    server.reply = lambda asked: Reply(307, headers={"Location": "http://127.0.0.1:9/elsewhere"})
    assert ask(engine_for(server), request())[0].error == "refused"


def test_a_completion_of_ids_outside_the_vocabulary_is_a_bad_reply(server: MockServer) -> None:
    server.reply = lambda asked: Reply(body=encoded(completed([1, 100_000])))
    assert ask(engine_for(server, api="completions", attempts=1), request())[0].error == "bad_reply"
