"""Filters as a set: what a recipe may name, in which order they decide, what they read, and how their time grows."""

import dataclasses
import time
import typing
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from configs.filters import FilterSettings, LengthFilter
from configs.schema import Data
from data.filters import COLUMNS, FILTERS, apply, in_order
from data.filters.texts import Filtered, asked, said
from tests.data.make_run import make_prompt, make_trace

PROMPT = make_prompt("What is 2 + 2?")
CHOSEN: TypeAdapter[FilterSettings] = TypeAdapter(FilterSettings)
ALL = [CHOSEN.validate_python(name) for name in FILTERS]


def reason(filter_: str | dict[str, typing.Any], **changes: typing.Any) -> str:
    return apply(make_trace(PROMPT, **changes), CHOSEN.validate_python(filter_))


def test_a_healthy_trace_passes_every_filter() -> None:
    assert {chosen.type: apply(make_trace(PROMPT), chosen) for chosen in ALL} == dict.fromkeys(FILTERS, "")


def test_the_recipe_can_name_every_filter_and_no_other() -> None:
    union = typing.get_args(typing.get_args(FilterSettings)[0])
    assert {model.model_fields["type"].default for model in union} == set(FILTERS)


def test_a_bare_word_is_the_filter_with_its_defaults() -> None:
    chosen = Data.model_validate({"filters": ["finish_reason", {"type": "length", "max_tokens": 9}]}).filters
    assert [one.type for one in chosen] == ["finish_reason", "length"] and chosen[1] == LengthFilter(max_tokens=9)


def test_a_filter_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="filters name length twice"):
        Data.model_validate({"filters": ["length", {"type": "length", "max_tokens": 9}]})


def test_the_old_key_names_the_new_form() -> None:
    with pytest.raises(ValidationError, match=r"expected filters: \[..., {type: length, max_tokens: 64}\]"):
        Data.model_validate({"max_trace_tokens": 64})


def test_filters_decide_in_one_order_whatever_the_recipe_s() -> None:
    assert [chosen.type for chosen in in_order(ALL[::-1])] == list(FILTERS)


def test_no_filter_reads_more_of_a_trace_than_its_columns() -> None:
    trace = make_trace(PROMPT, reasoning="I am fine. " * 300, answer="Seldom said. " * 300)
    bare = typing.cast(Filtered, SimpleNamespace(**{name: getattr(trace, name) for name in COLUMNS}))
    assert [apply(bare, chosen) for chosen in ALL] == [apply(trace, chosen) for chosen in ALL]


def test_texts_are_the_parsed_ones_and_the_raw_one_where_the_block_never_closed() -> None:
    assert said(make_trace(PROMPT, reasoning="r", answer="a")) == ("r", "a")
    assert said(make_trace(PROMPT, reasoning="", answer="", raw="no end")) == ("no end", "")
    assert asked(make_trace(PROMPT)) == ["What is 2 + 2?"]


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=400))
def test_any_text_gets_a_reason_or_passes(text: str) -> None:
    trace = make_trace(PROMPT, reasoning=text, answer=text[::-1])
    assert all(isinstance(apply(trace, chosen), str) for chosen in ALL)


# --- records -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("finish", "expected"), [("stop", ""), ("length", "length"), ("loop", "loop"), ("abort", "abort")])
def test_only_a_trace_that_stopped_by_itself_is_finished(finish: str, expected: str) -> None:
    assert reason("finish_reason", finish=finish) == expected


@pytest.mark.parametrize(
    ("raw", "answer", "expected"),
    [
        ("r</think>4", "4", ""),
        ("<think>r</think>4", "4", ""),
        ("r and no end", "", "think_unclosed"),
        ("<think>r and no end", "", "think_unclosed"),
        ("r</think>4<think>s", "4<think>s", "think_reopened"),
        ("r</think>4</think>5", "4</think>5", "think_reclosed"),
        ("4, without any thought", "4, without any thought", ""),
    ],
)
def test_the_think_block_is_opened_once_and_closed_once(raw: str, answer: str, expected: str) -> None:
    assert reason("think_tags", raw=raw, answer=answer) == expected


@pytest.mark.parametrize(("answer", "expected"), [("4", ""), ("", "no_answer"), (" \n", "no_answer")])
def test_something_is_answered(answer: str, expected: str) -> None:
    assert reason("answer_present", answer=answer) == expected


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"max_tokens": 14}, ""),  # 7 + 5 + 2
        ({"max_tokens": 13}, "too_long"),
        ({"max_reasoning_tokens": 5, "max_answer_tokens": 2, "min_reasoning_tokens": 5, "min_answer_tokens": 2}, ""),
        ({"max_reasoning_tokens": 4}, "reasoning_too_long"),
        ({"min_reasoning_tokens": 6}, "reasoning_too_short"),
        ({"max_answer_tokens": 1}, "answer_too_long"),
        ({"min_answer_tokens": 3}, "answer_too_short"),
    ],
)
def test_length_bounds_the_whole_the_reasoning_and_the_answer_and_a_bound_itself_is_allowed(
    bounds: dict[str, int], expected: str
) -> None:
    assert reason({"type": "length", **bounds}) == expected


