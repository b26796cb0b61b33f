import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UnusableInput
from configs.views import SHIPPED_VIEWS, LengthQuota, Quota, View
from data.calibration_metrics import error_bounds
from data.select import Fate
from data.selection import CODES, REASONS, Columns, SelfAsk, apply_view
from data.what_if import Difference, Groups, Taken
from data.what_if import what_if as compared

RAW = View(require_verified=False)
PASS, FAIL, NONE = 1, 0, -1


def columns(
    prompts: list[int],
    *,
    verdicts: list[int] | None = None,
    p: list[float] | None = None,
    tokens: list[int] | None = None,
    tasks: list[int] | None = None,
    answers: list[int] | None = None,
) -> Columns:
    """Verified, eligible traces of ten prompt tokens each; the keys rise with the rows."""
    number = len(prompts)
    said = np.array([PASS] * number if verdicts is None else verdicts, np.int8)
    return Columns(
        trace_keys_N=np.arange(number, dtype=np.uint64),
        prompt_codes_N=np.array(prompts, np.int64),
        task_codes_N=np.array([0] * number if tasks is None else tasks, np.int64),
        tasks=("sums", "facts/metals", "facts/colours", "code"),
        eligible_N=np.ones(number, bool),
        verdicts_N=said,
        p_correct_N=np.array(np.where(said == NONE, np.nan, said) if p is None else p, np.float64),
        prompt_tokens_N=np.full(number, 10, np.int64),
        generated_tokens_N=np.array([5] * number if tokens is None else tokens, np.int64),
        answer_keys_N=np.array([1] * number if answers is None else answers, np.uint64),
    )


def reasons(given: Columns, view: View) -> list[str]:
    names = list(REASONS)
    return [names[code] for code in apply_view(given, view).codes_N]


# --- right or wrong ----------------------------------------------------------------------------------------------


def test_the_raw_view_takes_what_is_eligible() -> None:
    given = dataclasses.replace(columns([1, 2], verdicts=[FAIL, NONE]), eligible_N=np.array([True, False]))
    assert reasons(given, RAW) == ["", "ineligible"]


def test_the_verified_view_tells_wrong_from_unjudged() -> None:
    assert reasons(columns([1, 2, 3], verdicts=[PASS, FAIL, NONE]), View()) == ["", "wrong", "unverified"]
    assert REASONS["wrong"] == "rejected" and REASONS["unverified"] == "unjudged"


def test_a_minimum_of_p_keeps_the_bound_itself_and_leaves_the_unknown_unjudged() -> None:
    given = columns([1, 2, 3], verdicts=[NONE] * 3, p=[0.5, 0.49, math.nan])
    assert reasons(given, View(require_verified=False, min_p_correct=0.5)) == ["", "p_correct_low", "p_correct_unknown"]


def test_the_largest_set_within_the_expected_error_is_kept_likeliest_first() -> None:
    random = np.random.default_rng(0)
    p = random.uniform(0.6, 1.0, 300).tolist()
    given = columns(random.integers(0, 80, 300).tolist(), verdicts=[NONE] * 300, p=p)
    view = View(require_verified=False, max_expected_error=0.1)
    kept = apply_view(given, view).kept_N
    assert 0 < kept.sum() < 300 and min(np.array(p)[kept]) >= max(np.array(p)[~kept])
    order = np.argsort(-np.array(p))
    bounds = error_bounds(1 - np.array(p)[order], given.prompt_codes_N[order])
    assert bounds[kept.sum() - 1] <= 0.1 and (bounds[kept.sum() :] > 0.1).all()
    careful = apply_view(dataclasses.replace(given, error_margin=0.05), view).kept_N
    assert 0 < careful.sum() < kept.sum() and not (careful & ~kept).any()


def test_the_margin_is_for_what_no_verifier_has_judged() -> None:
    given = dataclasses.replace(columns([1, 2, 3, 4]), error_margin=1.0)
    assert apply_view(given, View(require_verified=False, max_expected_error=0.0)).kept_N.all()


def test_the_expected_error_is_an_upper_bound_on_fresh_draws() -> None:
    """Calibrated p, 200 worlds: the true mean of 1 - p of the population above the threshold is rarely above the bound."""
    over = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        p = random.uniform(0.5, 1.0, 400)
        given = columns(np.repeat(np.arange(200), 2).tolist(), verdicts=[NONE] * 400, p=p.tolist())
        kept = apply_view(given, View(require_verified=False, max_expected_error=0.1)).kept_N
        threshold = p[kept].min()
        over += (1 - (threshold + 1) / 2) > 0.1
    assert over <= 20  # 5 % is promised of a set fixed beforehand; the largest of all prefixes is a little luckier


# --- so many of a prompt -----------------------------------------------------------------------------------------


