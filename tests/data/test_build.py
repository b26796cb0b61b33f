import json
from pathlib import Path

import pytest

from configs.errors import Refused, UnusableInput
from configs.schema import Data
from configs.views import SHIPPED_VIEWS
from data.build import build
from data.dataset import load_dataset
from data.ledger import read_ledger
from data.records import Trace
from data.split import is_held_out
from data.store import RunFolder, read_rollup, segments, verify_files
from tests.data.hostile import HOSTILE
from tests.data.make_run import build_and_seal, make_prompt, make_run, make_trace, rewrite, snapshot

SUM = make_prompt("What is 2 + 2?")
FACT = make_prompt("Which metal is mined in Fasosur?", "iron", task="facts")
OPEN = make_prompt("Write a poem.", "", verifier="", task="poems")
ITEM = make_prompt("What is 3 + 3?", "6", split="eval")
LEAK = make_prompt("what is  3 + 3?", "6")


def every_fate() -> list[list[Trace]]:
    """Twelve completed traces in two segments, one of each fate and some of the common ones, and an aborted one."""
    return [
        [
            make_trace(SUM, sample=0),
            make_trace(SUM, sample=1, reasoning="So 2+2=4."),
            make_trace(SUM, "5", sample=2),
            make_trace(SUM, sample=3),  # sample 0 again
            make_trace(SUM, "", sample=4, finish="length", raw="2+2 is and is and is"),
            make_trace(SUM, "4", sample=5, finish="abort"),
            make_trace(SUM, "", sample=6, raw="2+2=4. That is 4"),
        ],
        [
            make_trace(SUM, "4<think>", sample=7, raw="2+2</think>4<think>"),
            make_trace(SUM, "", sample=8, raw="2+2=4</think>"),
            make_trace(FACT, "Iron.", sample=0),
            make_trace(FACT, "gold", sample=1),
            make_trace(OPEN, "Roses are red", sample=0),
            make_trace(LEAK, "6", sample=0),
            make_trace(SUM, sample=0, reasoning="a later copy of a committed request"),
        ],
    ]


ALL = [SUM, FACT, OPEN, ITEM, LEAK]
REJECTED = {"wrong": 2, "contaminated": 1, "duplicate": 1, "length": 1, "no_answer": 1, "think_reopened": 1, "think_unclosed": 1}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "run", ALL, every_fate(), requests=14)


def test_every_trace_is_kept_rejected_or_unjudged_for_one_reason(run: RunFolder) -> None:
    counts = build_and_seal(run).counts
    assert counts["rejected_by_reason"] == REJECTED
    assert counts["unjudged_by_reason"] == {"no_verifier": 1}
    assert (counts["completed"], counts["kept"], counts["rejected"], counts["unjudged"]) == (12, 3, 8, 1)
    assert counts["train_rows"] + counts["validation_rows"] == 3 and counts["prompts"] == 2
    assert (counts["prompt_tokens"], counts["reasoning_tokens"], counts["answer_tokens"]) == (21, 15, 6)
    assert {task: (its["completed"], its["kept"]) for task, its in counts["by_task"].items()} == {
        "facts": (2, 1),
        "poems": (1, 0),
        "sums": (9, 2),
    }


def test_both_balances_of_the_ledger_hold_after_a_build(run: RunFolder) -> None:
    build_and_seal(run)
    ledger = read_ledger(run)
    ledger.check(viewed=True)
    assert (ledger.requested, ledger.completed, ledger.failed, ledger.pending, ledger.superseded) == (14, 12, 1, 1, 1)
    assert ledger.rejected_by_reason == REJECTED and ledger.failed_by_reason == {"abort": 1}


def test_the_dataset_holds_whole_conversations_with_the_reasoning(run: RunFolder) -> None:
    build_and_seal(run, Data(validation_share=0.0))
    rows = load_dataset(run)["train"].to_list()
    assert [row["trace_id"] for row in rows] == sorted(row["trace_id"] for row in rows)
    (fact,) = [row for row in rows if row["task"] == "facts"]
    assert fact.pop("messages") == [
        {"role": "user", "content": "Which metal is mined in Fasosur?", "reasoning_content": None},
        {"role": "assistant", "content": "Iron.", "reasoning_content": "2+2=4."},
    ]
    assert fact == {
        "tools": "",
        "provenance": "",
        "trace_id": make_trace(FACT).trace_id,
        "prompt_id": FACT.prompt_id,
        "task": "facts",
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "reasoning_tokens": 5,
        "answer_tokens": 2,
        "teacher_licence": "MIT",
        "source_licence": "CC0-1.0",
    }