def test_bounds_that_nothing_can_keep_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_answer_tokens 9 is above its bound of 8"):
        LengthFilter(min_answer_tokens=9, max_answer_tokens=8)


# --- control tokens ----------------------------------------------------------------------------------------------

GLM = ["<|user|>", "<|assistant|>", "<|endoftext|>", "<think>", "</think>", "[gMASK]", "<tool_call>", "</tool_call>"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("done<|user|>thanks", "control_token"),
        ("the end<|endoftext|>", "control_token"),
        ("[gMASK]<sop> opens a prompt", "control_token"),
        ("<tool_call>add</tool_call>", "control_token"),
        ("escaped: <\\|user|>", ""),
        ("a <user> element and <|> an operator", ""),
        ("if x <| user |> y", ""),
        ("[MASK]", ""),
    ],
)
def test_no_text_holds_a_control_token(answer: str, expected: str) -> None:
    assert reason({"type": "control_tokens", "tokens": GLM}, answer=answer) == expected


def test_a_call_is_written_with_the_tool_tokens_where_there_are_tools() -> None:
    chosen = CHOSEN.validate_python({"type": "control_tokens", "tokens": [*GLM, "<|observation|>"]})
    calling = dataclasses.replace(make_trace(PROMPT, "<tool_call>add</tool_call>"), tools="[{}]")
    answering_itself = dataclasses.replace(make_trace(PROMPT, "<tool_call>add</tool_call><|observation|>4"), tools="[{}]")
    assert (apply(calling, chosen), apply(answering_itself, chosen)) == ("", "control_token")


@settings(deadline=None, max_examples=60)
@given(tokens=st.lists(st.text("<|>ab", min_size=1, max_size=5), max_size=8), text=st.text("<|>ab", max_size=60))
def test_a_control_token_is_found_where_plain_search_finds_it(tokens: list[str], text: str) -> None:
    found = reason({"type": "control_tokens", "tokens": tokens}, answer=text or "-")
    assert bool(found) == any(token in (text or "-") or token in "2+2=4." for token in tokens)


# --- time --------------------------------------------------------------------------------------------------------

SLOW_TEXTS: dict[str, Callable[[int], str]] = {
    "one letter": lambda size: "a" * size,
    "blanks": lambda size: "x" + "\n" * size + "x",
    "at signs": lambda size: "a@" * (size // 2),
    "at signs after long names": lambda size: ("a" * 64 + "@") * (size // 65),
    "domains without an end": lambda size: "foo@" + "a." * (size // 2),
    "beginnings of web tokens": lambda size: "eyJ" * (size // 3),
    "parts of web tokens": lambda size: "eyJaaaaaaaaaaaa." * (size // 16),
    "one long key": lambda size: "sk-" + "A" * size,
    "headers of keys": lambda size: "-----BEGIN RSA PRIVATE KEY-----" * (size // 31),
    "digits": lambda size: "phone card 4" + "41" * (size // 2),
    "groups of digits": lambda size: "card " + "4111 1111 " * (size // 10),
    "numbers with a sign": lambda size: "call +1 " * (size // 8),
    "countries of accounts": lambda size: "DE89 " * (size // 5),
    "half a statement": lambda size: "i am an ai " * (size // 11) + "glm",
    "names without a statement": lambda size: "glm " * (size // 4),
    "makers of models": lambda size: "i am a model made by " * (size // 21) + "zhipu",
    "statements in Chinese": lambda size: "我是一个" * (size // 4) + "智谱",
    "promises to start": lambda size: "let me " * (size // 7) + "start over",
    "angle brackets": lambda size: "<|" * (size // 2),
    "dollars": lambda size: "$a " * (size // 3),
    "fences": lambda size: "```" * (size // 3),
    "almost a loop": lambda size: ("x" * 15 + "y") * (size // 16) + "z",
}


def seconds(text: str) -> float:
    """The fastest of three rounds of all filters, in seconds of this process."""
    trace = make_trace(PROMPT, reasoning=text)
    chosen = [
        *ALL,
        CHOSEN.validate_python({"type": "control_tokens", "tokens": [f"<|reserved_{index}|>" for index in range(64)]}),
    ]
    rounds = []
    for _ in range(3):
        started = time.process_time()
        for one in chosen:
            apply(trace, one)
        rounds.append(time.process_time() - started)
    return min(rounds)


@pytest.mark.parametrize("name", SLOW_TEXTS)
def test_no_text_takes_more_than_linear_time(name: str) -> None:
    apply(make_trace(PROMPT, reasoning="Plain words, which import the detector. " * 9), CHOSEN.validate_python("language"))
    short, long = seconds(SLOW_TEXTS[name](5_000)), seconds(SLOW_TEXTS[name](40_000))
    # 8 times the text. Quadratic would be 64; the floor covers what a short text costs at all and the clock's ticks.
    assert long < 24 * max(short, 1e-3)