def test_the_k_shortest_right_traces_of_each_prompt_stay() -> None:
    given = columns(
        [1, 1, 1, 1, 2, 2],
        verdicts=[PASS, PASS, PASS, FAIL, NONE, NONE],
        p=[1, 1, 1, 0, 0.7, 0.3],
        tokens=[30, 10, 20, 1, 9, 1],
    )
    found = reasons(given, View(require_verified=False, k_shortest_correct=2))
    assert found == ["not_among_shortest", "", "", "not_right", "", "not_right"]


def test_equal_lengths_are_settled_by_the_trace_key() -> None:
    given = dataclasses.replace(columns([1, 1, 1]), trace_keys_N=np.array([9, 2, 5], np.uint64))
    assert reasons(given, View(k_shortest_correct=2)) == ["not_among_shortest", "", ""]


def test_a_trace_far_longer_than_the_shortest_right_one_is_inefficient() -> None:
    given = columns([1, 1, 1, 2], verdicts=[PASS, PASS, FAIL, FAIL], tokens=[10, 31, 5, 99])
    assert reasons(given, View(require_verified=False, max_tokens_over_shortest=3.0)) == ["", "inefficient", "", ""]


def test_prompts_that_every_sample_gets_right_or_wrong_can_be_dropped() -> None:
    given = columns([1, 1, 2, 2, 3, 3, 4], verdicts=[PASS, PASS, FAIL, FAIL, PASS, FAIL, PASS])
    view = View(require_verified=False, drop_too_easy=True, drop_too_hard=True)
    assert reasons(given, view) == ["too_easy", "too_easy", "too_hard", "too_hard", "", "", ""]


def test_diverse_traces_are_the_shortest_and_those_farthest_from_it() -> None:
    given = columns([1, 1, 1, 2], tokens=[10, 11, 12, 7], answers=[1, 1, 2, 1])
    assert reasons(given, View(k_diverse=2)) == ["", "not_diverse", "", ""]
    signatures = np.array([[1, 2], [3, 4], [1, 5], [1, 2]], np.uint32)
    by_text = View(k_diverse=2, diverse_by="text")
    assert reasons(dataclasses.replace(given, signatures_NP=signatures), by_text) == ["", "", "not_diverse", ""]
    with pytest.raises(UnusableInput, match="k_diverse by text needs MinHash signatures"):
        apply_view(given, by_text)


# --- so much of a kind -------------------------------------------------------------------------------------------


def test_the_most_specific_quota_counts_and_a_family_shares_one() -> None:
    given = columns(list(range(8)), tasks=[0, 0, 1, 2, 1, 3, 3, 2])
    quotas = {"*": Quota(rows=1), "facts": Quota(rows=2), "facts/colours": Quota(rows=1), "fcats": Quota(rows=9)}
    found = apply_view(given, View(task_quotas=quotas))
    assert found.kept_N.tolist() == [True, False, True, True, True, True, False, False]
    assert found.idle_quotas == ("fcats",)
    assert found.reasons() == {"": 5, "task_quota": 3}


def test_length_buckets_have_quotas_of_rows_and_of_tokens() -> None:
    given = columns(list(range(6)), tokens=[8, 8, 9, 20, 20, 99])
    buckets = (LengthQuota(up_to_tokens=8, rows=1), LengthQuota(up_to_tokens=20, tokens=49))
    assert reasons(given, View(length_quotas=buckets)) == ["", "length_quota", "", "", "length_quota", ""]


def test_the_token_budget_is_never_exceeded_and_the_first_that_does_not_fit_ends_it() -> None:
    given = columns([1, 2, 3], tokens=[10, 80, 1])
    found = apply_view(given, View(max_tokens=60))
    assert reasons(given, View(max_tokens=60)) == ["", "token_budget", "token_budget"]
    assert found.tokens_N.tolist() == [20, 90, 11]


def test_what_is_preferred_stays_when_a_quota_cuts() -> None:
    given = columns([1, 2, 3], verdicts=[NONE] * 3, p=[0.6, math.nan, 0.9], tokens=[9, 3, 5])
    for prefer, kept in (("hash", 0), ("p_correct", 2), ("shorter", 1)):
        view = View(require_verified=False, prefer=prefer, task_quotas={"*": Quota(rows=1)})  # type: ignore[arg-type]
        assert np.flatnonzero(apply_view(given, view).kept_N).tolist() == [kept]


def test_unknown_facts_become_abstentions_with_the_tokens_that_they_will_have() -> None:
    asked = SelfAsk(np.array([True, True, False, False]), np.array([8, 0, 0, 0]), np.array([8, 8, 0, 0]), row_tokens=4)
    given = dataclasses.replace(columns([1, 2, 3, 4], tokens=[50] * 4), self_ask=asked)
    found = apply_view(given, View(abstention_share=0.25))
    assert found.kept_N.all() and found.relabelled_N.tolist() == [False, True, False, False]
    assert found.tokens_N.tolist() == [60, 14, 60, 60]
    assert found.abstention == {"relabelled": 1, "repeated": 0, "capped": 0, "produced": 1, "not_asked": 0}
    assert reasons(given, View(abstention_share=0.2)) == ["", "abstention_cap", "", ""]
    assert apply_view(given, View(abstention_share=0.25, max_tokens=60)).relabelled_N.sum() == 0


