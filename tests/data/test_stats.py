import dataclasses
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from configs.errors import UnusableInput
from configs.schema import Data
from data.calibration import KeptError
from data.calibration_metrics import Estimate
from data.commands import stats as stats_command
from data.records import Trace
from data.schema import to_table
from data.stats import (
    EFFICIENCY_EDGES,
    Copies,
    Cost,
    Stats,
    contamination_of,
    dataset_hash,
    dataset_stats,
    duplicates_of,
    efficiency_histogram,
    generated_histogram,
    quantiles,
    stats_json,
)
from data.stats_plots import MOST_TASKS, fate_bars, stats_plots, write_plots
from data.stats_tables import stats_tables, view_lines
from data.store import RunFolder, commit_segment, read_rollup
from tests.data.make_run import build_and_seal, make_prompt, make_run, make_trace

SUM, FACT = make_prompt("What is 2 + 2?"), make_prompt("Which metal is mined in Fasosur?", "iron", task="facts")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    first = [make_trace(SUM), make_trace(SUM, "5", sample=1), make_trace(SUM, sample=2, finish="abort")]
    root = tmp_path_factory.mktemp("run")
    run = make_run(root, [SUM, FACT], [first, [make_trace(FACT, "iron"), make_trace(FACT, "gold", sample=1)]])
    build_and_seal(run, Data(validation_share=0.0))
    return run


def test_stats_are_the_manifests_figures_by_task(run: RunFolder) -> None:
    stats = dataset_stats(run)
    assert list(stats.tasks) == ["facts", "sums"]
    assert stats.tasks["sums"]["train_rows"] == 1 and stats.tasks["sums"]["reasoning_tokens"] == 5
    assert (stats.total["kept"], stats.total["rejected_by_reason"]) == (2, {"wrong": 2})
    assert (stats.ledger.requested, stats.ledger.failed, stats.ledger.kept) == (5, 1, 2)


def test_the_dataset_hash_follows_its_content_and_nothing_else(tmp_path: Path, run: RunFolder) -> None:
    other = make_run(tmp_path / "other", [SUM, FACT], [[make_trace(FACT), make_trace(SUM)]])
    same = make_run(tmp_path / "same", [SUM, FACT], [[make_trace(SUM)], [make_trace(FACT, "iron")]])
    for folder in (other, same):
        build_and_seal(folder, Data(validation_share=0.0))
    hashes = [dataset_hash(rollup) for folder in (run, same, other) if (rollup := read_rollup(folder.dataset)) is not None]
    assert hashes[0] == hashes[1] != hashes[2]


def test_without_a_sealed_dataset_there_is_nothing_to_tell(tmp_path: Path) -> None:
    run = make_run(tmp_path / "empty", [SUM], [[make_trace(SUM)]])
    with pytest.raises(UnusableInput, match="no dataset yet"):
        dataset_stats(run)


# --- figures -----------------------------------------------------------------------------------------------------


def test_every_figure_of_a_small_run_is_the_one_counted_by_hand(run: RunFolder) -> None:
    stats = dataset_stats(run)
    assert {one.judge: (one.passed, one.failed, one.unjudged, one.reasons) for one in stats.judges} == {
        "answer_present-v1": (4, 0, 0, {}),
        "control_tokens-v1": (4, 0, 0, {}),
        "decontaminate-v2": (4, 0, 0, {}),
        "dedup-v2": (4, 0, 0, {}),
        "finish_reason-v1": (4, 0, 0, {}),
        "think_tags-v1": (4, 0, 0, {}),
        "verifier-exact-v2": (2, 2, 0, {"wrong": 2}),
    }
    assert [(one.part, one.completed.p50, one.kept.longest) for one in stats.lengths] == [
        ("prompt", 7, 7), ("reasoning", 5, 5), ("answer", 2, 2),
    ]  # fmt: skip
    assert stats.near_copies is None and stats.exact_copies is not None and stats.exact_copies.copies == 0
    assert stats.cost == Cost(dollars=0.0, tokens=4 * 7, seconds=4 * 0.5, wall_seconds=None, kept=2)
    assert sum(stats.generated.counts["kept"]) == 2 == sum(stats.generated.counts["not kept"])


