"""Where a chain stands, from what Slurm says and from what the run folder holds."""

from pathlib import Path

import pytest

from configs.progress import Count, write_beat
from data.store import RunFolder, seal
from slurm import attempts
from slurm.attempts import JobFolder
from slurm.chain import jobs_of
from slurm.client import QueuedJob
from slurm.status import read_status


def of_train(run: RunFolder, state: str, reason: str) -> tuple[str, str]:
    """The state and the reason that the status gives a stage whose one job Slurm describes so."""
    job = QueuedJob(7, 7, state, reason, "", f"tracestill train {run.root}", "7")
    found = read_status(run, ("train",), [job])
    assert (found.stopped_at is not None) == (found.stages[0].state == "held")
    return found.stages[0].state, found.stages[0].reason


@pytest.mark.parametrize("reason", ["JobHeldAdmin", "JobHeldUser", "JobHoldMaxRequeue", "launch failed requeued held"])
def test_a_job_that_slurm_holds_waits_for_somebody(tmp_path: Path, reason: str) -> None:
    state, why = of_train(RunFolder(tmp_path), "PENDING", reason)
    assert state == "held" and reason in why and "scontrol release 7" in why


def test_a_job_that_can_never_start_says_what_to_do(tmp_path: Path) -> None:
    state, why = of_train(RunFolder(tmp_path), "PENDING", "PartitionTimeLimit")
    assert state == "held" and why.startswith("PartitionTimeLimit: it will not start")


@pytest.mark.parametrize("reason", ["Priority", "Resources", "BeginTime", "Dependency", "ReqNodeNotAvail", "None"])
def test_a_job_that_waits_its_turn_is_pending(tmp_path: Path, reason: str) -> None:
    assert of_train(RunFolder(tmp_path), "PENDING", reason) == ("pending", reason.replace("None", ""))


def test_a_stage_that_is_whole_although_one_of_its_jobs_failed_says_so(tmp_path: Path) -> None:
    """What waits for an array does not begin when one element has failed for good."""
    run = RunFolder(tmp_path)
    folder = JobFolder.of(run)
    for job, outcome in ((8, "done"), (9, "stuck")):
        attempts.begin(folder, "generate", job, 0, "n1", "traces 0")
        attempts.end(folder, "generate", job, after="traces 5", code=0, outcome=outcome, reason="link 3 is down")
    attempts.append(folder.jobs, {"stage": "generate", "job_id": 8})
    attempts.append(folder.jobs, {"stage": "data", "job_id": 10})
    made = run.traces / "made"
    made.parent.mkdir()
    made.write_text("1")
    seal(run, run.traces, stage="generate", fingerprint="f", inputs={}, files=[made], counts={}, seconds=0.0)
    found = read_status(run, ("generate", "data"), [])
    assert [one.state for one in found.stages] == ["done", "never ran"] and found.stopped_at == found.stages[1]
    assert "generate job 9 was stuck: link 3 is down" in found.stages[1].reason


@pytest.mark.parametrize("outcome", ["refused", "unusable", "stuck", "done"])
def test_a_stage_that_stopped_over_what_was_made_before_is_not_done(tmp_path: Path, outcome: str) -> None:
    """With other settings: what the first job made lies there, and the second one has refused."""
    run = RunFolder(tmp_path)
    folder = JobFolder.of(run)
    made = run.dataset / "made"
    made.parent.mkdir()
    made.write_text("1")
    seal(run, run.dataset, stage="data", fingerprint="f", inputs={}, files=[made], counts={}, seconds=0.0)
    for job, said in ((8, "done"), (9, outcome)):
        attempts.append(folder.jobs, {"stage": "data", "job_id": job})
        attempts.begin(folder, "data", job, 0, "n1", "")
        attempts.end(folder, "data", job, after="", code=0, outcome=said, reason="nothing kept of 128")
    [found] = read_status(run, ("data",), []).stages
    assert found.state == {"refused": "refused", "done": "done"}.get(outcome, "failed")
    if outcome != "done":
        assert (found.jobs, found.reason) == ((9,), "nothing kept of 128")
        seal(run, run.dataset, stage="data", fingerprint="g", inputs={}, files=[made], counts={}, seconds=0.0)  # by hand, since
        assert read_status(run, ("data",), []).stages[0].state == "done"


