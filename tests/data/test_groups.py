import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.groups import (
    NO_ANSWER,
    Limit,
    agreement,
    answer_key,
    answer_keys,
    by_answer_and_length,
    by_signature,
    efficiency,
    farthest_first,
    over_limits,
    rank_within,
    relative_length,
    running_total,
    shortest_correct,
    trace_keys,
    wide_spread,
)
from tests.data.make_run import make_prompt

PROMPT = make_prompt("q")

# --- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "same",
    [
        ("4", "4.0", " 4. ", "+4", "8/2", "04", "4e0", "$4$", "\\boxed{4}", "The sum is \\boxed{3}, no: \\boxed{4}"),
        ("1000", "1,000", "1,000.00", "1e3"),
        ("-0.5", "-1/2", "-.5", "- 0.5"),
        ("iron", "Iron.", " IRON ", "\\boxed{iron}"),
        ("I don't know", "i don’t know.", "I do not know"),
        ("\\boxed{\\frac{1}{2}}", "x = \\boxed{\\frac{1}{2}}"),
    ],
)
def test_answers_that_say_the_same_have_one_key(same: tuple[str, ...]) -> None:
    assert len({answer_key(PROMPT, answer) for answer in same}) == 1


def test_answers_that_differ_have_different_keys() -> None:
    different = [
        "4",
        "-4",
        "44",
        "4/0",
        "1,00",
        "10,0",
        "(1,2)",
        "1,2",
        "iron",
        "irons",
        "4 apples",
        "50%",
        "0.5",
        "4:00",
        "1e9999",
    ]
    assert len({answer_key(PROMPT, answer) for answer in different}) == len(different)


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_saying_nothing_is_no_answer(answer: str) -> None:
    assert answer_key(PROMPT, answer) == NO_ANSWER


@pytest.mark.timeout(5)
@pytest.mark.parametrize("answer", ["1e999999999", "9" * 100_000, "{" * 100_000, "\\boxed{" * 10_000, "```\n" * 20_000])
def test_a_hostile_answer_costs_no_more_than_reading_it(answer: str) -> None:
    assert all(answer_key(make_prompt("q", verifier=verifier), answer) for verifier in ("exact", "code", "json_schema"))


def test_code_keeps_its_case_and_indentation_and_json_is_equal_as_a_value() -> None:
    code, schema = make_prompt("q", verifier="code"), make_prompt("q", verifier="json_schema")
    block = "Here:\n```python\nx = 1  \n\ny = 2\n```\nDone."
    assert answer_key(code, block) == answer_key(code, "x = 1\ny = 2")
    assert answer_key(code, "X = 1\ny = 2") != answer_key(code, block) != answer_key(code, "x = 1\n y = 2")
    assert answer_key(schema, '{"a": 1, "b": [2]}') == answer_key(schema, '```json\n{"b":[2],"a":1}\n```')


def test_keys_are_the_same_on_every_machine() -> None:
    assert answer_keys([PROMPT, PROMPT], ["iron", ""]).tolist() == [answer_key(PROMPT, "iron"), 0]
    assert answer_key(PROMPT, "iron") == 3187538676656386678  # blake2b: neither PYTHONHASHSEED nor the platform matters
    assert trace_keys(["00000000000000ff" + "0" * 16]).tolist() == [255]


# --- agreement and length ----------------------------------------------------------------------------------------


def test_agreement_is_the_share_of_eligible_samples_with_this_answer() -> None:
    prompts = np.array([7, 7, 7, 7, 3, 3, 9])
    answers = np.array([1, 1, 2, 1, 5, NO_ANSWER, 1], np.uint64)
    eligible = np.array([True, True, True, False, True, True, True])
    expected = [2 / 3, 2 / 3, 1 / 3, math.nan, 1 / 2, math.nan, math.nan]
    assert agreement(prompts, answers, eligible) == pytest.approx(expected, nan_ok=True)


def test_efficiency_is_measured_against_the_shortest_correct_trace() -> None:
    prompts = np.array([1, 1, 1, 2])
    tokens, correct = np.array([100, 40, 10, 5]), np.array([True, True, False, False])
    assert shortest_correct(prompts, tokens, correct) == pytest.approx([40, 40, 40, math.nan], nan_ok=True)
    assert efficiency(prompts, tokens, correct) == pytest.approx([2.5, 1.0, 0.25, math.nan], nan_ok=True)
    assert wide_spread(prompts, tokens, correct, ratio=2.4).tolist() == [True, True, True, False]
    assert not wide_spread(prompts, tokens, correct, ratio=2.5).any()


def test_relative_length_asks_for_no_verdict() -> None:
    tokens = np.array([10, 20, 40, 8, 6, 99])
    found = relative_length(np.array([1, 1, 1, 2, 2, 3]), tokens, np.array([True] * 6))
    middle = (math.log(8) + math.log(6)) / 2
    expected = [-math.log(2), 0.0, math.log(2), math.log(8) - middle, math.log(6) - middle, math.nan]
    assert found == pytest.approx(expected, nan_ok=True)


