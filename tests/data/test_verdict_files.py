"""What a build leaves beside its verdicts: details, evidence, and what the view says of itself."""

import dataclasses
import json
import statistics
from pathlib import Path

import pyarrow as pa
import pytest

from configs.errors import UnusableInput
from configs.schema import Data
from data.build import build
from data.calibration import Estimate, KeptError
from data.details import parsed
from data.records import Prompt, Trace, Turn
from data.schema import VERDICT
from data.store import Rollup, RunFolder, read_rollup
from data.verdict_files import (
    EVIDENCE,
    EVIDENCE_FILE,
    VIEW_FACTS_FILE,
    WIDE_SPREAD_RATIO,
    ViewFacts,
    facts_bytes,
    has_evidence,
    judge_files,
    read_facts,
    read_file,
)
from tests.data.make_run import build_and_seal, make_prompt, make_run, make_trace

CALIBRATED = {"base": "calibrated", "abstention_share": None}
SUM, OPEN = make_prompt("What is 2 + 2?"), make_prompt("Which word is missing?", "", verifier="", task="words")
LEAKED = "How many marbles of either colour does the third of the seven boxes hold"
ITEM = make_prompt(LEAKED, "11", split="eval")
LEAK = make_prompt(f"Someone asked: {LEAKED.upper()}? Tell me.", "11")
SENTENCE = " ".join(f"word{number}" for number in range(200))


def sealed(run: RunFolder) -> Rollup:
    rollup = read_rollup(run.dataset)
    assert rollup is not None
    return rollup


def details(run: RunFolder, judge: str) -> dict[str, dict]:
    """By trace_id."""
    table = read_file(run, sealed(run), f"{judge}.arrow", VERDICT)
    return {row["trace_id"]: dict(parsed(row["detail"])) for row in table.to_pylist() if row["detail"]}


def evidence(run: RunFolder) -> dict[str, dict]:
    return {row["trace_id"]: row for row in read_file(run, sealed(run), EVIDENCE_FILE, EVIDENCE).to_pylist()}


def sized(trace: Trace, tokens: int, logprob: float = -0.5) -> Trace:
    """Two answer tokens of this logprob after tokens - 2 of reasoning."""
    said = Turn("assistant", tuple(range(tokens)), "generated", (logprob,) * tokens)
    return dataclasses.replace(trace, turns=(trace.turns[0], said), reasoning_tokens=tokens - 2, answer_tokens=2)


# --- details -----------------------------------------------------------------------------------------------------


def test_copies_name_the_trace_that_stays_and_near_ones_how_like_it_they_are(tmp_path: Path) -> None:
    first = make_trace(SUM, reasoning=SENTENCE)
    same = make_trace(SUM, sample=1, reasoning=f" {SENTENCE}\n")
    near = make_trace(SUM, sample=2, reasoning=f"{SENTENCE} indeed")
    run = make_run(tmp_path, [SUM], [[near, same, first]])
    build_and_seal(run, Data(dedup="near", validation_share=0.0))
    kept = min(first.trace_id, same.trace_id)
    assert details(run, "dedup-v2") == {max(first.trace_id, same.trace_id): {"original": kept}}
    (judge,) = [name for name in judge_files(sealed(run)) if name.startswith("near_dedup")]
    ((copy, said),) = details(run, judge).items()
    assert {copy, said["original"]} == {kept, near.trace_id} and 0.9 < said["similarity"] <= 1.0


def test_a_contaminated_trace_names_item_share_and_place(tmp_path: Path) -> None:
    leak = make_trace(LEAK, "11")
    run = make_run(tmp_path, [SUM, ITEM, LEAK], [[make_trace(SUM), leak]])
    build_and_seal(run, Data(validation_share=0.0))
    ((trace_id, said),) = details(run, "decontaminate-v2").items()
    assert trace_id == leak.trace_id and ITEM.prompt_id in said["item"]
    assert said["coverage"] == 1.0 and said["place"] == f"messages.0.content:15-{15 + len(LEAKED)}"
    assert said["excerpt"] == LEAKED.upper()


# --- evidence ----------------------------------------------------------------------------------------------------


def make_spread(root: Path) -> tuple[RunFolder, list[Trace]]:
    """A prompt whose right traces spread from 10 to 60 tokens, a wrong one of 5, a cut one of 500; and one without a verifier."""
    lengths = {0: 10, 1: 20, 2: 60}
    traces = [sized(make_trace(SUM, sample=sample, reasoning=str(sample)), tokens) for sample, tokens in lengths.items()]
    traces += [sized(make_trace(SUM, "5", sample=3), 5), sized(make_trace(SUM, sample=4, finish="length"), 500)]
    traces += [sized(make_trace(OPEN, "that", sample=sample, reasoning=str(sample)), 7, -0.25) for sample in range(2)]
    return make_run(root, [SUM, OPEN], [traces[:4], traces[4:]]), traces


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[Trace]]:
    """Built with the default view; not to be changed."""
    run, traces = make_spread(tmp_path_factory.mktemp("spread"))
    build_and_seal(run, Data(validation_share=0.0))
    return run, traces


