"""A bad night on a real Slurm: what a run of the embedded recipe comes to must not depend on any of it.

Whoever runs these tests with TRACESTILL_STORM=PATH finds what was measured there (python -m tests.bench.slurm_storm).
"""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm.attempts import JobFolder
from slurm.progress import progress_of
from slurm.topology import SPECS
from tests.e2e.commands import SMALL, STAGES
from tests.slurm.cluster import RELEASE_AFTER_S, Cluster, releasing, wait_for
from tests.slurm.site import CLUSTER, Result, Site, everything, result_of

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(2400)]

SLOW = ("teacher.engine.batch_size=2", "train.epochs=6")
"""Two requests at a time on each node and 54 optimizer steps, so that both take long enough to be disturbed."""


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, Any]]:
    """What the tests of this file measure, by test."""
    found: dict[str, Any] = {}
    yield found
    if path := os.environ.get("TRACESTILL_STORM"):
        Path(path).write_text(json.dumps(found))


def a_site(cluster: Cluster, folder: Path, *more: str) -> Site:
    return Site(cluster, folder, (*SMALL, *CLUSTER, *SLOW, *more))


@pytest.fixture(scope="module")
def quiet(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, figures: dict[str, Any]) -> Result:
    """The same run, which nobody disturbs."""
    site = a_site(cluster, tmp_path_factory.mktemp("quiet"))
    started = time.monotonic()
    site.submit()
    site.wait_until_over()
    assert {one["state"] for one in site.status().values()} == {"done"}, everything(site)
    found = result_of(site.run)
    assert (found.ledger.completed, len(found.traces)) == (128, 128)
    figures["quiet"] = {
        "seconds": time.monotonic() - started,
        "stages": {stage: one["seconds"] for stage, one in site.status().items()},
    }
    return found


def preempt_as_it_moves(site: Site, stage: str, times: int, already: int = 0) -> list[float]:
    """Each time the stage has committed something more. Returns the seconds from each preemption to the requeue."""
    cluster, job, took = site.cluster, site.job_of(stage), []
    for number in range(already + 1, already + times + 1):
        wait_until_it_moves(site, stage)
        started = time.monotonic()
        cluster.preempt(job, 0.1)
        wait_for(lambda: cluster.job(job)["Restarts"] == str(number), f"requeue {number} of {stage}\n{site.run.root}", 60)  # noqa: B023
        took.append(time.monotonic() - started)
    return took


def test_twenty_preemptions_cost_nothing(cluster: Cluster, tmp_path: Path, quiet: Result, figures: dict[str, Any]) -> None:
    """Fourteen while two nodes generate, four while the student is trained, two while it is evaluated."""
    site = a_site(cluster, tmp_path)
    started = time.monotonic()
    site.submit()
    took, planned = [], {"generate": 14, "train": 4, "evaluate": 2}
    with releasing(cluster):
        for stage, times in planned.items():
            took += preempt_as_it_moves(site, stage, times)
        site.wait_until_over()
    assert {one["state"] for one in site.status().values()} == {"done"}, everything(site)
    outcomes = {stage: [one.outcome for one in site.attempts(stage)] for stage in planned}
    requeued = sum(len(one) - 1 for one in outcomes.values())
    assert requeued == 20 and all(one[-1] == "done" for one in outcomes.values()), outcomes
    assert result_of(site.run) == quiet
    figures["preemptions"] = {
        "asked": 20, "requeued": requeued, "seconds": time.monotonic() - started, "slowest_requeue_s": max(took),
        "outcomes": outcomes,
    }  # fmt: skip


# --- while two nodes generate -----------------------------------------------------------------------------------------


def generating(cluster: Cluster, folder: Path, *more: str) -> Site:
    """A run whose generation has begun and said something."""
    site = a_site(cluster, folder, "evaluate.headroom=null", *more)
    site.finish("prompts")
    site.submit("--only", "generate")
    wait_until_it_moves(site, "generate")
    return site


def wait_until_it_moves(site: Site, stage: str, seconds: float = 200.0) -> None:
    """Until it has committed more than it has now."""
    before, deadline = progress_of(site.run, stage), time.monotonic() + seconds
    while progress_of(site.run, stage) == before:
        assert time.monotonic() < deadline, f"no progress of {stage} beyond {before}\n{everything(site)}"
        assert not any(one.outcome == "done" for one in site.attempts(stage)), f"{stage} is over, at {before}"
        time.sleep(0.1)


