import json
import logging
from typing import Any

import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from data.curriculum import ABSTENTION, TASK_SPECS, fact_rows
from data.records import Prompt
from data.verify import VERIFIERS, exact, math, self_check
from tests.data.make_run import make_prompt


def gym_prompts(task: str, size: int = 20, **params: Any) -> list[Prompt]:
    """Prompts the way the prompts stage writes them: the entry has gone through JSON."""
    entries = reasoning_gym.create_dataset(task, size=size, seed=5, **params)
    details = [json.dumps({"task": task, "params": params, "entry": entry}, default=str) for entry in entries]
    return [
        make_prompt(entry["question"], str(entry["answer"]), verifier="reasoning_gym", task=task, details=text)
        for entry, text in zip(entries, details, strict=True)
    ]


# --- exact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("iron", "iron", 1.0),
        ("iron", " Iron.\n", 1.0),
        ("New  York", "new york!", 1.0),
        ("ﬁne", "fine", 1.0),
        ("iron", "irons", 0.0),
        ("iron", "It is iron.", 0.0),
        ("iron", "", 0.0),
        ("", "", 0.0),
        ("...", "!!", 0.0),
        ("3.5", "3.5.", 1.0),
        ("-4", "4", 0.0),
        ("iron", ABSTENTION, 0.0),
        (ABSTENTION, "i don’t know", 1.0),
        (ABSTENTION, "I do not know.", 1.0),
        (ABSTENTION, "", 0.0),
        (ABSTENTION, "I don't know, but iron", 0.0),
        (ABSTENTION, "everyone knows it is iron", 0.0),
    ],
)
def test_exact_matches_are_equal_after_normalisation_only(reference: str, answer: str, expected: float) -> None:
    assert exact.score(make_prompt("q", reference), answer) == expected


def test_the_curriculum_says_it_does_not_know_in_words_that_count() -> None:
    assert exact.is_abstention(ABSTENTION)
    assert not exact.is_abstention("")


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert exact.normalise(exact.normalise(text)) == exact.normalise(text)


def test_every_shipped_fact_scores_its_own_reference() -> None:
    assert all(self_check(make_prompt(str(row["question"]), str(row["answer"]))) for row in fact_rows())


# --- reasoning-gym -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASK_SPECS)
def test_each_family_of_the_curriculum_is_scored_by_its_own_scorer(task: str) -> None:
    for prompt in gym_prompts(task, **TASK_SPECS[task]):
        score = VERIFIERS["reasoning_gym"].score
        assert self_check(prompt)
        assert score(prompt, prompt.answer) == 1.0
        assert score(prompt, prompt.answer + "7") < 1.0
        assert score(prompt, f"The answer is {prompt.answer}") < 1.0
        assert score(prompt, "") == 0.0


def test_a_scorer_that_tolerates_forms_of_a_number_still_does() -> None:
    (prompt,) = gym_prompts("chain_sum", 1, min_terms=2, max_terms=2, min_digits=3, max_digits=3)
    assert VERIFIERS["reasoning_gym"].score(prompt, f"{prompt.answer}.0") == 1.0


def test_a_task_whose_reference_fails_its_own_scorer_fails_the_self_check() -> None:
    assert not self_check(gym_prompts("rush_hour", 1)[0])


@pytest.mark.parametrize("details", ["", "{}", "[]", '{"task": "no_such_task", "params": {}, "entry": {}}'])
def test_details_without_an_entry_are_an_error_and_no_score(details: str) -> None:
    prompt = make_prompt("q", "4", verifier="reasoning_gym", details=details)
    with pytest.raises(ValueError):
        VERIFIERS["reasoning_gym"].score(prompt, "4")
    assert not self_check(prompt)


def test_a_prompt_nobody_can_judge_has_nothing_to_check() -> None:
    assert self_check(make_prompt("q", "", verifier=""))
    assert not self_check(make_prompt("q", "", verifier="exact"))


# --- math --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _quiet_math() -> None:
    math.prepare()
    assert logging.getLogger("math_verify").level == logging.ERROR


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("1/2", "0.5", 1.0),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1.0),
        ("$x^2-1$", "$(x-1)(x+1)$", 1.0),
        ("42", "so that the answer is \\boxed{42}.", 1.0),
        ("42", "43", 0.0),
        ("42", "", 0.0),
        ("42", "no number at all", 0.0),
        # not symmetric: an inequality may be answered by its interval, not the other way round
        ("$1<x<2$", "$(1,2)$", 1.0),
        ("$(1,2)$", "$1<x<2$", 0.0),
    ],
)
def test_mathematical_equality_takes_the_reference_first(reference: str, answer: str, expected: float) -> None:
    assert math.score(make_prompt("q", reference, verifier="math"), answer) == expected


def test_a_reference_without_an_expression_cannot_judge_anything() -> None:
    prompt = make_prompt("q", "to be, or not to be", verifier="math")
    with pytest.raises(ValueError, match="no mathematical expression"):
        math.score(prompt, "4")
    assert not self_check(prompt)
