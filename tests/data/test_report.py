import dataclasses
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UnusableInput
from configs.prompt_sources import DocumentsSource
from data import plots
from data.calibration_metrics import wilson_interval
from data.depth import Outcome, Share, bucket_of, depth_figures, difference, share_of
from data.expert_counts import TaskCounts
from data.expert_figures import read_load
from data.prompt_set import prompt_file, read_prompts
from data.records import Prompt
from data.report import report_json, result_table, write_report
from data.report_experts import relative_load
from data.report_items import MAX_TEXT, shortened
from data.report_page import GateLine, verdict_of
from data.report_summary import FIGURES
from data.report_traces import length_facts
from data.store import RunFolder
from generate.prompts import build_prompt_set
from tests.data.make_run import build_and_seal, make_prompt, make_trace, rewrite
from tests.data.make_run import make_run as make_small_run
from tests.data.synthetic_run import EVIL, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run: RunFolder) -> str:
    return write_report(run).read_text()


class Collected(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def collected(page: str) -> Collected:
    parser = Collected()
    parser.feed(page)
    return parser


# --- the JSON object ---------------------------------------------------------------------------------------------


def test_the_summary_has_exactly_the_promised_keys(run: RunFolder) -> None:
    summary = report_json(run)
    assert list(summary) == ["teacher", "base", "student", "export", "ledger", "seconds", "experts", "accuracy_by_depth"]
    for name in ("teacher", "base", "student"):
        figures = summary[name]
        assert figures is not None
        assert tuple(figures) == FIGURES and set(figures["by_family"]) == {
            "chain_sum",
            "facts",
            "letter_counting",
            "spell_backward",
        }
    assert summary["export"] is None
    assert summary["ledger"] is not None and list(summary["ledger"]) == [
        "requested", "completed", "failed", "pending", "kept", "rejected", "unjudged",
        "failed_by_reason", "rejected_by_reason", "unjudged_by_reason",
    ]  # fmt: skip
    assert summary["seconds"] == {
        "prompts": 2.5,
        "headroom": None,
        "generate": 210.0,
        "data": 4.0,
        "train": 230.0,
        "evaluate": 150.0,
        "export": None,
    }
    json.dumps(summary, allow_nan=False)


def test_the_ledger_of_the_summary_balances(run: RunFolder) -> None:
    ledger = report_json(run)["ledger"]
    assert ledger is not None and ledger["kept"] is not None and ledger["rejected"] is not None and ledger["unjudged"] is not None
    assert ledger["requested"] == ledger["completed"] + ledger["failed"] + ledger["pending"]
    assert ledger["completed"] == ledger["kept"] + ledger["rejected"] + ledger["unjudged"]
    assert sum(ledger["rejected_by_reason"].values()) == ledger["rejected"]


def test_an_empty_run_folder_has_a_summary_of_nulls_and_a_page(tmp_path: Path) -> None:
    summary = report_json(RunFolder(tmp_path))
    assert summary["teacher"] is summary["student"] is summary["ledger"] is summary["accuracy_by_depth"] is None
    assert set(summary["seconds"].values()) == {None}
    assert "Not evaluated yet" in write_report(RunFolder(tmp_path)).read_text()


def test_a_run_that_was_not_evaluated_still_reports_its_traces_and_ledger(tmp_path: Path) -> None:
    run = make_run(tmp_path, evaluated=False)
    page = write_report(run).read_text()
    assert "Not evaluated yet" in page and "The ledger" in page and "Sample traces" in page and "Accuracy by family" not in page
    assert report_json(run)["seconds"]["train"] is None


def test_damaged_figures_are_one_clear_line(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run.evaluation / "student.json").write_text('{"metrics": {"accuracy": 1.0}}')
    with pytest.raises(UnusableInput, match=r"student.json.*by_family.*tracestill evaluate"):
        report_json(run)


def test_rows_that_changed_after_the_evaluation_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = run.evaluation / "base.arrow"
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(UnusableInput, match=r"base\.arrow: sha256"):
        write_report(run)


def test_the_table_has_a_column_a_model_and_a_row_a_family(run: RunFolder) -> None:
    table = result_table(report_json(run))
    assert [column.header for column in table.columns] == ["", "teacher", "base", "student"]
    assert table.row_count == 1 + 4 + 4


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_page_fetches_nothing_and_runs_no_script(page: str) -> None:
    found = collected(page)
    assert not re.findall(r"https?://|//[a-z]+\.|@import|url\((?!#)", page)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "img", "object", "embed", "base", "form"}
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("#", "data:image/png")), f"{tag} {name}={value}"


