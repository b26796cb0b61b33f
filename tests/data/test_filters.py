import dataclasses
import typing

import pytest

from configs.schema import Data, FilterName
from data.filters import FILTERS
from tests.data.make_run import make_prompt, make_trace

PROMPT = make_prompt("What is 2 + 2?")


def reason(name: str, **changes: typing.Any) -> str:
    return FILTERS[name].apply(make_trace(PROMPT, **changes), Data(max_trace_tokens=14))


def test_a_healthy_trace_passes_every_filter() -> None:
    assert {name: reason(name) for name in FILTERS} == dict.fromkeys(FILTERS, "")


def test_the_recipe_can_name_every_filter_and_no_other() -> None:
    assert set(typing.get_args(FilterName)) == set(FILTERS)


@pytest.mark.parametrize(("finish", "expected"), [("stop", ""), ("length", "length"), ("abort", "abort")])
def test_only_a_trace_that_stopped_by_itself_is_finished(finish: typing.Any, expected: str) -> None:
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


def test_length_counts_prompt_reasoning_and_answer_and_the_bound_itself_is_allowed() -> None:
    trace = make_trace(PROMPT)  # 7 + 5 + 2
    assert FILTERS["length"].apply(trace, Data(max_trace_tokens=14)) == ""
    assert FILTERS["length"].apply(trace, Data(max_trace_tokens=13)) == "too_long"
    longer = dataclasses.replace(trace, prompt_tokens=8)
    assert FILTERS["length"].apply(longer, Data(max_trace_tokens=14)) == "too_long"
