"""What `--status` says of a run, from its folder alone."""

import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import UnusableInput
from configs.load import load_recipe
from configs.schema import Budget, Recipe
from data.store import RunFolder
from data.work import WorkFolder
from generate.budget import union_seconds
from generate.status import read_status, status_json, status_tables
from tests.generate.test_worker import Scripted, changed, new_run, prompt, work


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("embedded", ["generate.segment_traces=4", "generate.samples_per_prompt=2"]).recipe


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return new_run(tmp_path, [prompt(f"What is {index}?") for index in range(5)], requests=10)


def text_of(run: RunFolder, budget: Budget | None = None) -> str:
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(status_tables(read_status(run, 30.0), budget or Budget()))
    return console.export_text()


def test_before_the_first_worker_everything_is_pending(run: RunFolder) -> None:
    status = read_status(run, 30.0)
    assert (status.ledger.requested, status.ledger.pending, status.workers) == (10, 10, [])
    assert status.eta_s is None and "10" in text_of(run)
    with pytest.raises(UnusableInput, match="no prompt set yet"):
        read_status(RunFolder(run.root / "nowhere"), 30.0)


def test_failures_are_counted_by_reason_and_budgets_by_share(recipe: Recipe, run: RunFolder) -> None:
    work(changed(recipe, budget=Budget(max_cost=100)), run, Scripted(fails_to_answer=2, cost=0.5))
    status = read_status(run, 30.0)
    assert status.ledger.failed_by_reason == {"busy": 2} and status.output_tokens == 8 * 6
    assert status.spent.cost == pytest.approx(4.0)
    said = text_of(run, Budget(max_cost=16))
    assert "2 busy" in said and "25% of the budget's $ 16.00" in said
    assert json.loads(json.dumps(status_json(status)))["ledger"]["completed"] == 8


def test_living_silent_and_ended_workers_are_told_apart(recipe: Recipe, run: RunFolder) -> None:
    work(recipe, run, Scripted(stops_after=2))
    folder, now = WorkFolder.of(run), time.time()
    for name, age in (("alive", 1), ("silent", 100)):
        folder.beat(name).touch()
        os.utime(folder.beat(name), (now - age, now - age))
        oldest = [{"trace_id": name, "task": "t", "since": now - 50, "tokens": 7, "attempt": 2}]
        told = {"state": "working", "started_at": now - 10, "seen_at": now, "finished": 5, "tokens": 200, "in_flight": 3,
                "uncommitted": 1, "tokens_in_hand": 40, "cost_in_hand": 0.5, "oldest": oldest}  # fmt: skip
        folder.facts(name).write_text(json.dumps(told))
    status = read_status(run, 30.0)
    assert sorted(line.state for line in status.workers) == ["dead", "ended", "working"]
    assert (status.in_flight, status.uncommitted) == (3, 1), "a dead worker has nothing in flight"
    assert [one.trace_id for one in status.stragglers] == ["alive"] and status.stragglers[0].seconds == pytest.approx(50, abs=5)
    assert status.tokens_per_s == pytest.approx(20) and status.eta_s == pytest.approx(8 / 0.5)
    assert status.spent.tokens == status.output_tokens + 40


def test_hours_are_those_in_which_somebody_was_at_it() -> None:
    assert union_seconds([]) == 0
    assert union_seconds([(10, 20), (15, 30), (100, 110), (101, 105)]) == 30