def test_text_from_traces_and_answers_is_escaped(page: str) -> None:
    assert "<script" not in page.lower()
    assert page.count("&lt;script&gt;alert(&#39;trace&#39;)&lt;/script&gt;") >= 2  # a sample trace, and a compared answer
    assert EVIL in collected(page).text


PARTS = (
    "The student learnt it",
    "Hallucination rate",
    "Accuracy by family",
    "The same question, before and after",
    "Trace lengths",
    "Training",
    "Expert load",
    "Divergence between tasks",
    "The ledger",
    "Where the time went",
    "Sample traces",
    "Where it comes from",
)


def test_the_page_is_well_formed_and_shows_every_part(page: str) -> None:
    found = collected(page)
    assert not found.open and not found.unbalanced
    for part in PARTS:
        assert part in found.text, part
    assert sum(tag == "svg" for tag, _ in found.tags) == 4
    assert "prefers-color-scheme: dark" in page and "#0102" not in page  # plots follow the page's colours


def test_the_dataset_has_its_section_once_a_build_has_left_evidence(tmp_path: Path) -> None:
    prompt = make_prompt("What is 2 + 2?", task="<b>sums</b>")
    traces = [make_trace(prompt), make_trace(prompt, sample=1), make_trace(prompt, "5", sample=2)]
    run = make_small_run(tmp_path, [prompt], [traces])
    assert "<h2>The dataset</h2>" not in write_report(run).read_text()
    build_and_seal(run)
    page = write_report(run).read_text()
    found = collected(page)
    assert not found.open and not found.unbalanced and "<b>sums" not in page and "#0102" not in page
    for part in ("What became of the traces", "Efficiency", "Cost of all attempts", "verifier-exact-v2", "Duplicates"):
        assert part in found.text, part
    assert sum(tag == "svg" for tag, _ in found.tags) == 3 and "Reliability" not in found.text
    assert write_report(run).read_text() == page


def test_equal_runs_give_equal_pages(run: RunFolder, page: str) -> None:
    assert write_report(run).read_text() == page


def test_the_verdict_follows_the_gates() -> None:
    figures = {"accuracy": 0.5, "by_family": {}, "hallucination_rate": None, "abstention_rate": None, "omniscience_index": None,
               "reasoning_tokens_per_correct": None}  # fmt: skip
    found = {"teacher": figures | {"accuracy": 0.8}, "base": figures | {"accuracy": 0.1}, "student": figures}
    passed, failed = GateLine("accuracy", 0.5, "at least 0.4", True), GateLine("hallucination_rate", None, "at most 0.3", False)
    good = verdict_of(found, [passed], gated=True)  # type: ignore[arg-type]
    assert good.tone == "good" and "From 10.0 % to 50.0 %" in good.sentence and "62% of what its teacher" in good.sentence
    bad = verdict_of(found, [passed, failed], gated=True)  # type: ignore[arg-type]
    assert bad.tone == "bad" and "Not passed: hallucination_rate" in bad.sentence
    assert verdict_of(found, [], gated=False).headline == "Ungated"  # type: ignore[arg-type]
    assert verdict_of({}, [], gated=False).tone == "open"


# --- figures on the page -----------------------------------------------------------------------------------------


# --- expert load -------------------------------------------------------------------------------------------------


def test_the_summary_names_the_worst_layer_of_the_whole_run(run: RunFolder) -> None:
    found, layers = report_json(run)["experts"], [row for row in read_load(run) if row.task is None]
    assert found is not None and (found["layers"], found["experts"], found["experts_per_token"], found["expert_parallel"]) == (
        4, 16, 2, 2,
    )  # fmt: skip
    assert found["max_over_mean"] == max(row.max_over_mean for row in layers) > 1
    assert found["effective_share"] == min(row.effective_share for row in layers) < 1
    assert found["divergence_nats"] == pytest.approx(sum(row.divergence_nats or 0 for row in layers) / 4) and not found["alarms"]


