"""What becomes of a job: decided from its exit code, its words, and what it has committed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.cluster import seconds_of
from data.store import RunFolder
from slurm import attempts
from slurm.attempt import BUSY, MAX_BUSY, judge, last_error, says_cancelled
from slurm.attempts import Attempt, JobFolder

ROOT = Path(__file__).parents[2]


def earlier(*progress: str) -> list[Attempt]:
    return [Attempt("train", 7, index, "n1", float(index), before) for index, before in enumerate(progress)]


@pytest.mark.parametrize(
    ("code", "hung", "cancelled", "befores", "before", "after", "expected"),
    [
        (0, "", False, ["step 5"], "step 5", "step 5", (0, "done")),
        (0, "", True, [], "", "", (0, "done")),
        (75, "", False, [], "step 0", "step 0", (75, "interrupted")),  # one attempt in vain may be the first minutes of a queue
        (75, "", False, ["step 0"], "step 0", "step 0", (1, "stuck")),
        (75, "", False, ["step 0"], "step 0", "step 5", (75, "interrupted")),
        (75, "", False, ["step 0"], "step 5", "step 5", (75, "interrupted")),
        (75, "", False, ["step 5", "step 0"], "step 5", "step 5", (75, "interrupted")),
        (75, "", True, [], "", "", (130, "cancelled")),
        (143, "", False, [], "step 0", "step 5", (75, "interrupted")),
        (1, "", False, [], "", "", (75, "failed")),  # it may have been the machine
        (1, "", False, [""], "", "", (1, "stuck")),
        (137, "", False, ["step 0"], "step 0", "step 9", (75, "failed")),
        (143, "nothing has moved for 9 s", False, [], "", "step 9", (75, "hung")),
        (0, "nothing has moved for 9 s", False, [], "", "", (75, "hung")),
        (2, "", False, [], "", "step 9", (2, "unusable")),
        (3, "", False, [], "", "step 9", (3, "refused")),
        (3, "", True, [], "", "step 9", (3, "refused")),  # a gate has spoken, whoever cancelled meanwhile
    ],
)
def test_verdicts(
    code: int, hung: str, cancelled: bool, befores: list[str], before: str, after: str, expected: tuple[int, str]
) -> None:
    found = judge(code, hung=hung, cancelled=cancelled, said="why", earlier=earlier(*befores), before=before, after=after)
    assert (found.code, found.outcome) == expected
    assert found.outcome == "done" or (hung or "why") in found.reason


def test_a_stage_that_somebody_else_is_at_is_waited_for() -> None:
    said = "runs/a: the train stage is already running here (process 7); wait for it or end it"

    def after_waiting(times: int, progress: str = "step 5") -> tuple[int, str]:
        before = [Attempt("train", 7, index, "n1", 0.0, "step 5", 1.0, progress, 75, BUSY) for index in range(times)]
        found = judge(75, hung="", cancelled=False, said=said, earlier=before, before="step 5", after="step 5")
        return found.code, found.outcome

    assert after_waiting(0) == after_waiting(MAX_BUSY - 1) == (75, BUSY)
    assert after_waiting(MAX_BUSY) == (1, "stuck")
    assert after_waiting(MAX_BUSY, "step 4") == (75, BUSY)  # the other one is getting on
    stopped = judge(75, hung="", cancelled=False, said="stopped by SIGUSR2", earlier=[
        Attempt("train", 7, 0, "n1", 0.0, "step 5", 1.0, "step 5", 75, BUSY)], before="step 5", after="step 5")  # fmt: skip
    assert stopped.outcome == "interrupted"


@pytest.mark.parametrize(
    ("state", "used", "limit", "preempted", "expected"),
    [
        ("RUNNING", "00:00:09", "1-00:00:00", "None", False),
        ("RUNNING", "00:00:09", "1-00:00:00", "2026-11-24T00:33:41", False),  # in its grace time
        ("COMPLETING", "00:00:09", "1-00:00:00", "None", True),
        ("COMPLETING", "00:00:09", "UNLIMITED", "None", True),
        ("COMPLETING", "00:00:09", "1-00:00:00", "2026-11-24T00:33:41", False),
        ("COMPLETING", "00:10:01", "00:10:00", "None", False),
        ("CANCELLED", "00:10:01", "00:10:00", "None", True),
        ("TIMEOUT", "00:10:01", "00:10:00", "None", False),
    ],
)
def test_what_scancel_has_ended_is_told_from_what_slurm_has(
    state: str, used: str, limit: str, preempted: str, expected: bool
) -> None:
    shown = f"JobId=7 JobState={state} Reason=None RunTime={used} TimeLimit={limit} PreemptTime={preempted} Comment=a b=c"
    assert says_cancelled(shown) is expected
    assert not says_cancelled("")


def test_the_last_word_of_an_error_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: of an earlier attempt\n")
    start = log.stat().st_size
    assert last_error(log, start) == "" and last_error(tmp_path / "none", 0) == ""
    with log.open("a") as file:
        file.write("0: error: train.lr: too high\nsrun: error: n1: task 0: Exited with exit code 2\n")
    assert last_error(log, start) == "train.lr: too high"


def test_attempts_are_read_back_and_twins_are_told_apart(tmp_path: Path) -> None:
    folder = JobFolder.of(RunFolder(tmp_path))
    path = folder.attempts("train", 7)
    common = {"restart": 0, "nodes": "n1", "progress": "step 0"}
    for line in (
        {"event": "start", "at": 1.0, "pid": 10, **common},
        {"event": "start", "at": 2.0, "pid": 11, **common},  # a controller that was killed has launched the job twice
        {"event": "end", "at": 3.0, "pid": 11, "progress": "step 5", "code": 75, "outcome": "interrupted", "reason": "x"},
    ):
        attempts.append(path, line)
    with path.open("a") as file:
        file.write('{"event": "en')  # the disk was full
    first, second = attempts.read_attempts(folder, "train")
    assert (first.ended, second.ended, second.after, second.outcome) == (None, 3.0, "step 5", "interrupted")


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("30", 1800), ("30:15", 1815), ("24:00:00", 86400), ("2-0", 172800), ("1-02:03", 93780), ("1-02:03:04", 93784), ("0", 0)],
)
def test_time_limits_are_read_as_slurm_reads_them(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds


# --- the program, around a step that is a shell ---------------------------------------------------------------------


def start(
    run: Path,
    step: str,
    *,
    silence_s: float = 60.0,
    warning_s: float = 60.0,
    job: int = 7,
    stage: str = "train",
    options: tuple[str, ...] = (),
) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "n1", "PYTHONPATH": str(ROOT), "PATH": f"{run}:{os.environ['PATH']}",
    }  # fmt: skip
    log = run / "log"
    log.touch()
    timing = [f"--silence={silence_s}", f"--warning={warning_s}"]
    words = [stage, str(run), "--input=dataset", f"--log={log}", *timing, *options, "--", "bash", "-c", step]
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "slurm.attempt", *words], env=environment, stdout=output, stderr=output, text=True, cwd=run
        )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "manifest.json").write_text("{}")
    return tmp_path


def outcome(run: Path, stage: str = "train") -> Attempt:
    return attempts.read_attempts(JobFolder.of(RunFolder(run)), stage)[-1]


def text_of(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def test_a_step_that_is_done_leaves_its_word(run: Path) -> None:
    assert start(run, "mkdir -p checkpoints/step-00000005").wait(30) == 0
    found = outcome(run)
    assert (found.outcome, found.before, found.after, found.nodes, found.code) == ("done", "step 0", "step 5", "n1", 0)


def test_an_input_that_is_not_there_is_the_reason(run: Path) -> None:
    (run / "dataset" / "manifest.json").unlink()
    assert start(run, "touch ran").wait(30) == 2
    assert "dataset/manifest.json does not exist" in outcome(run).reason and not (run / "ran").exists()


def test_a_damaged_file_of_the_run_is_named_and_recorded(run: Path) -> None:
    (run / "traces").mkdir()
    (run / "traces" / "1-a-b-c-d.arrow").write_bytes(b"")
    (run / "traces" / "1-a-b-c-d.json").write_text("{")
    assert start(run, "touch ran", stage="generate").wait(30) == 2
    found = outcome(run, stage="generate")
    assert found.outcome == "unusable" and "1-a-b-c-d.json" in found.reason and not (run / "ran").exists()


def test_a_stage_that_is_done_is_done_though_nothing_can_be_recorded(run: Path) -> None:
    """As on a full disk: a folder stands where the record would be written."""
    (run / "slurm" / "attempts" / "train.7.jsonl").mkdir(parents=True)
    assert start(run, "exit 0").wait(30) == 0
    assert "this attempt is not recorded" in (run / "log").read_text()


@pytest.mark.parametrize(("is_cancelled", "code"), [(False, 75), (True, 130)])
def test_a_signal_before_the_step_is_recorded_and_is_no_attempt_in_vain(run: Path, is_cancelled: bool, code: int) -> None:
    """While it waits for a server that has not come yet."""
    (run / "slurm").mkdir()
    cancelled = run / "slurm" / "cancelled"
    (run / "squeue").write_text(f"#!/bin/bash\necho '9|9|9|RUNNING|None|n1|a-serve|tracestill serve {run}'\n")
    (run / "squeue").chmod(0o755)
    for _ in range(3):
        cancelled.unlink(missing_ok=True)
        process = start(run, "touch ran", options=("--asks-servers",))
        wait_until(lambda: '"start"' in "".join(text_of(run / "slurm" / "attempts" / "train.7.jsonl").splitlines()[-1:]))
        if is_cancelled:
            cancelled.touch()
        process.send_signal(signal.SIGUSR2)
        assert process.wait(30) == code
    assert {one.outcome for one in attempts.read_attempts(JobFolder.of(RunFolder(run)), "train")} == {"not begun"}
    assert start(run, "touch ran; exit 75").wait(30) == (130 if is_cancelled else 75)
    assert (run / "ran").exists() is not is_cancelled  # nothing of a cancelled run begins


@pytest.mark.parametrize(("shown", "code"), [("JobState=CANCELLED", 130), ("JobState=RUNNING", 75)])
def test_what_scancel_ends_before_the_step_stays_ended(run: Path, shown: str, code: int) -> None:
    (run / "squeue").write_text(f"#!/bin/bash\necho '9|9|9|RUNNING|None|n1|a-serve|tracestill serve {run}'\n")
    (run / "scontrol").write_text(f"#!/bin/bash\necho 'JobId=7 {shown} Reason=None'\n")
    for name in ("squeue", "scontrol"):
        (run / name).chmod(0o755)
    process = start(run, "touch ran", options=("--asks-servers",))
    wait_until(lambda: '"start"' in text_of(run / "slurm" / "attempts" / "train.7.jsonl"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == code and not (run / "ran").exists()


def test_a_controller_that_is_away_while_a_job_begins_is_no_damage(run: Path) -> None:
    """The health check asks it for the names of the nodes."""
    (run / "scontrol").write_text("#!/bin/bash\necho 'Unable to contact slurm controller (connect failure)' >&2; exit 1\n")
    (run / "scontrol").chmod(0o755)
    assert start(run, "touch ran", options=("--health=--memory-gib=1",)).wait(30) == 75
    assert outcome(run).outcome == "interrupted" and "is slurmctld up?" in outcome(run).reason


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_reaches_the_step(run: Path, number: signal.Signals) -> None:
    step = f"trap 'mkdir -p checkpoints/step-00000009; exit 75' {number.name[3:]}; touch ready; while :; do sleep 0.1; done"
    process = start(run, step)
    wait_until((run / "ready").exists)
    process.send_signal(number)
    assert process.wait(30) == 75
    assert (outcome(run).outcome, outcome(run).after) == ("interrupted", "step 9")


def test_twice_in_vain_is_enough(run: Path) -> None:
    assert start(run, "exit 75").wait(30) == 75
    assert start(run, "exit 75", job=8).wait(30) == 75  # another job has a chance of its own
    assert start(run, "echo 'error: why' >&2; exit 75").wait(30) == 1
    assert outcome(run).reason == "no progress in two attempts (step 0): why"
    assert "train: stuck: no progress in two attempts" in (run / "log").read_text()


def test_a_step_whose_count_stands_still_is_ended(run: Path) -> None:
    """It beats for two seconds, then hangs; its time is counted from its last sign of life."""
    line = '{\\"done\\": $n, \\"total\\": 9, \\"unit\\": \\"steps\\"}'
    beats = f'for n in 1 2 3 4 5 6 7 8; do echo "{line}" > "$TRACESTILL_BEAT"; sleep 0.25; done'
    started = time.monotonic()
    assert start(run, f"{beats}; sleep 600", silence_s=2.0).wait(60) == 75
    took = time.monotonic() - started
    found = outcome(run)
    assert found.outcome == "hung" and found.reason == "nothing has moved for 2 s, at 8 of 9 steps"
    assert 4.0 <= took < 9.0, took


@pytest.mark.parametrize(
    ("srun", "signalled", "code", "outcomes"),
    [
        ("sleep 600", False, 75, "hung"),
        ("exit 1", False, 75, "failed"),
        ("trap 'exit 140' USR2; touch staging; while :; do sleep 0.1; done", True, 75, "not begun"),
    ],
)
def test_shards_are_staged_under_the_watchdog(run: Path, srun: str, signalled: bool, code: int, outcomes: str) -> None:
    """A shared file system that hangs while they are copied; a preemption meanwhile is no attempt in vain."""
    (run / "srun").write_text(f"#!/bin/bash\n{srun}\n")
    (run / "srun").chmod(0o755)
    options = ("--staging=shards", "--staged=local", "--loading=2")
    process = start(run, "touch ran", silence_s=2.0, options=options)
    if signalled:
        wait_until((run / "staging").exists)
        process.send_signal(signal.SIGUSR2)
    assert process.wait(60) == code
    assert outcome(run).outcome == outcomes and not (run / "ran").exists()


def test_a_step_that_does_not_stop_is_ended_before_its_time_is_up(run: Path) -> None:
    """Slurm would end the job with it, and queue nothing again. It counts on, and has not a fresh trap for every signal."""
    beats = 'for n in $(seq 600); do echo "{}" > "$TRACESTILL_BEAT"; sleep 0.1; done'
    process = start(run, f"trap '' USR2 TERM; touch ready; {beats}", warning_s=4.0)
    wait_until((run / "ready").exists)
    process.send_signal(signal.SIGUSR2)
    started = time.monotonic()
    assert process.wait(30) == 75
    assert 2.0 <= time.monotonic() - started < 4.0
    assert outcome(run).reason.startswith("not stopped 2 s after it was asked to")


def wait_until(ready: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_count_of_a_stage_is_its_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from configs import progress
    from configs.progress import BEAT_VARIABLE, Count, Display

    beat = tmp_path / "beat.json"
    monkeypatch.setenv(BEAT_VARIABLE, str(beat))
    monkeypatch.setattr(progress, "WRITE_INTERVAL_S", 0.0)
    with Display("train", "steps", Console(quiet=True)) as display:
        display.show(Count(1, 9))
        first = beat.stat().st_mtime_ns
        time.sleep(0.02)
        display.show(Count(1, 9))  # a launcher that polls hung ranks shows the same count for ever
        assert beat.stat().st_mtime_ns == first
        display.show(Count(1, 9, "loss 2.1"))
        assert beat.stat().st_mtime_ns > first
    assert json.loads(beat.read_text()) | {"per_s": 0.0} == {
        "stage": "train", "done": 1, "total": 9, "unit": "steps", "per_s": 0.0, "note": "loss 2.1",
    }  # fmt: skip
