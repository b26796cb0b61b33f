from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UnusableInput
from data.ledger import Fates, Ledger, generation_ledger, read_ledger, with_view
from data.store import RunFolder
from tests.data.make_run import make_prompt, make_run, make_trace

SUM = make_prompt("What is 2 + 2?")


def test_the_ledger_of_a_run_is_counted_from_its_manifests(tmp_path: Path) -> None:
    first = [make_trace(SUM), make_trace(SUM, sample=1, finish="abort"), make_trace(SUM, sample=2, finish="length")]
    again = [make_trace(SUM, sample=1), make_trace(SUM, sample=3)]  # sample 1 was asked again, and answered
    run = make_run(tmp_path, [SUM], [first, again], requests=6)
    ledger = read_ledger(run)
    ledger.check(viewed=False)
    assert (ledger.requested, ledger.completed, ledger.failed, ledger.pending, ledger.superseded) == (6, 4, 0, 2, 1)
    assert ledger.failed_by_reason == {}


def test_a_run_without_prompts_has_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="no prompt set yet"):
        read_ledger(RunFolder(tmp_path))


def test_more_traces_than_requests_do_not_balance() -> None:
    with pytest.raises(UnusableInput, match="another request set"):
        Ledger(requested=1, completed=2, pending=-1).check(viewed=False)


def test_traces_that_came_after_the_dataset_do_not_balance() -> None:
    ledger = with_view(
        Ledger(requested=3, completed=3), {"kept": 1, "rejected_by_reason": {"wrong": 1}, "unjudged_by_reason": {}}
    )
    ledger.check(viewed=False)
    with pytest.raises(UnusableInput, match="3 completed is not 1 kept \\+ 1 rejected \\+ 0 unjudged"):
        ledger.check(viewed=True)


@given(st.dictionaries(st.sampled_from(["stop", "length", "abort"]), st.integers(0, 9)), st.integers(0, 50))
def test_the_first_balance_holds_for_any_state_with_enough_requests(by_reason: dict[str, int], waiting: int) -> None:
    ledger = generation_ledger(Fates(by_reason, {}), sum(by_reason.values()) + waiting)
    ledger.check(viewed=False)
    assert ledger.pending == waiting and ledger.failed == by_reason.get("abort", 0) == sum(ledger.failed_by_reason.values())