def test_the_page_has_a_row_a_layer_and_a_row_a_task(page: str) -> None:
    section = page[page.index("<h2>Expert load</h2>") : page.index("<h2>The ledger</h2>")]
    assert section.count("<tr>") == 1 + 4 + 1 + 3 and "rank max / mean" in section and "spread over 2 ranks" in section


def test_a_collapse_stands_on_the_page_in_one_line(tmp_path: Path) -> None:
    alarm = "sparse layer 3: dead_share 0.5, above 0.25"
    run = make_run(tmp_path, evaluated=False, expert_alarms=[alarm])
    summary = report_json(run)["experts"]
    assert summary is not None and summary["alarms"] == [alarm]
    assert f'<p class="alarm"><b>collapse?</b> {alarm}</p>' in write_report(run).read_text()


def test_a_teacher_without_routers_has_no_expert_load(tmp_path: Path) -> None:
    run = make_run(tmp_path, evaluated=False)
    rewrite(run.traces / "manifest.json", files={}, sizes={})
    assert report_json(run)["experts"] is None and "Expert load" not in write_report(run).read_text()


def test_telemetry_that_changed_after_it_was_sealed_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, evaluated=False)
    path = run.metrics / "expert_load.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnusableInput, match=r"expert_load\.arrow: sha256"):
        report_json(run)


def test_relative_load_is_a_multiple_of_the_layers_mean() -> None:
    counts = [TaskCounts("a", 6, np.array([[1, 1, 1], [0, 0, 0]])), TaskCounts("b", 6, np.array([[1, 3, 5], [0, 0, 0]]))]
    assert relative_load(counts) == [pytest.approx([0.5, 1.0, 1.5]), [0.0, 0.0, 0.0]]


# --- accuracy by depth -------------------------------------------------------------------------------------------


def share(correct: int, traces: int) -> Share:
    return share_of([True] * correct + [False] * (traces - correct))


def test_wilson_intervals_are_those_of_the_textbooks() -> None:
    """8 of 10 and 0 of 10 by hand; the differences are Newcombe's own examples (Statistics in Medicine 17, 1998, table II)."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert (
        wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
        and wilson_interval(10, 10)[1] == 1.0
        and wilson_interval(0, 14)[0] == 0.0
    )
    assert difference(share(56, 70), share(48, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert difference(share(5, 56), share(0, 29)) == pytest.approx((5 / 56, -0.0381, 0.1926), abs=5e-5)
    assert difference(share(1, 2), share_of([])) is None


def test_buckets_are_tenths_and_the_whole_prompt_ends_in_the_last() -> None:
    tenths = [0.0, 0.0999, 0.1, 0.3, 0.2999, 0.6999, 0.7, 0.9999, 1.0]
    assert [bucket_of(depth) for depth in tenths] == [0, 0, 1, 3, 2, 6, 7, 9, 9]
    assert all(bucket_of(round(number / 10, 4)) == min(number, 9) for number in range(11))


def test_a_trace_counts_at_each_of_its_places_and_once_as_middle_or_ends() -> None:
    outcomes = [
        Outcome("a", (0.05, 0.95), True), Outcome("a", (0.05, 0.95), True), Outcome("a", (0.15, 0.55), False),
        Outcome("a", (0.35, 0.95), True), Outcome("a", (0.05, 0.95), None), Outcome("b", (0.5,), False),
    ]  # fmt: skip
    found = depth_figures(outcomes)
    assert list(found) == ["a", "b"] and (found["a"]["traces"], found["a"]["unjudged"]) == (4, 1)
    rows = [(row["low"], row["traces"], row["correct"]) for row in found["a"]["by_depth"]]
    assert rows == [(0.0, 2, 2), (0.1, 1, 0), (0.3, 1, 1), (0.5, 1, 0), (0.9, 3, 3)]
    assert (found["a"]["ends"], found["a"]["middle"]) == (share(2, 2), share(1, 2))
    assert found["a"]["lost_in_the_middle"] == 0.5 and found["b"]["lost_in_the_middle"] is None
    assert found["b"]["ends"] == {"traces": 0, "correct": 0, "accuracy": None, "interval": None}


@pytest.fixture(scope="module")
def deep_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Prompts of the documents source, two traces each; the teacher is right where no fact is in the middle, and once it was
    cut. Beside them a prompt without places."""
    root = tmp_path_factory.mktemp("deep")
    (root / "book.txt").write_text("the river keeps its own slow counsel and every mill on it grinds.\n" * 200)
    source = DocumentsSource(paths=("book.txt",), budget_tokens=9_000, count=21, decoys=0, licence="MIT")
    prompts = build_prompt_set([source], [], [root], lambda texts: [len(text.encode()) for text in texts]).prompts
    traces = [
        make_trace(prompt, "wrong" if is_middle(prompt) else prompt.answer, sample=sample)
        for prompt in prompts
        for sample in range(2)
    ]
    cut = next(index for index, trace in enumerate(traces) if trace.messages[-1].get("content") != "wrong")
    traces[cut] = dataclasses.replace(traces[cut], finish_reason="length")
    plain = make_prompt("2+2?")
    run = make_small_run(root / "run", [*prompts, plain], [traces[:30], [*traces[30:], make_trace(plain)]])
    build_and_seal(run)
    return run


