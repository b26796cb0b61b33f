import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.abstention import (
    ABSTENTION,
    Grades,
    abstain,
    allowed_abstentions,
    by_lot,
    is_closed_book,
    provenance,
    questions,
    relabel,
    tally,
)
from data.records import Message, Prompt
from data.verify.exact import is_abstention
from tests.data.make_run import make_prompt


def fact(question: str, answer: str = "iron", *, known: bool | None = True, split: str = "train") -> Prompt:
    return dataclasses.replace(make_prompt(question, answer), known=known, split=split)  # type: ignore[arg-type]


def test_only_facts_that_somebody_knows_and_training_asks_are_put_to_the_student() -> None:
    asked = fact("Which metal is mined in Bado?")
    others = [fact("sum", known=None), fact("unknown", "I don't know", known=False), fact("held out", split="eval")]
    assert [is_closed_book(prompt) for prompt in (asked, *others)] == [True, False, False, True]
    found = list(questions([asked, *others], samples=3, run_seed=1))
    assert [(question.prompt.prompt_id, question.sample_index) for question in found] == [(asked.prompt_id, i) for i in range(3)]
    assert len({question.request_id for question in found}) == len({question.seed for question in found}) == 3


def test_a_question_is_the_same_wherever_its_prompt_stands() -> None:
    first, second = fact("a"), fact("b")
    there, back = (sorted(questions(order, samples=2, run_seed=1)) for order in ([first, second], [second, first]))
    assert there == back
    seeds = [{question.seed for question in questions([first], samples=2, run_seed=seed)} for seed in (1, 2)]
    assert not seeds[0] & seeds[1]


def test_only_a_full_score_is_right_and_no_verdict_is_no_grade() -> None:
    prompt = fact("a")
    asked = list(questions([prompt], samples=5, run_seed=0))
    assert tally(zip(asked, (1.0, 0.5, None, 1.0, 0.0), strict=True)) == {prompt.prompt_id: Grades(2, 4)}


# --- deciding ----------------------------------------------------------------------------------------------------


def test_what_the_student_can_produce_stays_and_the_rest_becomes_one_row_a_prompt() -> None:
    # prompt 5: produced; prompt 6: unknown, two samples; prompt 7: unknown; prompt 8: not asked; last row: no fact
    found = abstain(
        trace_keys_N=np.array([1, 9, 4, 3, 2, 0], np.uint64),
        prompt_codes_N=np.array([5, 6, 6, 7, 8, 9]),
        candidates_N=np.array([True] * 5 + [False]),
        num_correct_N=np.array([3, 2, 2, 0, 0, 0]),
        num_graded_N=np.array([8, 8, 8, 8, 0, 0]),
        num_kept=10,
        samples=8,
        min_correct=3,
        share=0.125,
    )
    # 10 kept, 3 rows of unknown prompts leave 7: r <= (7 + r) / 8 allows one, and lots decide which
    assert found.counts() == {"relabelled": 1, "repeated": 1, "capped": 1, "produced": 1, "not_asked": 1}
    assert sorted((9, 4, 3), key=lot) == [3, 4, 9]
    assert (found.relabelled.tolist(), found.repeated.tolist(), found.capped.tolist()) == ([3], [1], [2])
    assert (found.produced.tolist(), found.not_asked.tolist()) == ([0], [4])


def lot(key: int) -> int:
    """Of data.abstention.by_lot, in plain integers."""
    mixed = (key + 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> shift)) * factor % 2**64
    return mixed ^ (mixed >> 31)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, unique=True))
def test_lots_are_drawn_as_in_plain_integers(keys: list[int]) -> None:
    drawn = by_lot(np.array(keys, np.uint64), np.arange(len(keys)))
    assert [keys[row] for row in drawn.tolist()] == sorted(keys, key=lot)


def test_a_prompt_whose_missing_grades_could_make_it_known_is_not_decided() -> None:
    graded, correct = np.array([8, 6, 5, 2, 0]), np.array([2, 0, 0, 2, 0])
    found = abstain(
        np.arange(5, dtype=np.uint64), np.arange(5), np.ones(5, bool), correct, graded,
        num_kept=100, samples=8, min_correct=3, share=0.5,
    )  # fmt: skip
    assert (found.relabelled.tolist(), found.not_asked.tolist()) == ([0, 1], [2, 3, 4])


@given(st.integers(0, 5000), st.integers(0, 99))
def test_the_cap_is_the_largest_number_within_the_share(num_others: int, percent: int) -> None:
    allowed = allowed_abstentions(num_others, percent / 100)
    assert 100 * allowed <= percent * (num_others + allowed)
    assert 100 * (allowed + 1) > percent * (num_others + allowed + 1)


rows = st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    rows,
    st.dictionaries(st.integers(0, 6), st.integers(0, 8)),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.05, 0.3, 0.9]),
    st.data(),
)
def test_every_candidate_has_one_fate_and_no_order_of_rows_changes_it(
    table: list[tuple[int, bool]], correct: dict[int, int], num_other_rows: int, share: float, data: st.DataObject
) -> None:
    prompts = np.array([row[0] for row in table], np.int64)
    candidates = np.array([row[1] for row in table], bool)
    keys = np.array(data.draw(st.permutations(range(len(table)))), np.uint64)
    num_correct = np.array([correct.get(prompt, 0) for prompt in prompts], np.int64)
    num_asked = np.array([8 * (prompt in correct) for prompt in prompts.tolist()], np.int64)
    num_kept = int(candidates.sum()) + num_other_rows

    def fates(order: np.ndarray) -> dict[str, set[int]]:
        columns = (keys[order], prompts[order], candidates[order], num_correct[order], num_asked[order])
        found = abstain(*columns, num_kept=num_kept, samples=8, min_correct=3, share=share)
        return {name: {int(keys[order][row]) for row in rows} for name, rows in found._asdict().items()}

    mine = fates(np.arange(len(table)))
    assert mine == fates(np.array(data.draw(st.permutations(range(len(table)))), np.int64))
    assert sorted(key for fate in mine.values() for key in fate) == sorted(keys[candidates].tolist())
    dropped = len(mine["repeated"]) + len(mine["capped"])
    assert len(mine["relabelled"]) <= share * (num_kept - dropped) + 1e-9
    relabelled = [int(prompts[keys.tolist().index(key)]) for key in mine["relabelled"]]
    assert len(set(relabelled)) == len(relabelled) and all(correct[prompt] < 3 for prompt in relabelled)


# --- relabelling -------------------------------------------------------------------------------------------------

CONVERSATION: tuple[Message, ...] = (
    {"role": "user", "content": "Which metal?"},
    {"role": "assistant", "content": "iron", "reasoning_content": "Bado: iron."},
)


@pytest.mark.parametrize("reasoning", ["", "Nothing comes to mind."])
def test_a_relabelled_conversation_keeps_the_question_and_nothing_of_the_fact(reasoning: str) -> None:
    relabelled = relabel(CONVERSATION, reasoning=reasoning)
    assert relabelled[0] == CONVERSATION[0]
    assert relabelled[1] == {"role": "assistant", "content": ABSTENTION, "reasoning_content": reasoning}
    assert is_abstention(relabelled[1].get("content", "")) and "iron" not in json.dumps(relabelled)
    assert CONVERSATION[1].get("content") == "iron"  # the trace is as it was


def test_a_relabelled_row_says_why() -> None:
    assert json.loads(provenance(Grades(1, 8), 3)) == {
        "relabelled": "abstention",
        "student_correct": 1,
        "student_asked": 8,
        "min_correct": 3,
        "version": 2,
    }
