import dataclasses
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import Refused, UnusableInput
from configs.launch import StageFailed
from configs.progress import Count
from data.curriculum import TASK_SPECS
from data.verify import VERIFIERS, is_reference, self_check
from data.verify.runner import CRASHED, NO_ANSWER, NO_VERIFIER, RIGHT, TIMED_OUT, Item, Judgement, Pool, from_score, judge, key_of
from tests.data.hostile import HOSTILE, STILLBORN
from tests.data.make_run import make_prompt
from tests.data.raising import RAISING
from tests.data.test_verifiers import gym_prompts

WRONG = Judgement("fail", "wrong", 0.5)
HOSTILE_PROMPT = make_prompt("q", "right", verifier="hostile")
SETTLING = {"hostile": HOSTILE["hostile"]._replace(quick=is_reference)}


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
    judgements = judge(items, timeout_s=10.0, num_workers=2, verifiers=SETTLING, report=seen.append)
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
    with pytest.raises(StageFailed, match="exit code 3 while it started"):
        judge([Item(HOSTILE_PROMPT, "a")], timeout_s=1.0, num_workers=1, verifiers=STILLBORN)


def test_workers_judge_as_the_plain_function_does() -> None:
    prompts = [prompt for task, params in TASK_SPECS.items() for prompt in gym_prompts(task, 10, **params)]
    prompts += [make_prompt("q", "1/2", verifier="math")]
    items = [Item(prompt, answer) for prompt in prompts for answer in (prompt.answer, prompt.answer + ".0", "3", "0.5", "x y")]
    slow = [from_score(VERIFIERS[item.prompt.verifier].score(*item)) for item in items]
    assert judge(items, timeout_s=10.0, num_workers=1) == slow


# --- a pool that lives on ----------------------------------------------------------------------------------------


def processes(pool: Pool) -> list[int]:
    return [worker.process.pid or 0 for worker in pool.workers]