def test_an_abstention_share_without_the_students_answers_is_refused_with_a_remedy() -> None:
    with pytest.raises(UnusableInput, match="abstention_share needs the base student's own answers") as raised:
        apply_view(columns([1]), View(abstention_share=0.05))
    assert "\n" not in str(raised.value)
    nothing_to_ask = dataclasses.replace(columns([1]), self_ask=SelfAsk.nothing(1))
    assert apply_view(nothing_to_ask, View(abstention_share=0.05)).kept_N.all()


# --- the whole chain ---------------------------------------------------------------------------------------------


def random_columns(seed: int, number: int = 300) -> Columns:
    random = np.random.default_rng(seed)
    prompts = random.integers(0, number // 5, number)
    verdicts = random.integers(-1, 2, number)
    p = np.where(verdicts == NONE, random.uniform(0.4, 1, number), verdicts)
    closed = prompts % 3 == 0
    return Columns(
        trace_keys_N=random.permutation(number).astype(np.uint64),
        prompt_codes_N=prompts,
        task_codes_N=prompts % 4,
        tasks=("sums", "facts/metals", "facts/colours", "code"),
        eligible_N=random.random(number) < 0.9,
        verdicts_N=verdicts.astype(np.int8),
        p_correct_N=p,
        prompt_tokens_N=random.integers(5, 50, number),
        generated_tokens_N=random.integers(5, 500, number),
        answer_keys_N=random.integers(1, 4, number).astype(np.uint64),
        signatures_NP=random.integers(0, 4, (number, 16)).astype(np.uint32),
        self_ask=SelfAsk(closed, np.where(closed, prompts % 8, 0), np.where(closed, 8, 0), row_tokens=6),
        error_margin=0.01,
    )


def taken(given: Columns, order: np.ndarray) -> Columns:
    """The rows in another order, the prompts numbered from the other end."""
    asked = given.self_ask
    assert asked is not None
    moved = {
        name: getattr(given, name)[order]
        for name in (field.name for field in dataclasses.fields(given))
        if name[-2:] in ("_N", "NP")
    }
    moved["prompt_codes_N"] = 10_000 - moved["prompt_codes_N"]
    its = SelfAsk(asked.closed_book_N[order], asked.num_correct_N[order], asked.num_graded_N[order], asked.row_tokens)
    return dataclasses.replace(given, **moved, self_ask=its)


EVERYTHING = View(
    require_verified=False,
    min_p_correct=0.45,
    max_expected_error=0.2,
    max_tokens_over_shortest=20,
    drop_too_easy=True,
    drop_too_hard=True,
    k_shortest_correct=4,
    k_diverse=3,
    diverse_by="text",
    task_quotas={"*": Quota(rows=40), "facts": Quota(tokens=9000)},
    length_quotas=(LengthQuota(up_to_tokens=100, rows=30),),
    abstention_share=0.05,
    max_tokens=15_000,
)
VIEWS = [EVERYTHING, *SHIPPED_VIEWS.values()]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_a_view_is_the_same_in_any_order_of_rows_and_numbering_of_prompts(view: View) -> None:
    for seed in range(8):
        given = random_columns(seed)
        order = np.random.default_rng(100 + seed).permutation(300)
        mine, other = apply_view(given, view), apply_view(taken(given, order), view)
        assert np.array_equal(mine.codes_N[order], other.codes_N)
        assert np.array_equal(mine.relabelled_N[order], other.relabelled_N) and np.array_equal(
            mine.tokens_N[order], other.tokens_N
        )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(VIEWS))
def test_reasons_add_up_and_every_bound_of_the_view_holds(seed: int, view: View) -> None:
    given = random_columns(seed, 60)
    found = apply_view(given, view)
    kept = found.kept_N
    assert sum(found.reasons().values()) == 60 and not kept[~given.eligible_N].any()
    assert not (found.relabelled_N & ~kept).any()
    if view.min_p_correct is not None:
        assert (given.p_correct_N[kept] >= view.min_p_correct).all()
    if view.max_tokens is not None:
        assert found.tokens_N[kept].sum() <= view.max_tokens
    if view.k_diverse is not None:
        assert max(Counter(given.prompt_codes_N[kept].tolist()).values(), default=0) <= view.k_diverse
    if view.require_verified:
        assert (given.verdicts_N[kept] == PASS).all()