def is_middle(prompt: Prompt) -> bool:
    return any(0.3 <= place["depth"] < 0.7 for place in json.loads(prompt.evidence)["places"])


def test_the_report_of_a_run_tells_ends_from_the_middle(deep_run: RunFolder) -> None:
    """Counted once more from the prompts themselves."""
    figures = report_json(deep_run)["accuracy_by_depth"]
    assert figures is not None and list(figures) == ["documents/two-facts"]
    found, prompts = figures["documents/two-facts"], [prompt for prompt in read_prompts(deep_run) if prompt.evidence]
    depths = [place["depth"] for prompt in prompts for place in json.loads(prompt.evidence)["places"]]
    assert (found["traces"], found["unjudged"]) == (42, 0)
    assert {row["low"]: row["traces"] for row in found["by_depth"]} == {
        number / 10: 2 * count for number, count in sorted(Counter(bucket_of(depth) for depth in depths).items())
    }
    num_middle = 2 * sum(map(is_middle, prompts))
    assert found["middle"] == share(0, num_middle) and found["ends"] == share(41 - num_middle, 42 - num_middle)
    lost, interval = found["lost_in_the_middle"], found["lost_in_the_middle_interval"]
    assert lost is not None and interval is not None and 0.5 < interval[0] < lost < interval[1]
    assert lost == found["ends"]["accuracy"]
    json.dumps(figures, allow_nan=False)


def test_the_page_shows_accuracy_by_depth_where_there_is_any(deep_run: RunFolder, page: str) -> None:
    shown = write_report(deep_run).read_text()
    found = collected(shown)
    assert not found.open and not found.unbalanced and "Accuracy by depth" in found.text
    section = shown[shown.index("<h2>Accuracy by depth</h2>") :].partition("<h2>")[2].partition("<h2>")[0]
    assert 'aria-label="accuracy by depth"' in section and "lost in the middle" in section and "0.9 to 1.0" in section
    assert section.count("<tr>") == 1 + 10 + 2 and write_report(deep_run).read_text() == shown
    assert "Accuracy by depth" not in page


def test_depths_of_a_changed_file_are_refused(deep_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(deep_run.root, tmp_path / "run")
    changed = RunFolder(tmp_path / "run")
    for path in (prompt_file(changed), next(changed.traces.glob("*.arrow")), changed.verdicts / "verifier-exact-v2.arrow"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UnusableInput, match=f"{path.name}: sha256"):
            report_json(changed)
        path.write_bytes(content)


def test_percentiles_are_lengths_that_occurred() -> None:
    facts = dict(length_facts({"a": list(range(1, 51)), "b": list(range(51, 101))}))
    assert (
        facts["median, 95th percentile"] == "50 and 95 tokens"
        and facts["longest"] == "100 tokens"
        and facts["output tokens"] == "5,050"
    )


def test_long_text_is_cut_and_says_so() -> None:
    assert shortened("x" * MAX_TEXT) == "x" * MAX_TEXT
    assert shortened("x" * (MAX_TEXT + 5)).endswith("[... 5 more characters]")


def test_plots_take_names_that_look_like_markup_or_formulas() -> None:
    svg = plots.length_histogram({"$x^2$ <b>&": [1, 2, 3], **{f"task{n}": [4] for n in range(9)}})
    assert "$x^2$ &lt;b&gt;&amp;" in svg and "5 other tasks" in svg
    assert plots.length_histogram({"one": [7]})
