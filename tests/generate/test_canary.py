"""The canary: a share of every task, chosen by hash, and thresholds that say no."""

import dataclasses

import numpy as np
import pytest

from configs.schema import Canary
from generate.canary import CanaryReport, canary_prompts, canary_table, refusal, violations
from tests.generate.test_pool import make_index

INDEX = make_index(["a"] * 50 + ["b"] * 3 + ["c"], [1] * 54)


def test_every_task_gives_its_share_and_at_least_one() -> None:
    chosen = canary_prompts(INDEX, 0.1, seed=0)
    assert [int(chosen[INDEX.task_codes_N == task].sum()) for task in range(3)] == [5, 1, 1]
    assert canary_prompts(INDEX, 1.0, seed=0).all()


def test_the_choice_follows_the_seed_and_a_larger_share_holds_a_smaller_one() -> None:
    small, large = canary_prompts(INDEX, 0.1, seed=0), canary_prompts(INDEX, 0.5, seed=0)
    assert np.array_equal(small, canary_prompts(INDEX, 0.1, seed=0)) and (large >= small).all()
    assert not np.array_equal(small, canary_prompts(INDEX, 0.1, seed=1))


REPORT = CanaryReport(
    requests=100,
    completed=98,
    failed=2,
    fates={"kept": 60, "wrong": 38},
    truncated_share=0.05,
    reasoning_tokens={"p10": 10.0, "p50": 100.0, "p90": 900.0, "p99": 5000.0},
    output_tokens=20_000,
    cost=2.0,
    whole_run_cost=40.0,
)
DEMANDING = Canary(max_reasoning_tokens_p99=5000, max_cost=40.0, min_kept_share=60 / 98, max_truncated_share=0.05)


def test_what_keeps_the_thresholds_goes_on() -> None:
    assert violations(REPORT, DEMANDING) == []
    assert "60 (61.2%)" in str(canary_table(REPORT, DEMANDING).columns[1]._cells)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fates": {"kept": 59, "wrong": 39}}, "60.2% kept, expected at least min_kept_share 61.2%"),
        ({"truncated_share": 0.06}, "6.0% truncated"),
        ({"failed": 3}, "3.0% failed"),
        ({"reasoning_tokens": {"p99": 5001.0}}, "reasoning p99 5,001 tokens"),
        ({"whole_run_cost": 40.01}, "the whole run would cost \\$40.01"),
    ],
)
def test_each_threshold_says_no_by_name(changes: dict[str, object], words: str) -> None:
    found = violations(dataclasses.replace(REPORT, **changes), DEMANDING)  # type: ignore[arg-type]
    assert len(found) == 1
    assert refusal(found).exit_code == 3
    with pytest.raises(type(refusal(found)), match=words):
        raise refusal(found)
