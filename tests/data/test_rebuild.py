"""`data what-if` on a built run folder: what it says before a build is what the build then does."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from configs.errors import UnusableInput
from configs.load import load_recipe
from data.rebuild import compare_with_built
from data.run_config import open_run
from data.stage import Context, run_stage
from data.stages import DATA
from data.store import RunFolder, read_rollup, seal
from tests.data.make_run import commit_traces, make_prompt, make_trace, seal_prompts, snapshot
from tracestill import application

SUMS = [make_prompt(f"What is {number} + 1?", str(number + 1)) for number in range(12)]
POEM = make_prompt("Write a poem.", "", verifier="", task="poems")
NO_HELD_OUT = "data.validation_share=0.0"


def context(root: Path, *overrides: str) -> Context:
    words = (NO_HELD_OUT, *overrides)
    loaded = load_recipe("embedded", list(words))
    return Context(loaded, open_run(loaded, root), "embedded", words, Console(quiet=True))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Twelve sums with a right, a longer right and a wrong answer each, and a poem that nobody can judge; built as `verified`."""
    opened = context(tmp_path / "run")
    seal_prompts(opened.run, [*SUMS, POEM], 37)
    traces = [make_trace(POEM, "Roses")]
    for prompt in SUMS:
        traces += [
            make_trace(prompt, prompt.answer, reasoning=f"so {prompt.answer}"),
            make_trace(prompt, prompt.answer, sample=1, reasoning=f"thus {prompt.answer}"),
            make_trace(prompt, "wrong", sample=2),
        ]
    path = commit_traces(opened.run, traces)
    files = [path, path.with_suffix(".json")]
    seal(opened.run, opened.run.traces, stage="generate", fingerprint="f", inputs={}, files=files, counts={}, seconds=0.0)
    run_stage(DATA, opened)
    return opened.run


def test_another_view_is_compared_with_the_dataset_that_stands_and_nothing_is_rebuilt(run: RunFolder) -> None:
    before = snapshot(run)
    names, found = compare_with_built(context(run.root), "raw")
    assert names == ("now: verified", "raw")
    assert (found.current_rows, found.other_rows, found.gained_rows, found.lost_rows) == (24, 37, 13, 0)
    assert found.gained_by_reason == {"wrong": 12, "no_verifier": 1} and found.gained_tasks == ("poems",)
    assert snapshot(run) == before


def test_what_if_says_what_the_build_then_does(run: RunFolder) -> None:
    wanted = context(run.root, "data.view={k_shortest_correct: 1, max_tokens: 100}")
    _, found = compare_with_built(wanted, "")
    assert 0 < found.other_rows < 12 and found.lost_by_reason.keys() == {"not_among_shortest", "token_budget"}
    run_stage(DATA, wanted)
    rollup = read_rollup(run.dataset)
    assert rollup is not None and rollup.counts["kept"] == found.other_rows
    _, again = compare_with_built(wanted, "")
    assert again.gained_rows == again.lost_rows == 0


def test_other_filters_and_copies_are_part_of_the_question(run: RunFolder) -> None:
    _, found = compare_with_built(context(run.root, "data.filters=[{type: length, max_tokens: 13}]"), "")
    assert (found.other_rows, found.lost_by_reason) == (0, {"too_long": 24})


def test_an_unknown_view_or_a_run_without_a_dataset_is_one_line(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"--view: no view 'calibratd'; did you mean calibrated"):
        compare_with_built(context(run.root), "calibratd")
    with pytest.raises(UnusableInput, match="no dataset to compare with yet"):
        compare_with_built(context(tmp_path / "other"), "raw")


def test_the_command_prints_both_views_and_ends_with_json(run: RunFolder) -> None:
    words = ["data", "what-if", "embedded", "--view", "raw", "--json", "--run-dir", str(run.root), "-s", NO_HELD_OUT]
    done = CliRunner().invoke(application(), words)
    assert done.exit_code == 0, done.output
    assert "gained" in done.output and "wrong under now: verified" in done.output
    assert json.loads(done.output.splitlines()[-1])["gained_rows"] == 13


def test_a_changed_benchmark_file_judges_again(run: RunFolder, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"question": "Nobody asked this one of any model anywhere so far"}\n')
    asked = context(run.root, f"data.decontaminate=[{items}]")
    run_stage(DATA, asked)
    items.write_text('{"question": "What is 3 + 1?"}\n')
    run_stage(DATA, asked)
    rollup = read_rollup(run.dataset)
    assert rollup is not None and rollup.counts["rejected_by_reason"]["contaminated"] == 3  # type: ignore[index]