@pytest.mark.parametrize("limit", [200, 500, 2_000])
def test_a_larger_budget_keeps_all_that_a_smaller_one_keeps(limit: int) -> None:
    given = random_columns(1)
    small, large = (apply_view(given, View(max_tokens=most)).kept_N for most in (limit, 3 * limit))
    assert not (small & ~large).any() and large.sum() > small.sum()


def test_every_reason_has_a_code_of_its_own_and_a_fate() -> None:
    fates: set[Fate] = {"kept", "rejected", "unjudged"}
    assert set(REASONS.values()) == fates and len(set(CODES.values())) == len(REASONS) and CODES[""] == 0


# --- two views side by side --------------------------------------------------------------------------------------


def what_if(given: Columns, *views: View) -> Difference:
    taken = [
        Taken(found.codes_N, tuple(REASONS), found.tokens_N, found.relabelled_N)
        for found in (apply_view(given, view) for view in views)
    ]
    return compared(Groups(given.prompt_codes_N, given.task_codes_N, given.tasks), *taken)


def test_the_difference_says_what_would_be_gained_and_lost() -> None:
    given = columns([1, 1, 2, 3], verdicts=[PASS, PASS, FAIL, NONE], tokens=[5, 9, 5, 5], tasks=[0, 0, 1, 3])
    found = what_if(given, View(), View(require_verified=False, task_quotas={"sums": Quota(rows=1)}))
    assert (found.current_rows, found.other_rows, found.gained_rows, found.lost_rows) == (2, 3, 2, 1)
    assert (found.current_tokens, found.other_tokens) == (15 + 19, 15 + 15 + 15)
    assert found.gained_by_reason == {"unverified": 1, "wrong": 1} and found.lost_by_reason == {"task_quota": 1}
    assert found.gained_tasks == ("code", "facts/metals") and found.lost_tasks == ()
    assert [tuple(each) for each in found.by_task] == [
        ("code", 0, 1, 1, 0, 0, 15),
        ("facts/metals", 0, 1, 1, 0, 0, 15),
        ("sums", 2, 1, 0, 1, 34, 15),
    ]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(list(itertools.product(VIEWS, VIEWS))))
def test_a_difference_balances_and_turns_round(seed: int, views: tuple[View, View]) -> None:
    given = random_columns(seed, 80)
    there, back = what_if(given, *views), what_if(given, *reversed(views))
    assert there.current_rows + there.gained_rows - there.lost_rows == there.other_rows == back.current_rows
    assert (there.gained_by_reason, there.gained_tasks) == (back.lost_by_reason, back.lost_tasks)
    assert sum(there.gained_by_reason.values()) == there.gained_rows == sum(each.gained_rows for each in there.by_task)
    assert sum(each.other_tokens for each in there.by_task) == there.other_tokens
    same = what_if(given, views[0], views[0])
    assert same.gained_rows == same.lost_rows == 0 and same.current_tokens == same.other_tokens


@pytest.mark.long
def test_a_view_of_200_000_traces_takes_seconds() -> None:
    import time

    given = random_columns(3, 200_000)
    began = time.process_time()
    what_if(given, SHIPPED_VIEWS["verified"], EVERYTHING)
    seconds = time.process_time() - began
    print(f"what-if over 200,000 traces: {seconds:.2f} s of one core")
    assert seconds < 10.0  # 0.05 of the millisecond a trace that the whole build may cost


@pytest.mark.parametrize("prefer", ["hash", "shorter"])
def test_the_share_of_abstentions_holds_of_what_a_token_budget_leaves(prefer: str) -> None:
    rng, closed = np.random.default_rng(0), np.arange(1000) < 300
    found = Columns(
        trace_keys_N=rng.permutation(1000).astype(np.uint64),
        prompt_codes_N=np.arange(1000),
        task_codes_N=np.zeros(1000, np.int64),
        tasks=["t"],
        eligible_N=np.ones(1000, bool),
        verdicts_N=np.ones(1000, np.int8),
        p_correct_N=np.ones(1000),
        prompt_tokens_N=np.full(1000, 10),
        generated_tokens_N=np.where(closed, 20, 1000),
        answer_keys_N=np.arange(1000).astype(np.uint64),
        self_ask=SelfAsk(closed, np.zeros(1000, np.int64), np.where(closed, 8, 0), 5),
    )
    taken = apply_view(found, View.model_validate({"abstention_share": 0.05, "max_tokens": 100_000, "prefer": prefer}))
    rows, relabelled = int(taken.kept_N.sum()), int(taken.relabelled_N.sum())
    assert 0 < relabelled <= 0.05 * rows and (taken.relabelled_N <= taken.kept_N).all()
    assert taken.abstention is not None and taken.abstention["relabelled"] == relabelled
    assert sum(taken.abstention.values()) == 300
    assert int(taken.tokens_N[taken.kept_N].sum()) <= 100_000