def test_the_first_committed_copy_of_a_trace_is_the_one_in_the_dataset(run: RunFolder) -> None:
    build_and_seal(run, Data(validation_share=0.0))
    said = {row["trace_id"]: row["messages"][-1]["reasoning_content"] for row in load_dataset(run)["train"].to_list()}
    assert said[make_trace(SUM).trace_id] == "2+2=4."


def test_one_verdict_file_stands_for_each_judge_and_version(run: RunFolder) -> None:
    files = build_and_seal(run).files
    assert [path.name for path in files if path.parent == run.verdicts] == [
        "answer_present-v1.arrow", "control_tokens-v1.arrow", "decontaminate-v2.arrow", "dedup-v2.arrow", "evidence.arrow",
        "finish_reason-v1.arrow", "think_tags-v1.arrow", "verifier-exact-v2.arrow", "view.arrow", "view.json",
    ]  # fmt: skip


def test_samples_of_one_prompt_never_stand_on_both_sides(tmp_path: Path) -> None:
    prompts = [make_prompt(f"What is {number} + 0?", str(number)) for number in range(80)]
    traces = [
        make_trace(prompt, prompt.answer, sample=sample, reasoning=str(sample)) for prompt in prompts for sample in range(2)
    ]
    run = make_run(tmp_path, prompts, [traces])
    build_and_seal(run, Data(validation_share=0.25))
    sides = {name: set(rows["prompt_id"]) for name, rows in load_dataset(run).items()}
    assert sides["validation"] == {prompt.prompt_id for prompt in prompts if is_held_out(prompt.prompt_id, share=0.25)}
    assert sides["train"] | sides["validation"] == {prompt.prompt_id for prompt in prompts}
    assert not sides["train"] & sides["validation"] and 8 <= len(sides["validation"]) <= 32


def test_without_verification_wrong_and_unjudgeable_traces_stay(run: RunFolder) -> None:
    counts = build(Data(view=SHIPPED_VIEWS["raw"]), run).counts
    assert counts["unjudged"] == 0 and "wrong" not in counts["rejected_by_reason"] and counts["kept"] == 6


def test_without_filters_a_truncated_answer_still_counts_as_none(tmp_path: Path) -> None:
    run = make_run(tmp_path, [SUM], [[make_trace(SUM, finish="length"), make_trace(SUM, sample=1)]])
    assert build(Data(filters=()), run).counts["rejected_by_reason"] == {"no_answer": 1}


def test_the_same_traces_give_the_same_bytes_however_they_were_cut_into_segments(tmp_path: Path) -> None:
    traces = [make_trace(SUM, sample=sample, reasoning=str(sample)) for sample in range(5)]
    one = make_run(tmp_path / "one", [SUM], [traces])
    many = make_run(tmp_path / "many", [SUM], [[trace] for trace in reversed(traces)])
    build(Data(), one)
    build(Data(), many)
    assert snapshot(one) == snapshot(many)


def test_a_verifier_that_hangs_leaves_the_trace_unjudged(tmp_path: Path) -> None:
    prompt = make_prompt("q", "right", verifier="hostile")
    traces = [make_trace(prompt, answer, sample=sample) for sample, answer in enumerate(["right", "sleep", "wrong"])]
    run = make_run(tmp_path, [prompt], [traces])
    counts = build(Data(verify_timeout_s=1.0), run, num_workers=1, verifiers=HOSTILE).counts
    assert (counts["kept"], counts["rejected_by_reason"], counts["unjudged_by_reason"]) == (1, {"wrong": 1}, {"timed_out": 1})


# --- refusals ----------------------------------------------------------------------------------------------------


def test_nothing_kept_is_refused_with_the_reasons_counted_and_the_verdicts_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, [SUM, OPEN], [[make_trace(SUM, "5"), make_trace(SUM, "6", sample=1), make_trace(OPEN, "Roses")]])
    with pytest.raises(Refused, match=r"nothing kept of 3 completed traces \(wrong 2, no_verifier 1\)") as refusal:
        build(Data(), run)
    assert refusal.value.exit_code == 3 and "\n" not in str(refusal.value)
    assert (run.verdicts / "view.arrow").is_file() and not run.dataset.exists()


def test_a_dataset_of_validation_rows_alone_is_refused(run: RunFolder) -> None:
    with pytest.raises(Refused, match=r"lower data\.validation_share"):
        build(Data(validation_share=1.0), run)


