import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import confidence as module
from data.confidence import FLOOR, Confidence, confidence
from data.records import Trace, Turn
from data.schema import TRACE, to_table
from tests.data.make_run import make_prompt, make_trace

TOLERANCE = 2.0**-23
"""Logprobs are rounded to multiples of 2**-24, in the mean by at most half of that; twice for the comparison's own."""


def with_turns(turns: tuple[Turn, ...], answer_tokens: int) -> Trace:
    return dataclasses.replace(make_trace(make_prompt("q")), turns=turns, answer_tokens=answer_tokens)


def said(*logprobs: float, answer: int = 1) -> Trace:
    generated = Turn("assistant", tuple(range(len(logprobs))), "generated", logprobs)
    return with_turns((Turn("user", (1, 2), "given"), generated), answer)


def figures(traces: list[Trace], window: int = 2) -> Confidence:
    table = to_table(traces, Trace)
    return confidence(table["turns"], table["answer_tokens"].to_numpy(), window_tokens=window)


def slow(trace: Trace, window: int) -> tuple[float, float, float]:
    """One trace, token by token."""
    generated = [turn for turn in trace.turns if turn.origin == "generated"]
    if any(len(turn.logprobs) != len(turn.token_ids) for turn in generated):
        return math.nan, math.nan, math.nan
    logs = [np.float32(value).item() for turn in generated for value in turn.logprobs]
    logs = [value if math.isnan(value) else min(max(value, FLOOR), 0.0) for value in logs]
    cut = max(len(logs) - trace.answer_tokens, 0)
    windows = [logs] if len(logs) <= window else [logs[start : start + window] for start in range(len(logs) - window + 1)]
    lowest = [value for value in map(mean, windows) if not math.isnan(value)]
    return mean(logs[cut:]), mean(logs[:cut]), min(lowest, default=math.nan)


def mean(values: list[float]) -> float:
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan


def test_the_means_of_a_short_trace_are_those_computed_by_hand() -> None:
    found = figures([said(-1.0, -3.0, -0.5, -0.25, -0.75, answer=2)])
    assert found.answer_N == pytest.approx([-0.5])
    assert found.reasoning_N == pytest.approx([-1.5])
    assert found.lowest_N == pytest.approx([-2.0])  # of the pairs -2.0, -1.75, -0.375, -0.5


def test_a_server_without_logprobs_leaves_nan_and_harms_no_neighbour() -> None:
    silent = with_turns((Turn("assistant", (1, 2), "generated"),), 1)
    partial = with_turns((Turn("assistant", (1, 2), "generated", (-1.0,)),), 1)
    found = figures([silent, said(-2.0, -4.0), partial, said(-1.0, -1.0)])
    for column, expected in zip(found, ([-4.0, -1.0], [-2.0, -1.0], [-3.0, -1.0]), strict=True):
        assert np.isnan(column[[0, 2]]).all() and column[[1, 3]] == pytest.approx(expected)


def test_a_nan_among_logprobs_is_left_out_and_a_stand_in_for_rare_is_held_at_the_floor() -> None:
    found = figures([said(math.nan, -1.0, -9999.0, answer=1), said(math.nan, math.nan), said(1e-7, 1e-7)])
    assert found.answer_N[:1] == pytest.approx([FLOOR]) and found.reasoning_N[:1] == pytest.approx([-1.0])
    assert np.isnan(found.answer_N[1]) and np.isnan(found.lowest_N[1])
    assert found.lowest_N[2] == 0.0  # a rounding above 0 is no probability above 1


def test_only_generated_turns_count_and_all_of_them_do() -> None:
    turns = (
        Turn("assistant", (1, 2), "generated", (-1.0, -2.0)),
        Turn("tool", (3, 4, 5), "observation"),
        Turn("assistant", (6, 7), "generated", (-3.0, -4.0)),
    )
    found = figures([with_turns(turns, 1)])
    assert found.answer_N == pytest.approx([-4.0]) and found.reasoning_N == pytest.approx([-2.0])


def test_an_empty_segment_and_a_trace_without_turns_have_no_figures() -> None:
    assert [len(column) for column in figures([])] == [0, 0, 0]
    assert all(np.isnan(column).all() for column in figures([with_turns((), 1)]))


def test_a_slice_of_a_segment_in_several_chunks_gives_the_figures_of_its_rows() -> None:
    traces = [said(-float(index), -0.5, -1.5) for index in range(6)]
    whole = figures(traces)
    chunked = pa.chunked_array([to_table(part, Trace)["turns"].combine_chunks() for part in (traces[:2], traces[2:])])
    sliced = confidence(chunked.slice(1, 4), np.ones(4, np.int32), window_tokens=2)
    for column, expected in zip(sliced, whole, strict=True):
        assert column.tolist() == expected[1:5].tolist()


logprob = st.floats(-30.0, 0.125, width=32) | st.just(math.nan)
traces = st.builds(
    lambda parts, answer: with_turns(
        tuple(Turn("assistant", tuple(range(len(part))), "generated", tuple(part)) for part in parts), answer
    ),
    st.lists(st.lists(logprob, max_size=9), max_size=3),
    st.integers(0, 12),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(traces, max_size=6), st.integers(1, 5))
def test_the_columns_equal_a_walk_over_every_token(segment: list[Trace], window: int) -> None:
    found = figures(segment, window)
    for row, trace in enumerate(segment):
        assert [column[row] for column in found] == pytest.approx(slow(trace, window), abs=TOLERANCE, nan_ok=True)


def test_a_figure_does_not_depend_on_neighbours_or_batches_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    segment = [said(*random.uniform(-5, 0, size), answer=3) for size in random.integers(4, 40, 30)]
    together = figures(segment)
    monkeypatch.setattr(module, "BATCH_TOKENS", 50)
    for column, other, alone in zip(
        together, figures(segment), zip(*(figures([trace]) for trace in segment), strict=True), strict=True
    ):
        assert column.tolist() == other.tolist() == [float(each[0]) for each in alone]


def test_the_column_is_the_one_that_the_trace_schema_declares() -> None:
    empty = TRACE.empty_table()
    assert [len(column) for column in confidence(empty["turns"], empty["answer_tokens"].to_numpy())] == [0, 0, 0]