rows = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 50), st.booleans(), st.booleans()), max_size=25)


@settings(max_examples=50, deadline=None)
@given(rows)
def test_the_columns_equal_a_walk_over_the_groups(table: list[tuple[int, int, int, bool, bool]]) -> None:
    prompts, answers, tokens, eligible, correct = (np.array([row[part] for row in table]) for part in range(5))
    prompts, answers, tokens = prompts.astype(np.int64), answers.astype(np.uint64), tokens.astype(np.int64)
    eligible, correct = eligible.astype(bool), correct.astype(bool)
    shares, ratios, relative = (
        agreement(prompts, answers, eligible),
        efficiency(prompts, tokens, correct),
        relative_length(prompts, tokens, eligible),
    )
    for index, (prompt, answer, length, is_eligible, _) in enumerate(table):
        samples = [row for row in table if row[0] == prompt and row[3]]
        alone = not is_eligible or len(samples) < 2
        share = math.nan if alone or not answer else sum(row[1] == answer for row in samples) / len(samples)
        right = [row[2] for row in table if row[0] == prompt and row[4]]
        assert shares[index] == pytest.approx(share, nan_ok=True)
        assert ratios[index] == pytest.approx(length / min(right) if right else math.nan, nan_ok=True)
        log = math.nan if alone else math.log(length) - np.median([math.log(row[2]) for row in samples])
        assert relative[index] == pytest.approx(log, nan_ok=True)


# --- places in a group -------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 9)), max_size=25), st.randoms(use_true_random=False), st.data())
def test_ranks_totals_and_limits_equal_a_walk_in_that_order(
    table: list[tuple[int, int]], random: object, data: st.DataObject
) -> None:
    order = np.array(data.draw(st.permutations(range(len(table)))), np.int64)[: data.draw(st.integers(0, len(table)))]
    limits = [Limit(2, None), Limit(None, 12), Limit(3, 9), Limit(0, None)]
    groups, values = (np.array([row[part] for row in table], np.int64) for part in range(2))
    seen: dict[int, int] = defaultdict(int)
    total: dict[int, int] = defaultdict(int)
    ranks, totals, full = [], [], []
    for row in order:
        group, value = table[row]
        ranks.append(seen[group])
        seen[group] += 1
        total[group] += value
        totals.append(total[group])
        rows, tokens = limits[group]
        if group >= 0 and ((rows is not None and ranks[-1] >= rows) or (tokens is not None and total[group] > tokens)):
            full.append(int(row))
    assert rank_within(groups, order).tolist() == ranks
    assert running_total(groups, values, order).tolist() == totals
    assert over_limits(groups, limits, values, order).tolist() == full


# --- diversity ---------------------------------------------------------------------------------------------------


def greedy(prompts: np.ndarray, order: np.ndarray, k: int, apart: np.ndarray) -> set[int]:
    """One prompt after the other, one row after the other. apart: distances of all pairs."""
    chosen: set[int] = set()
    for prompt in np.unique(prompts):
        candidates = [int(row) for row in order if prompts[row] == prompt]
        mine = candidates[:1]
        while len(mine) < min(k, len(candidates)):
            rest = [row for row in candidates if row not in mine]
            mine.append(max(rest, key=lambda row: min(apart[row, other] for other in mine)))  # the first of a tie
        chosen |= set(mine)
    return chosen


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 60)), min_size=1, max_size=18),
    st.integers(1, 5),
    st.data(),
)
def test_the_farthest_rows_are_those_that_a_greedy_walk_picks(
    table: list[tuple[int, int, int]], k: int, data: st.DataObject
) -> None:
    prompts, answers, tokens = (np.array([row[part] for row in table], np.int64) for part in range(3))
    order = np.array(data.draw(st.permutations(range(len(table)))), np.int64)
    logs = np.log(tokens)
    apart = np.abs(logs[:, None] - logs) + (answers[:, None] != answers)
    chosen = farthest_first(prompts, order, k, by_answer_and_length(answers, tokens))
    assert len(set(chosen.tolist())) == len(chosen) and set(chosen.tolist()) == greedy(prompts, order, k, apart)


def test_diversity_by_text_takes_the_signature_that_shares_least(monkeypatch: pytest.MonkeyPatch) -> None:
    signatures = np.array([[1, 2, 3, 4], [1, 2, 3, 9], [1, 8, 8, 8], [1, 2, 7, 7]] * 5, np.uint32)
    prompts, order = np.repeat(np.arange(5), 4), np.arange(20)
    apart = np.mean(signatures[:, None] != signatures, axis=-1)
    for at_once in (1 << 20, 40):  # all prompts together, or one after the other
        monkeypatch.setattr("data.groups.DIVERSITY_BYTES", at_once)
        for k in (1, 2, 3, 4, 9):
            chosen = farthest_first(prompts, order, k, by_signature(signatures), row_bytes=16)
            assert set(chosen.tolist()) == greedy(prompts, order, k, apart)
    assert set(farthest_first(prompts, order, 2, by_signature(signatures)).tolist()) == {
        row + 4 * each for row in (0, 2) for each in range(5)
    }
