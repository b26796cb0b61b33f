"""Kept bytes to completions: every shape of reply, and none at all."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import schema
from data.engine import Completion
from data.structure import count_reasoning_tokens
from teacher.http.raw import Line, last_reply, pack, unpack
from teacher.http.reading import Prices, Reader
from teacher.http.replies import EventStream, read_body, read_stream
from teacher.http_engine import HttpEngine
from tests.teacher.http_asks import CLOSE, STOP, request, tokenizer
from tests.teacher.mock_server import completed, encoded, events, said

READER = Reader(tokenizer(), Prices(1.0, 4.0))
LINE = Line("http://h/v1/chat/completions", 200, 5.0, 2.0, 1)


def read(content: object, **line: Any) -> Completion:
    return READER.read(request(), pack(LINE._replace(**line), encoded(content))).completion


def read_events(chunks: list[dict[str, Any]], end: bool = True, **line: Any) -> Completion:
    return READER.read(request(), pack(LINE._replace(streamed=True, **line), b"".join(events(chunks, end=end)))).completion


def text_of(completion: Completion) -> str:
    return str(tokenizer().decode(list(completion.token_ids)))


@pytest.mark.parametrize(
    ("answer", "opens_think", "expected"),
    [
        (said(content="4", reasoning_content="2+2"), True, "2+2</think>4"),
        (said(content="4", reasoning="2+2"), True, "2+2</think>4"),
        (said(content="4", reasoning="2+2"), False, "<think>2+2</think>4"),
        (said(content="<think>2+2</think>4"), True, "2+2</think>4"),
        (said(content="<think>2+2</think>4"), False, "<think>2+2</think>4"),
        (said(content="2+2 and on"), True, "2+2 and on"),
        (said(content=None, reasoning="2+2 and on"), True, "2+2 and on"),
        (said(content="4"), False, "4"),
        (said("length", content=None, reasoning="2+"), True, "2+"),
        (said("length", content="The ans", reasoning="2+2"), True, "2+2</think>The ans"),
    ],
)
def test_think_tags_are_put_back_where_a_parser_cut_them_off(answer: dict[str, Any], opens_think: bool, expected: str) -> None:
    assert read_body(encoded(answer)).spoken(opens_think) == expected


def test_a_chat_reply_ends_with_the_stop_its_text_does_not_show() -> None:
    completion = read(said(content="4", reasoning_content="2+2"))
    assert text_of(completion) == "2+2</think>4<|user|>"
    assert completion.finish_reason == "stop" and (completion.started_at, completion.seconds) == (5.0, 2.0)
    assert text_of(read(said("length", content="4", reasoning_content="2+2"))) == "2+2</think>4"


def test_reasoning_tokens_are_counted_from_our_ids_when_the_server_reports_none() -> None:
    reply = said(content="4", reasoning_content="2+2") | {
        "usage": {"prompt_tokens": 9, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 0}}
    }
    ids = read(reply).token_ids
    assert count_reasoning_tokens(ids, tokenizer(), prompt_opens_think=True) == 4  # type: ignore[arg-type]


def test_the_servers_own_ids_are_taken_as_they_are() -> None:
    assert read(completed([10, 11, CLOSE, 12, STOP])).token_ids == (10, 11, CLOSE, 12, STOP)
    assert read(completed([10, 11])).token_ids == (10, 11, STOP)  # a server that leaves the stop out
    assert read(completed([10, 11], "length")).token_ids == (10, 11)
    choice = {"index": 0, "message": {"content": "?"}, "finish_reason": "length", "response_token_ids": [10, 11]}  # SGLang
    assert read({"choices": [choice]}).token_ids == (10, 11)


def test_ids_may_come_as_the_names_of_tokens() -> None:
    choice = {"index": 0, "text": "ab", "finish_reason": "length",
              "logprobs": {"tokens": ["token_id:10", "token_id:11"], "token_logprobs": [-0.5, -1.0]}}  # fmt: skip
    completion = read({"choices": [choice]})
    assert (completion.token_ids, completion.logprobs) == ((10, 11), (-0.5, -1.0))


@pytest.mark.parametrize(
    ("stop_reason", "last"),
    [(STOP + 2, STOP + 2), (256, 256), ("<|observation|>", STOP + 2), (None, STOP), ("elsewhere", STOP), (7, STOP)],
)
def test_the_stop_is_the_one_the_server_names(stop_reason: int | str | None, last: int) -> None:
    reply = said(content="4")
    reply["choices"][0]["stop_reason"] = stop_reason
    assert read(reply).token_ids[-1] == last


def test_a_stop_string_stays_in_the_output_and_takes_the_place_of_the_stop_token() -> None:
    reply = said(content="the sum is 4")
    reply["choices"][0]["stop_reason"] = ";;"
    raw = pack(LINE, encoded(reply))
    assert text_of(READER.read(request(stop_strings=(";;",)), raw).completion) == "the sum is 4;;"


def test_a_stop_that_the_text_shows_is_not_written_twice() -> None:
    """`transformers serve` leaves the stop string in the content."""
    assert text_of(read(said(content="2+2</think>4<|user|>"))) == "2+2</think>4<|user|>"


def test_logprobs_are_kept_only_where_each_belongs_to_an_id() -> None:
    def reply(count: int) -> dict[str, Any]:
        found = said(content="abc")
        found["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": -0.25, "top_logprobs": []}] * count}
        return found

    assert read(reply(4)).logprobs == (-0.25,) * 4  # three letters and the stop
    assert read(reply(3)).logprobs == read(reply(5)).logprobs == ()


def test_the_price_is_of_the_servers_usage_and_else_of_our_own_counts() -> None:
    billed = said(content="abc") | {"usage": {"prompt_tokens": 100, "completion_tokens": 10}}
    assert read(billed).cost == pytest.approx((100 * 1.0 + 10 * 4.0) / 1e6)
    assert read(said(content="abc")).cost == pytest.approx((2 * 1.0 + 3 * 4.0) / 1e6)
    assert read(said(content="abc") | {"usage": {"prompt_tokens": "many"}}).finish_reason == "stop"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (said("content_filter", content="4"), "content_filter"),
        (said("tool_calls", content=None), "tool_call"),
        (said(None, content="4"), "bad_reply"),
        (said("abort", content="4"), "bad_reply"),
        ({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 3}}, "bad_reply"),
        ({"error": {"message": "overloaded"}}, "bad_reply"),
        ({"choices": [{"finish_reason": "stop", "message": {"content": 5}}]}, "bad_reply"),
        ({"choices": "none"}, "bad_reply"),
        (completed([10, 999]), "bad_reply"),
        (completed([10, -1]), "bad_reply"),
        (completed(["10"]), "bad_reply"),  # type: ignore[list-item]
        (completed([True]), "bad_reply"),
        ([], "bad_reply"),
        ("text", "bad_reply"),
    ],
)
def test_a_reply_without_an_output_is_an_abort_with_a_countable_word(answer: object, error: str) -> None:
    completion = read(answer)
    assert (completion.finish_reason, completion.error, completion.token_ids) == ("abort", error, ())


def test_a_bad_reply_still_has_its_price() -> None:
    assert read({"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}).cost == pytest.approx(140e-6)


@given(st.binary(max_size=200))
def test_no_bytes_raise(raw: bytes) -> None:
    assert READER.read(request(), raw).completion.finish_reason == "abort"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["choices", "message", "delta", "content", "text", "finish_reason", "token_ids", "logprobs", "usage",
                         "model", "error", "index", "stop_reason", "tokens", "token_logprobs", "reasoning"]), inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(ANYTHING, st.booleans())
def test_no_json_raises(content: object, streamed: bool) -> None:
    body = b"data: " + encoded(content) + b"\n\n" if streamed else encoded(content)
    completion = READER.read(request(), pack(LINE._replace(streamed=streamed), body)).completion
    assert completion.finish_reason in ("abort", "stop", "length")


def test_nesting_that_no_parser_survives_is_a_bad_reply() -> None:
    raw = pack(LINE, b"[" * 200_000)
    assert READER.read(request(), raw).completion.error == "bad_reply"


# --- streams ---------------------------------------------------------------------------------------------------------


def delta(finish_reason: str | None = None, **message: str) -> dict[str, Any]:
    return {"model": "tiny", "choices": [{"index": 0, "delta": message, "finish_reason": finish_reason}]}


STREAM = [
    delta(role="assistant"), delta(reasoning_content="2+"), delta(reasoning_content="2"), delta(content="4"), delta("stop"),
    {"model": "tiny", "choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}},
]  # fmt: skip


def test_a_stream_says_what_the_same_reply_says_in_one_piece() -> None:
    streamed, whole = read_events(STREAM), read(said(content="4", reasoning_content="2+2"))
    assert streamed.token_ids == whole.token_ids and streamed.finish_reason == "stop"
    assert streamed.cost == pytest.approx(140e-6)


@given(st.lists(st.integers(0, 700), max_size=8), st.booleans())
def test_a_stream_may_be_cut_into_pieces_anywhere(cuts: list[int], windows_newlines: bool) -> None:
    body = b": ping\n\nevent: x\n" + b"".join(events(STREAM))
    body = body.replace(b"\n", b"\r\n") if windows_newlines else body
    places = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})
    stream = EventStream()
    for start, end in itertools.pairwise(places):
        stream.feed(body[start:end])
    assert stream.end() == read_stream(body) and stream.reply.spoken(True) == "2+2</think>4"


@pytest.mark.parametrize("torn", [True, False])
def test_a_stream_without_its_end_is_never_a_stop(torn: bool) -> None:
    completion = read_events(STREAM[:4], end=not torn, torn=torn)
    assert (completion.finish_reason, completion.error) == ("abort", "torn")
    assert text_of(completion) == "2+2</think>4"


def test_a_stream_that_was_cut_after_its_reason_is_whole() -> None:
    assert read_events(STREAM[:5], end=False, torn=True).finish_reason == "stop"


def test_an_event_that_is_no_json_ends_what_is_read() -> None:
    body = events(STREAM[:2], end=False)[0] + b'data: {"choi\n\n' + b"".join(events(STREAM[2:]))
    completion = READER.read(request(), pack(LINE._replace(streamed=True), body)).completion
    assert (completion.error, completion.token_ids) == ("torn", ())


def test_a_server_that_answers_a_stream_with_an_error_is_torn_or_bad() -> None:
    assert read_events([*STREAM[:3], {"error": "worker died"}]).error == "torn"
    assert read_events([{"error": "worker died"}]).error == "bad_reply"


# --- what an ask continued -------------------------------------------------------------------------------------------


def test_a_continuation_holds_the_prefix_what_was_given_and_what_came() -> None:
    """Whatever prefix the request has when the bytes are read: the line says what was continued."""
    choice = completed([9, STOP])
    choice["choices"][0]["logprobs"] = {"token_logprobs": [-0.9, -1.0]}
    line = LINE._replace(given=(5, 6, 7, 8), given_logprobs=(-0.5, -0.6, -0.7, -0.8))
    for asked in (request(), request(prefix_ids=(5, 6), prefix_logprobs=(-0.5, -0.6)), request(prefix_ids=(5, 6, 7, 8))):
        completion = READER.read(asked, pack(line, encoded(choice))).completion
        assert completion.token_ids == (5, 6, 7, 8, 9, STOP)
        assert completion.logprobs == (-0.5, -0.6, -0.7, -0.8, -0.9, -1.0)


def test_a_reasoning_phase_that_used_up_its_tokens_is_unfinished_and_keeps_them() -> None:
    completion = read(completed([10, 11], "length"), phase="reasoning")
    assert (completion.finish_reason, completion.error, completion.token_ids) == ("abort", "unfinished", (10, 11))
    assert read(completed([10, CLOSE, 11, STOP]), phase="reasoning").finish_reason == "stop"


def test_a_kept_reply_is_one_line_of_ours_and_the_servers_bytes() -> None:
    body = b'{"a":\n 1}\xff'
    raw = pack(LINE, body)
    head, _, rest = raw.partition(b"\n")
    assert rest == body and json.loads(head)["url"] == LINE.url and unpack(raw) == (LINE, body, b"")


def test_replies_one_after_the_other_stay_apart_and_the_last_is_the_answer() -> None:
    """As a trace's `raw` holds them."""
    first, last = pack(LINE, b'{"a":\n 1}'), pack(LINE._replace(attempt=2), encoded(said(content="4")))
    assert unpack(first + last).rest == last and last_reply(first + last) == last
    assert last_reply(b"nobody packed this") == b"nobody packed this"
    engine = HttpEngine(schema.HttpEngine(), "tiny", tokenizer())
    assert engine.read(request(), first + last) == Reader(tokenizer()).read(request(), last).completion


def test_our_ids_are_those_that_the_tokenizer_itself_gives() -> None:
    for text in ("", "a b", "<think>2+2</think>4<|user|>", "héé 中文 \u200d", "x" * 5000):
        assert list(READER.encode(text)) == tokenizer()(text, add_special_tokens=False)["input_ids"]