def test_a_script_that_ended_before_its_stage_began_shows_its_last_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    attempts.append(JobFolder.of(run).jobs, {"stage": "train", "job_id": 7})
    run.logs.mkdir()
    (run.logs / "train-7.log").write_text("slurm_script: line 9: module: command not found\n\n")
    [found] = read_status(run, ("train",), []).stages
    assert found.state == "failed" and "module: command not found" in found.reason and "train-7.log" in found.reason


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chain.json", "{}"), ("chain.json", '{"stages": ["train", "nonsense"]}'), ("jobs.jsonl", '{"job_id": 7}\n[]\n{'),
        ("attempts/train.7.jsonl", "{}\n"), ("attempts/train.x.jsonl", "{}\n"), ("excluded.jsonl", '{"node": "n1"}\n'),
        ("beats/train.7.json", "[]"), ("beats/train.7.json", '{"done": "x", "total": 0}'),
        ("jobs.jsonl", '{"job_id": [7], "stage": 3}'), ("excluded.jsonl", '{"node": 5, "reason": "slow"}'),
        ("attempts/train.7.jsonl", '{"event": "start", "pid": 1, "at": "x", "progress": ""}'),
    ],
)  # fmt: skip
def test_a_damaged_file_of_jobs_is_passed_over(tmp_path: Path, name: str, text: str) -> None:
    """They are for people: nothing that was made depends on them."""
    run = RunFolder(tmp_path)
    path = tmp_path / "slurm" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (run.checkpoints / "step-abc").mkdir(parents=True)
    job = QueuedJob(7, 7, "RUNNING", "None", "n1", f"tracestill train {run.root}", "7")
    [found] = read_status(run, ("train",), [job]).stages
    assert (found.state, found.progress) == ("running", "step 0")
    assert set(attempts.read_stages(JobFolder.of(run))) <= {"train"}


def test_a_job_that_is_suspended_is_said_to_be(tmp_path: Path) -> None:
    assert of_train(RunFolder(tmp_path), "SUSPENDED", "None") == ("running", "suspended by Slurm")


def test_servers_count_up_to_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    beat = JobFolder.of(run).beat("serve", 7)
    beat.parent.mkdir(parents=True)
    write_beat(beat, "serve", Count(265, 0, unit="seconds"))
    job = QueuedJob(7, 7, "RUNNING", "None", "n1", f"tracestill serve {run.root}", "7")
    assert read_status(run, ("serve",), [job]).stages[0].count == "265 seconds"


def test_what_was_cancelled_is_cancelled_whatever_it_was_waiting_for(tmp_path: Path) -> None:
    run, folder = RunFolder(tmp_path), JobFolder.of(RunFolder(tmp_path))
    attempts.begin(folder, "generate", 7, 0, "n1", "traces 0")
    attempts.end(folder, "generate", 7, after="traces 0", code=143, outcome="hung", reason="nothing has moved")
    for stage, job in (("generate", 7), ("data", 8)):
        attempts.append(folder.jobs, {"stage": stage, "job_id": job})
    assert [one.state for one in read_status(run, ("generate", "data"), []).stages] == ["failed", "never ran"]
    folder.cancelled.touch()
    assert [one.state for one in read_status(run, ("generate", "data"), []).stages] == ["cancelled", "cancelled"]


def test_a_job_whose_comment_a_site_has_rewritten_is_known_by_its_number_and_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    attempts.append(JobFolder.of(run).jobs, {"stage": "train", "job_id": 7})
    mine, other = (QueuedJob(7, 7, "RUNNING", "None", "n1", "cost=9", "7", name) for name in ("embedded-train", "somebody-else"))
    assert list(jobs_of(run, [mine])) == ["train"] and jobs_of(run, [other]) == {}