def slow_evidence(traces: list[Trace]) -> dict[str, dict]:
    """Trace by trace, of the prompt SUM."""
    counted = [trace for trace in traces if trace.finish_reason == "stop" and trace.prompt_id == SUM.prompt_id]
    answers = [trace.messages[-1].get("content") for trace in counted]
    right = [trace.reasoning_tokens + trace.answer_tokens for trace in counted if trace.messages[-1].get("content") == "4"]
    found = {}
    for trace in traces:
        said = trace.messages[-1].get("content")
        if trace.prompt_id == SUM.prompt_id:
            found[trace.trace_id] = {
                "agreement": answers.count(said) / len(answers) if trace in counted else None,
                "tokens_over_shortest": (trace.reasoning_tokens + trace.answer_tokens) / min(right),
                "wide_spread": max(right) > WIDE_SPREAD_RATIO * min(right),
                "p_correct": float(said == "4") if trace in counted else None,
            }
    return found


def test_evidence_is_what_a_plain_loop_over_the_traces_says(spread: tuple[RunFolder, list[Trace]]) -> None:
    run, traces = spread
    found = evidence(run)
    assert list(found) == sorted(trace.trace_id for trace in traces)
    for trace_id, expected in slow_evidence(traces).items():
        for name, value in expected.items():
            if name != "p_correct" or value is not None:  # of a cut trace the verifier says no_answer, which is wrong
                assert found[trace_id][name] == pytest.approx(value), name
    for trace in traces:
        row = found[trace.trace_id]
        assert [row[name] for name in ("task", "prompt_tokens", "reasoning_tokens", "answer_tokens", "seconds", "cost")] == [
            trace.task, trace.prompt_tokens, trace.reasoning_tokens, trace.answer_tokens, trace.seconds, trace.cost,
        ]  # fmt: skip
        assert row["answer_logprob"] == pytest.approx(statistics.mean(trace.turns[-1].logprobs[-2:]))


def test_what_nobody_knows_is_null_and_not_a_number(spread: tuple[RunFolder, list[Trace]]) -> None:
    run, traces = spread
    row = evidence(run)[traces[-1].trace_id]
    assert row["p_correct"] is None and row["tokens_over_shortest"] is None and row["wide_spread"] is False
    table = read_file(run, sealed(run), EVIDENCE_FILE, EVIDENCE)
    assert all(value == value for name in EVIDENCE.names for value in table[name].drop_null().to_pylist())


def test_evidence_that_changed_or_was_never_made_is_not_read(tmp_path: Path) -> None:
    run, _ = make_spread(tmp_path)
    build_and_seal(run, Data(validation_share=0.0))
    rollup = sealed(run)
    assert has_evidence(rollup)
    old = dataclasses.replace(rollup, files={path: sha256 for path, sha256 in rollup.files.items() if "evidence" not in path})
    assert not has_evidence(old)
    with pytest.raises(UnusableInput, match="not made by the build that stands; run tracestill data build again"):
        read_file(run, old, EVIDENCE_FILE, EVIDENCE)
    with pytest.raises(UnusableInput, match=r"view\.arrow: columns .*expected"):
        read_file(run, rollup, "view.arrow", EVIDENCE)
    path = run.verdicts / EVIDENCE_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnusableInput, match=r"evidence\.arrow: sha256"):
        read_file(run, rollup, EVIDENCE_FILE, EVIDENCE)


def test_every_file_is_sealed_and_none_is_left_over(spread: tuple[RunFolder, list[Trace]]) -> None:
    run, _ = spread
    assert {f"verdicts/{path.name}" for path in run.verdicts.iterdir()} <= sealed(run).files.keys()
    assert not {"view", "evidence"} & {name.rpartition("-v")[0] for name in judge_files(sealed(run))}


# --- the view ----------------------------------------------------------------------------------------------------


def learnable(num_prompts: int) -> tuple[list[Prompt], list[Trace]]:
    """Right answers are sure and short, wrong ones unsure and long, with exceptions; one prompt in five has no verifier."""
    prompts, traces = [], []
    for number in range(num_prompts):
        open_ended = number % 5 == 0
        prompt = make_prompt(f"What is {number} + 0?", "" if open_ended else str(number), verifier="" if open_ended else "exact")
        prompts.append(prompt)
        for sample in range(2):
            right = (number * 7 + sample) % 3 > 0
            odd = (number + sample) % 11 == 0
            answer = str(number) if right else f"{number}9"
            trace = make_trace(prompt, answer, sample=sample, reasoning=f"{number} {sample}")
            traces.append(sized(trace, 10 + number % 7 if right != odd else 30 + number % 5, -0.1 if right != odd else -1.5))
    return prompts, traces