def assert_the_same(site: Site, quiet: Result) -> None:
    """Once the dataset is built."""
    assert site.state("generate") == "done", everything(site)
    site.finish("data")
    assert result_of(site.run) == quiet


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_node_dies_while_generating(
    cluster: Cluster, tmp_path: Path, quiet: Result, figures: dict[str, Any], place: str
) -> None:
    """With the node that the batch script runs on, or with another one's ranks."""
    site = generating(cluster, tmp_path)
    job = site.job_of("generate")
    nodes = cluster.call("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    node = nodes[0 if place == "first" else -1]
    started = time.monotonic()
    cluster.kill_node(node)
    try:
        with releasing(cluster):
            wait_for(lambda: cluster.job(job)["Restarts"] == "1", "a requeue", 120)
            figures[f"node_killed_{place}"] = {"seconds_to_requeue": time.monotonic() - started}
            wait_until_it_moves(site, "generate")
            assert node not in cluster.call("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
            site.wait_until_over()
    finally:
        cluster.start_node(node)
    assert_the_same(site, quiet)


def test_the_controller_is_away_for_a_minute_while_generating(
    cluster: Cluster, tmp_path: Path, quiet: Result, figures: dict[str, Any]
) -> None:
    """Nobody is told of it: the ranks go on, and what ends meanwhile is heard of later."""
    site = generating(cluster, tmp_path)
    time.sleep(6)  # it writes its state every five seconds, and forgets a younger job
    before = progress_of(site.run, "generate")
    cluster.kill_controller()
    time.sleep(60)
    after = progress_of(site.run, "generate")
    cluster.start_controller()
    with releasing(cluster):
        site.wait_until_over()
    figures["controller_killed"] = {"seconds": 60, "before": before, "after": after, "attempts": len(site.attempts("generate"))}
    assert after != before and len(site.attempts("generate")) == 1, everything(site)
    assert_the_same(site, quiet)


def test_a_controller_that_is_killed_a_moment_after_it_has_launched_a_job(
    cluster: Cluster, tmp_path: Path, quiet: Result, figures: dict[str, Any]
) -> None:
    """It writes its state every five seconds. Killed before that it forgets the job, kills its processes, gives its number away
    again, and takes a node out of service over that: the next submission, and an operator, put it right. Killed after that it
    goes on with the job."""
    site = a_site(cluster, tmp_path, "evaluate.headroom=null")
    site.finish("prompts")
    site.submit("--only", "generate")
    wait_for(lambda: bool(site.attempts("generate")), "an attempt", 30)
    cluster.kill_controller()
    cluster.start_controller()
    wait_for(lambda: cluster.call("squeue", "-h") is not None, "a controller", 30)
    site.submit("--only", "generate")
    with releasing(cluster, repairs=True):
        site.wait_until_over()
    figures["controller_killed_early"] = {"attempts": len(site.attempts("generate"))}
    assert_the_same(site, quiet)


def test_two_jobs_of_one_stage(cluster: Cluster, tmp_path: Path, quiet: Result, figures: dict[str, Any]) -> None:
    """As a confused controller launches them: generating, both work at one pool; training, one of them waits."""
    site = generating(cluster, tmp_path)
    cluster.call("sbatch", str(site.run.root / "slurm" / "generate.sbatch"))
    with releasing(cluster):
        site.wait_until_over()
        assert_the_same(site, quiet)
        site.submit("--only", "train")
        wait_until_it_moves(site, "train")
        cluster.call("sbatch", str(site.run.root / "slurm" / "train.sbatch"))
        site.wait_until_over()
    jobs = {stage: [(one.job_id, one.outcome) for one in site.attempts(stage)] for stage in ("generate", "train")}
    figures["launched_twice"] = {"attempts": jobs}
    assert [how for _, how in jobs["generate"]] == ["done", "done"], everything(site)
    assert sorted({how for _, how in jobs["train"]}) == ["busy", "done"], everything(site)
    assert [how for _, how in jobs["train"]].count("done") == 2, everything(site)
    assert "already running here" in next(one.reason for one in site.attempts("train") if one.outcome == "busy")


# --- what hangs -------------------------------------------------------------------------------------------------------

SILENCE_S = 60.0


@pytest.mark.parametrize("stage", ["generate", "train"])
def test_a_stopped_rank_is_found(cluster: Cluster, tmp_path: Path, quiet: Result, figures: dict[str, Any], stage: str) -> None:
    """SIGSTOP to one rank: the others wait for it in a collective, and nothing fails."""
    site = generating(cluster, tmp_path, f"slurm.silence_seconds={SILENCE_S}")
    with releasing(cluster):
        if stage == "train":
            site.wait_until_over()
            site.finish("data")
            site.submit("--only", "train")
            wait_until_it_moves(site, "train")
        job = site.job_of(stage)
        ranks = ranks_of(cluster, job)
        assert len(ranks) == 2, ranks
        os.kill(ranks[-1], signal.SIGSTOP)
        started = time.monotonic()
        wait_for(lambda: any(one.ended for one in site.attempts(stage)), "an end of the attempt", 2 * SILENCE_S + 60)
        took = time.monotonic() - started
        first = site.attempts(stage)[0]
        wait_for(lambda: not alive(ranks), "an end of the ranks that were killed", 10)  # memory of half a GB is given back
        site.wait_until_over()
    log = "".join(path.read_text() for path in site.run.logs.glob(f"{stage}-*.log"))
    figures[f"stopped_rank_{stage}"] = {"silence_s": SILENCE_S, "seconds": took, "outcome": first.outcome, "reason": first.reason}
    assert took <= 2 * SILENCE_S, (took, log[-2000:])
    assert site.state(stage) == "done", everything(site)
    if stage == "generate":
        assert_the_same(site, quiet)


# --- the time limit ---------------------------------------------------------------------------------------------------


def test_the_time_limit_in_every_stage(cluster: Cluster, tmp_path: Path, quiet: Result, figures: dict[str, Any]) -> None:
    """Each stage is held (SIGSTOP) until Slurm has sent the warning of a time limit that is lowered while it runs, let go, and
    has what is left of a minute."""
    site = a_site(cluster, tmp_path, "teacher.engine.prepared=shards", "slurm.canary=0.2")
    stages, took = list(site.submit()), {}
    assert set(stages) == {*STAGES, "prepare", "canary"}
    for stage in stages:
        job = site.job_of(stage)
        wait_for(lambda: is_at_work(site, stage, job), f"{stage} at work\n{site.run.root}", 200)  # noqa: B023
        held = step_of(cluster, job)
        for process in held:
            os.kill(process, signal.SIGSTOP)
        cluster.limit_in_a_minute(job)
        wait_for(lambda: any(is_told(process) for process in held), f"a warning to {stage}\n{site.run.root}", 120)  # noqa: B023
        told = time.monotonic()
        for process in alive(held):
            os.kill(process, signal.SIGCONT)
        wait_for(lambda: cluster.job(job)["Restarts"] == "1", f"a requeue of {stage}\n{site.run.root}", 80)  # noqa: B023
        took[stage] = time.monotonic() - told
        cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        time.sleep(RELEASE_AFTER_S)
        cluster.release(job)
    site.wait_until_over()
    outcomes = {stage: [one.outcome for one in site.attempts(stage)] for stage in stages}
    figures["time_limit"] = {"seconds_from_warning_to_requeue": took, "outcomes": outcomes}
    assert outcomes == {stage: ["interrupted", "done"] for stage in stages}, everything(site)
    assert result_of(site.run) == quiet


def is_at_work(site: Site, stage: str, job: int) -> bool:
    """It has counted something; a stage that counts nothing, or is over a moment later, is there. The report takes two seconds,
    and the first of them is Python's imports, in which a signal ends the process: an interruption too."""
    if SPECS[stage].counts and stage != "prepare":  # type: ignore[index]
        return JobFolder.of(site.run).beat(stage, job).is_file()
    return any(time.time() - Path(f"/proc/{process}").stat().st_ctime > 0.3 for process in step_of(site.cluster, job))


def is_told(process: int) -> bool:
    """Whether SIGUSR2 waits to be heard by it."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        return any(int(mask, 16) >> (signal.SIGUSR2 - 1) & 1 for mask in re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", status, re.M))
    return False


# --- processes --------------------------------------------------------------------------------------------------------


def step_of(cluster: Cluster, job: int) -> list[int]:
    """Processes of the job's step: what srun has started, and theirs."""
    return [process for process in cluster.processes(f"SLURM_JOB_ID={job}") if "SLURM_STEP_ID" in variables_of(process)]


def variables_of(process: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{process}/environ").read_text(errors="replace")
        return dict(word.split("=", 1) for word in text.split("\0") if "=" in word)
    return {}


def ranks_of(cluster: Cluster, job: int) -> list[int]:
    """Processes of the job that torchrun gave a rank, by their rank."""
    found = {process: variables_of(process) for process in cluster.processes(f"SLURM_JOB_ID={job}")}
    ranks = {process: int(values["RANK"]) for process, values in found.items() if "LOCAL_RANK" in values}
    return sorted(ranks, key=ranks.__getitem__)


def alive(processes: list[int]) -> list[int]:
    """Of these; a zombie is none."""
    found = []
    for process in processes:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(process)
    return found