def running(pid: int) -> bool:
    """Not gone, and no zombie that somebody else has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not running(pid)


def test_the_workers_of_a_pool_live_from_call_to_call_and_no_longer() -> None:
    with Pool(HOSTILE, timeout_s=5.0, num_workers=1) as pool:
        assert pool.workers == []
        assert pool.judge([Item(HOSTILE_PROMPT, "a")]) == [WRONG]
        (first,) = processes(pool)
        assert pool.judge([Item(HOSTILE_PROMPT, "b"), Item(HOSTILE_PROMPT, "right")]) == [WRONG, RIGHT]
        assert processes(pool) == [first]
        assert pool.judge([Item(HOSTILE_PROMPT, "die"), Item(HOSTILE_PROMPT, "c")]) == [CRASHED, WRONG]
        (second,) = processes(pool)
        assert second != first and not running(first)
    assert not running(second) and pool.workers == []


def test_a_worker_that_dies_between_two_calls_is_replaced_and_nobody_is_blamed() -> None:
    with Pool(HOSTILE, timeout_s=5.0, num_workers=1) as pool:
        pool.judge([Item(HOSTILE_PROMPT, "a")])
        os.kill(processes(pool)[0], signal.SIGKILL)
        assert pool.judge([Item(HOSTILE_PROMPT, "b")]) == [WRONG]


def test_an_exception_in_the_middle_leaves_no_worker_and_a_pool_that_can_be_used() -> None:
    def interrupted(count: Count) -> None:
        raise KeyboardInterrupt

    with Pool(HOSTILE, timeout_s=60.0, num_workers=1) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.judge([Item(HOSTILE_PROMPT, "sleep")], report=interrupted)
        assert pool.workers == []
        assert pool.judge([Item(HOSTILE_PROMPT, "a")]) == [WRONG]


def test_equal_work_is_done_once_over_prompts_and_calls() -> None:
    """Another prompt with the same reference and details, asked the same, is the same work."""
    other = dataclasses.replace(HOSTILE_PROMPT, prompt_id="another", messages=({"role": "user", "content": "another"},))
    seen: list[Count] = []
    with Pool(HOSTILE, timeout_s=0.5, num_workers=1) as pool:
        pool.judge([Item(HOSTILE_PROMPT, "a"), Item(other, "a"), Item(HOSTILE_PROMPT, "sleep")], report=seen.append)
        assert seen[-1].total == 2
        assert pool.judge([Item(other, "sleep"), Item(other, "a")], report=seen.append) == [TIMED_OUT, WRONG]
        assert seen[-1].total == 2 and len(seen) == len([count for count in seen if count.total == 2])


def test_a_memo_of_an_earlier_build_needs_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    item = Item(HOSTILE_PROMPT, "a")
    memo = {key_of(item, HOSTILE): WRONG}
    monkeypatch.setattr("data.verify.runner._Worker", None)
    with Pool(HOSTILE, timeout_s=1.0, memo=memo) as pool:
        assert pool.judge([item]) == [WRONG]


def test_a_memo_forgets_the_oldest_and_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.verify.runner.REMEMBERED", 3)
    with Pool(HOSTILE, timeout_s=5.0, num_workers=1) as pool:
        items = [Item(HOSTILE_PROMPT, str(number)) for number in range(5)]
        assert pool.judge(items) == [WRONG] * 5
        assert list(pool.memo) == [key_of(item, HOSTILE) for item in items[2:]]
        assert pool.judge(items) == [WRONG] * 5


def test_a_key_is_the_work_and_nothing_else() -> None:
    item = Item(make_prompt("q", "r", verifier="math", details="d"), "a")
    alike = Item(dataclasses.replace(item.prompt, prompt_id="x", task="y", messages=()), "a")
    changed = [dataclasses.replace(item.prompt, **{name: "z"}) for name in ("answer", "details")]
    others = [Item(prompt, "a") for prompt in (*changed, dataclasses.replace(item.prompt, verifier="exact"))]
    others += [
        Item(item.prompt, "b"),
        Item(dataclasses.replace(item.prompt, answer="rd", details=""), "a"),
        Item(item.prompt, "\ud800"),
    ]
    newer = {**VERIFIERS, "math": VERIFIERS["math"]._replace(version=99)}
    keys = {key_of(item), *map(key_of, others), key_of(item, newer)}
    assert key_of(alike) == key_of(item) and len(keys) == len(others) + 2
    assert key_of(Item(make_prompt("q", "4", verifier="math"), "5")).hex() == GOLDEN_KEY


GOLDEN_KEY = "7176e792e67cb8b346904cbee155b7a2"
"""Of version 2 of the mathematics verifier. A change makes every stored judgement unfindable: raise a version instead."""


# --- what a scorer may raise -------------------------------------------------------------------------------------


def test_a_scorer_that_ran_out_of_its_own_time_is_timed_out() -> None:
    assert judge([Item(HOSTILE_PROMPT, "late")], timeout_s=60.0, num_workers=1, verifiers=RAISING) == [TIMED_OUT]


@pytest.mark.parametrize(("answer", "error"), [("unable", UnusableInput), ("refused", Refused)])
def test_a_machine_that_cannot_judge_ends_everything_with_its_line(answer: str, error: type[Exception]) -> None:
    with (
        Pool(RAISING, timeout_s=60.0, num_workers=1) as pool,
        pytest.raises(error, match="^sandbox: no bubblewrap; apt-get install it$"),
    ):
        pool.judge([Item(HOSTILE_PROMPT, answer)])
    assert pool.workers == []


def test_a_verifier_that_cannot_be_prepared_here_ends_everything_with_its_line() -> None:
    item = Item(make_prompt("q", "r", verifier="confined"), "x")
    with pytest.raises(UnusableInput, match="^sandbox: no bubblewrap"):
        judge([item], timeout_s=60.0, num_workers=1, verifiers=RAISING)


def test_a_self_check_that_cannot_be_made_here_is_no_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERIFIERS, "hostile", RAISING["hostile"])
    with pytest.raises(UnusableInput, match="^sandbox: no bubblewrap"):
        self_check(make_prompt("q", "unable", verifier="hostile"))
    assert not self_check(make_prompt("q", "late", verifier="hostile"))


def test_a_verifier_may_take_longer_than_the_others() -> None:
    items = [Item(make_prompt("q", "r", verifier=name), "x") for name in ("slow", "hasty", "slow")]
    assert judge(items, timeout_s=0.3, num_workers=1, verifiers=RAISING) == [RIGHT, TIMED_OUT, RIGHT]


def test_a_worker_is_not_sent_the_question() -> None:
    item = Item(make_prompt("q", "r", verifier="curious"), "x")
    assert item.prompt.messages and judge([item], timeout_s=60.0, num_workers=1, verifiers=RAISING) == [RIGHT]


# --- references --------------------------------------------------------------------------------------------------


def test_references_are_checked_in_workers_without_short_cuts() -> None:
    prompts = [
        make_prompt("q", "right", verifier="hostile"),
        make_prompt("q", "sleep", verifier="hostile"),
        make_prompt("q", "two", verifier="hostile"),
        make_prompt("q", "", verifier="hostile"),
        make_prompt("q", "", verifier=""),
        make_prompt("q", "4", verifier=""),
    ]
    with Pool(SETTLING, timeout_s=1.0, num_workers=1) as pool:
        assert pool.self_check(prompts) == [True, False, False, False, True, True]


def test_a_reference_that_is_no_mathematics_fails_in_a_worker_too() -> None:
    with Pool(timeout_s=60.0, num_workers=1) as pool:
        prompts = [make_prompt("q", answer, verifier="math") for answer in ("1/2", "to be, or not to be")]
        assert pool.self_check(prompts) == [True, False]


# --- cost --------------------------------------------------------------------------------------------------------


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


ORPHANS = """
import sys
from tests.data.hostile import HOSTILE
from tests.data.make_run import make_prompt
from data.verify.runner import Item, Pool
if __name__ == "__main__":
    prompt = make_prompt("q", "right", verifier="hostile")
    with Pool(HOSTILE, timeout_s=1.0, num_workers=1) as pool:
        pool.judge([Item(prompt, "a")])
        print(pool.workers[0].process.pid, flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, script],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert running(worker)
        parent.send_signal(how)
        parent.wait(timeout=30)
        assert wait_until_gone(worker, 10.0)