def test_failed_and_superseded_attempts_cost_what_the_sidecars_say(tmp_path: Path) -> None:
    run = make_run(tmp_path, [SUM], [], requests=2)
    kept, cut = make_trace(SUM), make_trace(SUM, sample=1, finish="abort")
    for dollars, traces in ((0.5, [kept, cut]), (0.25, [kept])):
        facts = {
            "trace_ids": [trace.trace_id for trace in traces],
            "finish_reasons": [trace.finish_reason for trace in traces],
            "cost": dollars,
            "output_tokens": [10] * len(traces),
        }
        commit_segment(
            run.traces, to_table([dataclasses.replace(one, cost=9.0) for one in traces], Trace), worker="w", facts=facts
        )
    build_and_seal(run, Data(validation_share=0.0))
    cost = dataset_stats(run).cost
    assert (cost.dollars, cost.tokens, cost.kept) == (0.75, 30, 1) and cost.per_kept(cost.dollars) == 0.75


def test_what_nobody_keeps_costs_infinitely_much_and_json_says_null(run: RunFolder) -> None:
    nothing = Cost(1.0, 2, 3.0, None, 0)
    assert nothing.per_kept(nothing.dollars) == math.inf
    stats = dataclasses.replace(dataset_stats(run), cost=nothing)
    assert json.loads(stats_json(stats))["per_kept"] == {"dollars": None, "tokens": None, "seconds": None, "wall_seconds": None}
    assert "infinite" in shown(stats, 80)


def test_json_is_one_line_with_names_for_everything(run: RunFolder) -> None:
    text = stats_json(dataset_stats(run))
    found = json.loads(text)
    assert "\n" not in text and found["tasks"]["sums"]["kept"] == 1 and found["judges"][0]["judge"] == "answer_present-v1"
    assert found["lengths"][0]["kept"]["p50"] == 7 and found["per_kept"]["tokens"] == 14
    assert found["view"]["reason"] == "view verified asks for no p(correct)" and found["ledger"]["failed"] == 1


def test_a_quantile_is_the_smallest_length_with_that_share_at_or_under_it() -> None:
    rng = random.Random(0)
    for size in (1, 2, 19, 20, 21, 100):
        tokens = [rng.randrange(1000) for _ in range(size)]
        for share, found in zip((0.05, 0.25, 0.5, 0.75, 0.95, 1.0), quantiles(np.array(tokens)), strict=True):
            slow = min(length for length in tokens if sum(other <= length for other in tokens) >= share * size - 1e-9)
            assert found == slow, (size, share)
    assert set(quantiles(np.array([], int))) == {0}


@pytest.mark.parametrize("tokens", [[5, 5, 6, 90, 0], [1, 10, 100, 100_000, 7], [3]])
def test_every_trace_stands_in_one_bin_of_the_histogram(tokens: list[int]) -> None:
    kept_N = np.arange(len(tokens)) % 2 == 0
    found = generated_histogram(np.array(tokens), kept_N)
    assert sum(found.counts["kept"]) == kept_N.sum() and sum(found.counts["not kept"]) == (~kept_N).sum()
    for number, (low, high) in enumerate(zip(found.edges, found.edges[1:], strict=False)):
        inside = sum(low <= max(one, min(found.edges)) < high for one in tokens)
        assert found.counts["kept"][number] + found.counts["not kept"][number] == inside


def test_traces_far_beyond_the_last_edge_count_in_the_last_bin() -> None:
    counts = efficiency_histogram(np.array([1.0, 0.999, 5.0, 64.0, 1e6])).counts["right"]
    assert (counts[0], counts[-1], sum(counts)) == (2, 2, 5) and len(counts) == len(EFFICIENCY_EDGES) - 1


def test_copies_are_grouped_by_what_they_repeat() -> None:
    evidence = pa.table({"trace_id": ["a", "b"], "task": ["sums", "words"]})
    found = duplicates_of(
        [json.dumps({"original": one}) for one in "baabab"] + ['{"original": "b", "similarity": 0.9}'], evidence
    )
    assert (found.copies, found.originals) == (7, 2)
    assert found.largest == (Copies("b", "words", 4), Copies("a", "sums", 3))


def test_contamination_is_counted_by_benchmark_and_the_worst_items_come_first() -> None:
    leaks = [("x.jsonl:1:question", 0.5), ("x.jsonl:1:question", 0.75), ("y.jsonl:9:answer", 1.0), ("x.jsonl:2:question", 1.0)]
    found = contamination_of([json.dumps({"item": item, "coverage": share}) for item, share in leaks])
    assert (found.traces, found.items, found.by_benchmark) == (4, 3, {"x.jsonl": 3, "y.jsonl": 1})
    assert [tuple(one) for one in found.worst] == [
        ("x.jsonl:1:question", 2, 0.75), ("x.jsonl:2:question", 1, 1.0), ("y.jsonl:9:answer", 1, 1.0),
    ]  # fmt: skip