def test_the_fit_and_its_report_and_the_kept_sets_error_are_sealed(tmp_path: Path) -> None:
    prompts, traces = learnable(260)
    run = make_run(tmp_path, prompts, [traces])
    build_and_seal(run, Data.model_validate({"view": CALIBRATED | {"max_expected_error": None}, "validation_share": 0.0}))
    facts = read_facts(run, sealed(run))
    assert facts.reason == "" and facts.model is not None and facts.report is not None and facts.kept_error is not None
    assert facts.report.ece is not None and facts.report.brier is not None and len(facts.report.reliability) == 15
    expected = facts.kept_error.expected
    assert expected is not None and expected.low < expected.value < expected.high < 0.5
    known = [row["p_correct"] for row in evidence(run).values()]
    kept = {row["trace_id"] for row in read_view(run) if row["fate"] == "kept"}
    errors = [1 - row["p_correct"] for trace_id, row in evidence(run).items() if trace_id in kept]
    assert None not in known and expected.value == pytest.approx(statistics.mean(errors))
    assert facts.kept_error.num_rows == len(kept) and facts.num_kept_unknown == 0


def read_view(run: RunFolder) -> list[dict]:
    return pa.ipc.open_file(run.verdicts / "view.arrow").read_all().to_pylist()


def test_where_nothing_could_be_fitted_the_reason_stands_instead(tmp_path: Path) -> None:
    run = make_run(tmp_path, [SUM], [[make_trace(SUM), make_trace(SUM, sample=1, reasoning="other")]])
    build_and_seal(run, Data.model_validate({"view": CALIBRATED | {"max_expected_error": None}, "validation_share": 0.0}))
    facts = read_facts(run, sealed(run))
    assert facts.model is None and facts.report is None and "right and 0 wrong verified traces" in facts.reason
    assert facts.kept_error == KeptError(Estimate(0.0, 0.0, 0.0), None, 2, 0)


def test_a_view_that_asks_for_no_probability_says_so(spread: tuple[RunFolder, list[Trace]]) -> None:
    run, _ = spread
    facts = read_facts(run, sealed(run))
    assert (facts.view, facts.reason, facts.kept_error) == ("verified", "view verified asks for no p(correct)", None)


def test_kept_rows_of_unknown_probability_are_counted(tmp_path: Path) -> None:
    run, _ = make_spread(tmp_path)
    build_and_seal(run, Data.model_validate({"view": "raw", "validation_share": 0.0}))
    facts = read_facts(run, sealed(run))
    assert facts.num_kept_unknown == 2
    assert facts.kept_error is not None and facts.kept_error.expected is not None
    assert facts.kept_error.expected.value == pytest.approx(1 / 4)  # three right, one wrong, two that nobody judged


def test_idle_quotas_and_unsearched_answers_reach_the_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "run", [SUM], [[make_trace(SUM)]])
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": LEAKED, "answer": "11"}) + "\n")
    view = {"task_quotas": {"smus": {"rows": 3}}}
    settings = Data.model_validate({"view": view, "validation_share": 0.0, "decontaminate": ["bench.jsonl"]})
    build(settings, run, folders=[tmp_path])
    assert "task_quotas smus name no task of these traces" in caplog.text
    assert "1 benchmark answers are not searched for" in caplog.text
    facts = json.loads((run.verdicts / VIEW_FACTS_FILE).read_bytes())
    assert facts["idle_quotas"] == ["smus"] and facts["num_unsearched"] == 1


def test_facts_of_a_view_read_back_as_they_were_written(tmp_path: Path) -> None:
    run, _ = make_spread(tmp_path)
    facts = ViewFacts("v", "", None, None, KeptError(Estimate(0.1, 0.0, 0.2), None, 3, 0), 4, ("a",), 5, {"kept": 6})
    assert json.loads(facts_bytes(facts))["kept_error"]["expected"] == {"value": 0.1, "low": 0.0, "high": 0.2}
    build_and_seal(run, Data(validation_share=0.0))
    found = read_facts(run, sealed(run))
    assert facts_bytes(found) == (run.verdicts / VIEW_FACTS_FILE).read_bytes()
    (run.verdicts / VIEW_FACTS_FILE).write_bytes(facts_bytes(facts))
    with pytest.raises(UnusableInput, match=r"view\.json: missing, or not what the data stage sealed"):
        read_facts(run, sealed(run))
