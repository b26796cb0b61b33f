"""Servers of the teacher as jobs on a real Slurm: they register, go and come, and end when nobody asks them any more."""

import json
from pathlib import Path

import pytest

from data.ledger import read_ledger
from student.folders import EMBEDDED
from tests.e2e.commands import SMALL, STAGES
from tests.slurm.cluster import Cluster, releasing, wait_for
from tests.slurm.site import Site, everything

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(1500)]

# The embedded student answers as the teacher: what is proved is that it is asked, whoever serves it at the moment.
SERVED = (
    f"teacher.engine={{type: http, model: {EMBEDDED}, concurrency: 8, health_s: 1, deadline_s: 300}}",
    f"teacher.model={EMBEDDED}",
    "teacher.layout={expert_parallel: 1}",
    "generate.sampling.max_tokens=32",
    *(override for override in SMALL if not override.startswith("teacher.engine.")),
    "slurm.servers={program: transformers, jobs: 2, start_seconds: 300, idle_seconds: 20}",
    "slurm.stages={serve: {options: [--exclusive]}}",  # a node each, so that one can be taken away
    "slurm.time_limit=00:30:00",
    "slurm.warning_seconds=60",
    "evaluate.headroom=null",
)


def test_two_servers_come_and_go_while_a_run_asks_them(cluster: Cluster, tmp_path: Path) -> None:
    site = Site(cluster, tmp_path, SERVED)
    site.finish("prompts", 120)
    site.submit("--only", "generate")
    folder = site.run.root / "slurm"
    with releasing(cluster):
        wait_for(lambda: len(list(folder.glob("servers/*.url"))) == 2, "two servers", 240)
        wait_for(lambda: any(site.run.traces.glob("*.json")), "first traces", 120)
        job = int(min(folder.glob("servers/*.url")).stem)
        cluster.preempt(job, 1.0)
        wait_for(lambda: cluster.job(job)["Restarts"] == "1", "a requeue of a server", 60)
        assert not (folder / "servers" / f"{job}.url").exists()  # it had the time to sign off
        others = [int(line) for line in cluster.call("squeue", "-h", "-r", "--name=embedded-serve", "-o", "%A").splitlines()]
        assert [cluster.job(other)["Restarts"] for other in others if other != job] == ["0"]
        wait_for(lambda: cluster.states()[site.job_of("generate")] == "COMPLETED", "end of generate", 400)
    ledger = read_ledger(site.run)
    assert (ledger.completed, ledger.failed, ledger.pending) == (128, 0, 0), everything(site)
    served = [json.loads(line)["url"] for line in (folder / "served.jsonl").read_text().splitlines()]
    assert len(set(served)) >= 2, served
    # They end when nobody has asked them for a while. For the rest of the chain there are others, which evaluation closes.
    wait_for(lambda: not cluster.call("squeue", "-h"), "the end of idle servers", 120)
    assert site.status()["serve"]["state"] == "done", everything(site)
    again = site.submit()
    assert again["generate"] == "done" and again["serve"] == "submitted" and again["evaluate"] == "submitted"
    with releasing(cluster):
        site.wait_until_over()
    assert (folder / "servers.closed").is_file() and not list(folder.glob("servers/*.url"))
    found = {stage: one["state"] for stage, one in site.status().items()}
    assert set(found.values()) == {"done"}, everything(site)
    answered = json.loads((site.run.evaluation / "teacher.json").read_text())
    assert answered["metrics"]["num_items"] == 57, answered


def test_a_server_goes_back_at_its_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    """It signs off, and registers again once it has its turn. Whoever is to ask it begins later."""
    later = "slurm.stages={serve: {options: [--exclusive]}, generate: {options: [--begin=now+1hour]}}"
    site = Site(cluster, tmp_path, (*(one.replace("jobs: 2", "jobs: 1") for one in SERVED), later))
    site.finish("prompts", 120)
    site.submit("--only", "generate")
    generate, serve = site.job_of("generate"), site.job_of("serve")
    url = site.run.root / "slurm" / "servers" / f"{serve}.url"
    wait_for(url.exists, "a server", 240)
    cluster.limit_in_a_minute(serve)
    wait_for(lambda: cluster.job(serve)["Restarts"] == "1", "a requeue of the server", 150)
    assert not url.exists() and [one.outcome for one in site.attempts("serve")] == ["interrupted"], everything(site)
    cluster.call("scontrol", "update", f"JobId={serve}", "TimeLimit=30")
    with releasing(cluster):
        wait_for(url.exists, "a server again", 240)
        wait_for(lambda: cluster.states()[generate] == "COMPLETED", "the end of generate", 400)
    assert read_ledger(site.run).completed == 128 and site.give("cancel", str(site.run.root)).code == 0, everything(site)


def test_servers_that_wait_are_replaced_with_what_they_wait_for(cluster: Cluster, tmp_path: Path) -> None:
    """And a refusal of their script takes out what was submitted before them."""
    for node in cluster.nodes:
        cluster.call("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    site = Site(cluster, tmp_path, SERVED)
    refused = site.give("submit", *site.words("slurm.stages={serve: {options: [--gres=gpu:99]}}"))
    assert refused.code == 2 and "slurm.stages.serve" in refused.err and refused.err.count("\n") == 1, refused
    assert not cluster.call("squeue", "-h")
    assert set(site.submit().values()) == {"submitted"}
    before = site.job_of("prompts")
    assert set(site.submit().values()) == {"attached"} and site.job_of("prompts") == before
    assert set(site.submit(overrides=("slurm.memory=1G",)).values()) == {"submitted"}
    queue = {int(job): name for job, name in (line.split() for line in cluster.call("squeue", "-h", "-o", "%F %j").splitlines())}
    servers = [job for job, name in queue.items() if name == "embedded-serve"]
    assert before not in queue and len(servers) == 2 and len(queue) == len(site.status()) + 1
    after = {cluster.job(job)["Dependency"] for job in servers}
    assert after == {f"afterok:{site.job_of(stage)}(unfulfilled)" for stage in ("prompts", "train")}


def test_stages_wait_no_longer_than_there_is_hope(cluster: Cluster, tmp_path: Path) -> None:
    """A server that cannot start (no such option) is tried twice; whoever waits for it is told so."""
    site = Site(cluster, tmp_path, tuple(one.replace("jobs: 2", "jobs: 1, options: [--nonsense]") for one in SERVED))
    with releasing(cluster):
        assert site.submit()["serve"] == "submitted"
        site.wait_until_over(400)
    found = site.status()
    assert found["serve"]["state"] == "failed" and "no progress in two attempts" in str(found["serve"]["reason"])
    assert "no job is left that could" in str(found["generate"]["reason"]), everything(site)
    assert {found[stage]["state"] for stage in STAGES if stage in ("data", "train")} == {"never ran"}