# --- on a terminal, and drawn ------------------------------------------------------------------------------------


def shown(stats: Stats, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for table in stats_tables(stats):
        console.print(table)
    return console.export_text()


def large(stats: Stats) -> Stats:
    """With a task of a long name with markup in it, a million of everything, and something to say in every table."""
    counts = dict.fromkeys(stats.tasks["sums"], 1_234_567)
    name = "a/very/long/family/of/tasks/that/does/not/fit/[red]anywhere[/red]/" + "x" * 90 + "\x1b[2J"
    copies = duplicates_of(['{"original": "' + "f" * 32 + '"}'] * 2, pa.table({"trace_id": ["f" * 32], "task": [name]}))
    leaks = contamination_of([json.dumps({"item": f"{name}.jsonl:1:question", "coverage": 0.5})])
    kept = KeptError(Estimate(0.01, 0.0, 0.02), Estimate(0.01, 0.0, 0.02), 3, 4)
    view = dataclasses.replace(stats.view, kept_error=kept, num_kept_unknown=5, idle_quotas=("a", "b"), num_unsearched=9)
    total = {**stats.total, **counts, "rejected_by_reason": {"reason_" * 20: 3}}
    return dataclasses.replace(
        stats, tasks={name: counts}, total=total, exact_copies=copies, near_copies=copies, contamination=leaks, view=view,
        num_wide_spread=7,
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal_and_lose_no_figure_and_no_name(run: RunFolder, width: int) -> None:
    stats = large(dataset_stats(run))
    text = shown(stats, width)
    assert max(map(len, text.splitlines())) <= width and "\N{HORIZONTAL ELLIPSIS}" not in text and "\x1b" not in text
    assert Counter(text.split())["1,234,567"] == 2 * (4 + 2 + 1)
    assert text.count("x") >= 90 * 4 and "[red]" in text.replace("\n", "").replace(" ", "")


def test_the_view_says_what_met_nothing_and_how_far_to_trust_it(run: RunFolder) -> None:
    stats = large(dataset_stats(run))
    said = dict(view_lines(stats.view, stats.num_wide_spread))
    assert said["p(correct)"] == "not fitted: view verified asks for no p(correct)"
    assert said["expected error"] == "1.00 % (0.00 % to 2.00 %) of 3 kept traces"
    assert said["idle quotas"] == "no trace answers to a, b" and said["not searched"].startswith("9 benchmark answers")
    assert said["wide spread"].startswith("7 traces, of prompts with right ones more than 5 times")


def test_plots_are_written_and_the_same_each_time(run: RunFolder, tmp_path: Path) -> None:
    stats = large(dataset_stats(run))
    first, again = write_plots(stats, tmp_path / "one"), write_plots(stats, tmp_path / "two")
    assert [path.name for path in first] == ["fates.png", "lengths.png", "efficiency.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in first)


def test_the_command_ends_with_one_line_of_json_after_the_plots_it_has_drawn(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.config.write_text("made by hand")
    stats_command(run.root, as_json=True, plots=tmp_path / "plots")
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["total"]["kept"] == 2
    drawn = [str(tmp_path / "plots" / f"{name}.png") for name in ("fates", "lengths", "efficiency")]
    assert lines[-3:] == drawn
    assert any(line.startswith("dataset sha256 ") for line in lines) and all(Path(line).is_file() for line in lines[-3:])


def test_many_small_tasks_are_one_bar_and_no_trace_is_left_out(run: RunFolder) -> None:
    stats = dataset_stats(run)
    tasks = {f"t{number}": {**stats.tasks["sums"], "completed": number, "kept": number, "rejected": 0} for number in range(40)}
    bars = fate_bars(dataclasses.replace(stats, tasks=tasks))  # type: ignore[arg-type]
    assert len(bars) == MOST_TASKS and bars[0].task == "t39" and bars[-1].task == "29 other tasks"
    assert sum(bar.counts[0] for bar in bars) == sum(range(40))
    assert [plot.name for plot in stats_plots(stats)] == ["fates", "lengths", "efficiency"]
