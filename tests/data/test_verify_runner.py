import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.progress import Count
from data.curriculum import TASK_SPECS
from data.verify import VERIFIERS
from data.verify.runner import CRASHED, NO_ANSWER, NO_VERIFIER, RIGHT, TIMED_OUT, Item, Judgement, from_score, judge
from tests.data.hostile import HOSTILE, STILLBORN
from tests.data.make_run import make_prompt
from tests.data.test_verifiers import gym_prompts

WRONG = Judgement("fail", "wrong", 0.5)
HOSTILE_PROMPT = make_prompt("q", "right", verifier="hostile")


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (1.0, RIGHT),
        (0.0, Judgement("fail", "wrong", 0.0)),
        (0.999, Judgement("fail", "wrong", 0.999)),
        (1.5, CRASHED),
        (-0.1, CRASHED),
        (math.nan, CRASHED),
    ],
)
def test_only_a_score_of_one_is_right(score: float, expected: Judgement) -> None:
    assert from_score(score) == expected


def test_a_hang_and_a_crash_are_not_wrong_and_the_others_are_still_judged() -> None:
    answers = {
        "sleep": TIMED_OUT,
        "a": WRONG,
        "die": CRASHED,
        "b": WRONG,
        "raise": CRASHED,
        "exit": CRASHED,
        "eat memory": CRASHED,
        "two": CRASHED,
        "not a number": CRASHED,
        "hold the GIL": TIMED_OUT,
        "right": RIGHT,
        "c": WRONG,
        "": NO_ANSWER,
    }
    items = [Item(HOSTILE_PROMPT, answer) for answer in answers]
    assert dict(zip(answers, judge(items, timeout_s=1.0, num_workers=1, verifiers=HOSTILE), strict=True)) == answers


def test_judgements_come_in_the_order_of_the_items_whoever_made_them() -> None:
    prompts = [make_prompt(f"q{index}", str(index), verifier="hostile") for index in range(200)]
    items = [Item(prompt, str(index if index % 3 else -index)) for index, prompt in enumerate(prompts)]
    seen: list[Count] = []
    judgements = judge(items, timeout_s=10.0, num_workers=2, verifiers=HOSTILE, report=seen.append)
    assert [judgement == RIGHT for judgement in judgements] == [index % 3 != 0 or index == 0 for index in range(200)]
    assert seen[-1].done == seen[-1].total == 66  # right answers are settled without a worker


def test_equal_answers_to_one_prompt_are_judged_once() -> None:
    seen: list[Count] = []
    items = [Item(HOSTILE_PROMPT, "a")] * 50 + [Item(HOSTILE_PROMPT, "sleep")] * 50
    started = time.monotonic()
    judgements = judge(items, timeout_s=0.5, num_workers=1, verifiers=HOSTILE, report=seen.append)
    assert judgements == [WRONG] * 50 + [TIMED_OUT] * 50
    assert seen[-1].total == 2 and time.monotonic() - started < 20


def test_what_needs_no_worker_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.verify.runner._Worker", None)
    exact = make_prompt("q", "iron")
    items = [Item(exact, "Iron."), Item(exact, "gold"), Item(make_prompt("q", "", verifier=""), "x"), Item(exact, "")]
    assert judge(items, timeout_s=1.0) == [RIGHT, Judgement("fail", "wrong", 0.0), NO_VERIFIER, NO_ANSWER]
    assert judge([], timeout_s=1.0) == []


def test_a_worker_that_cannot_start_is_an_error_and_not_a_verdict() -> None:
    with pytest.raises(RuntimeError, match="exit code 3 while it started"):
        judge([Item(HOSTILE_PROMPT, "a")], timeout_s=1.0, num_workers=1, verifiers=STILLBORN)


def test_workers_judge_as_the_plain_function_does() -> None:
    prompts = [prompt for task, params in TASK_SPECS.items() for prompt in gym_prompts(task, 10, **params)]
    prompts += [make_prompt("q", "1/2", verifier="math")]
    items = [Item(prompt, answer) for prompt in prompts for answer in (prompt.answer, prompt.answer + ".0", "3", "0.5", "x y")]
    slow = [from_score(VERIFIERS[item.prompt.verifier].score(*item)) for item in items]
    assert judge(items, timeout_s=10.0, num_workers=1) == slow


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def test_five_thousand_short_answers_are_judged_well_under_ten_seconds_of_two_cores() -> None:
    """In CPU seconds of parent and workers, imports included, so that a busy machine does not decide."""
    prompts = gym_prompts("chain_sum", 5000, **TASK_SPECS["chain_sum"])
    before = cpu_seconds()
    judgements = judge([Item(prompt, prompt.answer + "7") for prompt in prompts], timeout_s=60.0, num_workers=2)
    assert {judgement.verdict for judgement in judgements} == {"fail"}
    assert cpu_seconds() - before < 2 * 8.0


SCRIPT = """
from tests.data.hostile import HOSTILE
from tests.data.make_run import make_prompt
from data.verify.runner import Item, judge
if __name__ == "__main__":
    prompt = make_prompt("q", "right", verifier="hostile")
    judge([Item(prompt, "print"), Item(prompt, "a")], timeout_s=5.0, num_workers=1, verifiers=HOSTILE)
    print('{"last": "line"}')
"""


def test_a_scorer_that_prints_does_not_reach_standard_output(tmp_path: Path) -> None:
    script = tmp_path / "judging.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, script], cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == '{"last": "line"}\n', done.stderr
