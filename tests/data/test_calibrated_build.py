"""Whole builds by the view `calibrated` and with near copies: what the functions say of columns is what becomes of files."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema import Data
from configs.views import SHIPPED_VIEWS
from data.build import build
from data.dataset import load_dataset
from data.store import RunFolder, seal
from tests.data.make_run import build_and_seal, make_prompt, make_run, make_trace, snapshot

NUM_PROMPTS, SAMPLES, UNVERIFIED = 400, 4, 100
PARAGRAPH = " ".join(f"{word}{number}" for number in range(40) for word in ("first", "then", "so", "next", "last"))


def guessed_run(root: Path) -> tuple[RunFolder, dict[str, bool]]:
    """Samples agree where the teacher knows and scatter where it guesses; of the first hundred prompts nobody can judge. Whether
    a trace is right, by trace_id."""
    rng = random.Random(0)
    prompts, traces, truth = [], [], {}
    for number in range(NUM_PROMPTS):
        unverified = number < UNVERIFIED
        prompt = make_prompt(f"How many is {number} and {number}?", str(2 * number), verifier="" if unverified else "exact",
                             task="open" if unverified else "sums")  # fmt: skip
        prompts.append(replace(prompt, answer="") if unverified else prompt)
        knows = rng.random() < 0.6
        for sample in range(SAMPLES):
            right = rng.random() < (0.97 if knows else 0.1)
            said = str(2 * number if right else rng.randrange(10_000, 99_999))
            trace = make_trace(prompts[-1], said, sample=sample, reasoning=f"way {sample} of {number}")
            traces.append(trace)
            truth[trace.trace_id] = right
    return make_run(root, prompts, [traces[start::5] for start in range(5)]), truth


def test_calibrated_keeps_what_is_probably_right_and_little_that_is_wrong(tmp_path: Path) -> None:
    run, truth = guessed_run(tmp_path / "run")
    settings = Data(view=SHIPPED_VIEWS["calibrated"], validation_share=0.0)
    made = build(settings, run)
    seal(run, run.dataset, stage="data", fingerprint="f", inputs={}, files=made.files, counts=dict(made.counts), seconds=0.0)
    rows = load_dataset(run)["train"].to_list()
    unverified = [truth[row["trace_id"]] for row in rows if row["task"] == "open"]
    right_in_all = sum(truth[trace_id] for trace_id in truth)
    assert all(truth[row["trace_id"]] for row in rows if row["task"] == "sums")
    assert len(unverified) > 150 and sum(unverified) / len(unverified) >= 0.95
    assert sum(truth[row["trace_id"]] for row in rows) > 0.8 * right_in_all
    assert set(made.counts["rejected_by_reason"]) <= {"p_correct_low", "expected_error", "duplicate"}


def test_calibrated_without_enough_verdicts_keeps_what_is_verified(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [make_prompt(f"{number} + 1?", str(number + 1)) for number in range(6)]
    poem = make_prompt("A poem?", "", verifier="", task="poems")
    traces = [make_trace(prompt, prompt.answer, reasoning=f"r{prompt.answer}") for prompt in prompts] + [make_trace(poem, "Rose")]
    run = make_run(tmp_path / "run", [*prompts, poem], [traces])
    made = build_and_seal(run, Data(view=SHIPPED_VIEWS["calibrated"], validation_share=0.0))
    assert made.counts["kept"] == 6 and made.counts["unjudged_by_reason"] == {"p_correct_unknown": 1}
    assert "left out" in caplog.text


def near_run(root: Path, order: int) -> RunFolder:
    prompt = make_prompt("Tell me.", "4")
    other = make_prompt("Tell me again.", "4")
    others = [make_prompt(f"Q{number}") for number in range(9)]
    words = PARAGRAPH.split()
    edited = " ".join([*words[:100], "otherwise", *words[101:]])
    traces = [
        make_trace(prompt, "4", sample=0, reasoning=PARAGRAPH),
        make_trace(prompt, "4", sample=1, reasoning=edited),
        make_trace(other, "4", sample=0, reasoning=PARAGRAPH.upper()),
        make_trace(other, "4", sample=1, reasoning=" ".join(reversed(words))),
        *(make_trace(one, "4", reasoning=" ".join(f"w{one.prompt_id}x{at}" for at in range(90))) for one in others),
    ]
    prompts = [prompt, other, *others]
    shuffled = random.Random(order).sample(traces, len(traces))
    return make_run(root, prompts, [shuffled[start::4] for start in range(4)])


def test_near_copies_leave_the_dataset_whatever_the_order_of_the_log_and_the_number_of_processes(tmp_path: Path) -> None:
    made = []
    for order, workers in ((1, 1), (2, 3)):
        run = near_run(tmp_path / str(order), order)
        counts = build(Data(dedup="near", validation_share=0.0), run, num_workers=workers).counts
        assert counts["rejected_by_reason"] == {"near_duplicate": 2} and counts["kept"] == 11
        made.append(snapshot(run))
    assert made[0] == made[1]
    exact = near_run(tmp_path / "exact", 1)
    assert build(Data(dedup="exact", validation_share=0.0), exact).counts["kept"] == 13