def test_a_refused_build_leaves_the_dataset_that_stands(run: RunFolder) -> None:
    build_and_seal(run)
    before = snapshot(run)
    with pytest.raises(Refused, match="the dataset that stands, and its verdicts, are as they were"):
        build(Data(validation_share=1.0), run)
    assert snapshot(run) == before


@pytest.mark.parametrize("folder", ["verdicts", "dataset"])
def test_a_damaged_file_is_made_again_by_what_its_line_says(run: RunFolder, folder: str) -> None:
    build_and_seal(run)
    before, rollup = snapshot(run), read_rollup(run.dataset)
    damaged = sorted(path for path in (run.root / folder).rglob("*.arrow"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert rollup is not None
    with pytest.raises(UnusableInput, match=r"delete .*/dataset/manifest\.json and run tracestill data build again"):
        verify_files(run, rollup)
    (run.dataset / "manifest.json").unlink()
    build_and_seal(run)
    assert {path: its for path, its in snapshot(run).items() if "manifest" not in path} == {
        path: its for path, its in before.items() if "manifest" not in path
    }


def test_an_empty_validation_side_can_still_be_loaded(tmp_path: Path) -> None:
    run = make_run(tmp_path, [SUM], [[make_trace(SUM)]])
    build_and_seal(run, Data(validation_share=0.0))
    assert {name: len(rows) for name, rows in load_dataset(run).items()} == {"train": 1, "validation": 0}


def test_a_build_on_an_unbalanced_ledger_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, [SUM], [[make_trace(SUM), make_trace(SUM, sample=1)]], requests=1)
    with pytest.raises(UnusableInput, match="ledger: 1 requested is not 2 completed"):
        build(Data(), run)
    assert not run.verdicts.exists()


def test_a_trace_without_its_prompt_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, [SUM], [[make_trace(FACT)]])
    with pytest.raises(UnusableInput, match="traces of another prompt set"):
        build(Data(), run)


def test_a_run_without_prompts_or_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="prompts stage has not finished"):
        build(Data(), RunFolder(tmp_path))
    with pytest.raises(UnusableInput, match="no completed trace"):
        build(Data(), make_run(tmp_path, [SUM], [], requests=1))


def test_a_flipped_bit_in_a_segment_is_named_and_nothing_is_written(run: RunFolder) -> None:
    damaged = segments(run.traces)[1].path
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UnusableInput, match=f"{damaged.name}: sha256") as error:
        build(Data(), run)
    assert error.value.exit_code == 2 and not run.verdicts.exists()


def test_a_manifest_that_speaks_of_other_rows_is_named(run: RunFolder) -> None:
    sidecar = segments(run.traces)[0].path.with_suffix(".json")
    facts = json.loads(sidecar.read_text())["facts"]
    facts["finish_reasons"][0] = "length"
    rewrite(sidecar, facts=facts)
    with pytest.raises(UnusableInput, match="finish_reasons of its manifest are not those of its rows"):
        build(Data(), run)


# --- reading it back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json"])
def test_a_truncated_dataset_folder_is_detected(run: RunFolder, file: str) -> None:
    build_and_seal(run)
    damaged = run.dataset / "train" / file
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(UnusableInput, match=f"{file}: sha256 .* expected .* by the data stage"):
        load_dataset(run)


def test_a_missing_or_unfinished_dataset_is_not_read(run: RunFolder) -> None:
    with pytest.raises(UnusableInput, match="no dataset yet"):
        load_dataset(run)
    build(Data(), run)
    with pytest.raises(UnusableInput, match="no dataset yet"):
        load_dataset(run)


def test_rows_must_match_the_manifest(run: RunFolder) -> None:
    built = build_and_seal(run)
    counts = dict(built.counts) | {"train_rows": built.counts["train_rows"] + 1}
    rewrite(run.dataset / "manifest.json", counts=counts)
    with pytest.raises(UnusableInput, match=f"{built.counts['train_rows']} rows, expected {built.counts['train_rows'] + 1}"):
        load_dataset(run)


def test_a_second_build_unseals_and_leaves_the_same_bytes(run: RunFolder) -> None:
    build_and_seal(run)
    sealed = snapshot(run)
    build(Data(), run)
    assert read_rollup(run.dataset) is None
    assert snapshot(run) == {path: content for path, content in sealed.items() if path != "dataset/manifest.json"}
