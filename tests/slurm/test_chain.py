"""The embedded recipe as jobs of a real Slurm: four virtual nodes, a teacher on two of them."""

import time
from pathlib import Path

import pytest

from data.ledger import read_ledger
from tests.e2e.commands import STAGES
from tests.slurm.cluster import Cluster, releasing, wait_for
from tests.slurm.site import Site, everything

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(1500)]


@pytest.mark.smoke
def test_the_chain_with_two_preemptions(cluster: Cluster, tmp_path: Path) -> None:
    """One while two nodes generate, one while the student is trained; nothing is lost, and the night needs nobody."""
    site = Site(cluster, tmp_path)
    assert site.submit() == dict.fromkeys(STAGES, "submitted")
    assert site.submit() == dict.fromkeys(STAGES, "attached")
    generate, train = site.job_of("generate"), site.job_of("train")
    with releasing(cluster):
        wait_for(lambda: any(site.run.traces.glob("*.json")), "first traces", 300)
        assert len(set(cluster.call("scontrol", "show", "hostnames", cluster.job(generate)["NodeList"]).split())) == 2
        cluster.preempt(generate)
        wait_for(lambda: cluster.job(generate)["Restarts"] == "1", "a requeue of generate", 60)
        wait_for(lambda: any(site.run.checkpoints.glob("step-*")), "a checkpoint", 400)
        cluster.preempt(train)
        wait_for(lambda: cluster.job(train)["Restarts"] == "1", "a requeue of train", 60)
        site.wait_until_over()
    found = site.status()
    assert {stage: one["state"] for stage, one in found.items()} == dict.fromkeys(STAGES, "done"), everything(site)
    assert found["generate"]["attempts"] == found["train"]["attempts"] == 2, everything(site)
    assert (site.run.report / "index.html").is_file()
    ledger = read_ledger(site.run)
    assert (ledger.requested, ledger.completed + ledger.failed, ledger.pending) == (128, 128, 0)
    assert site.submit() == dict.fromkeys(STAGES, "done")
    shown = site.give("logs", str(site.run.root), "train", "--no-follow")
    assert shown.code == 0 and "train" in shown.out, shown


@pytest.mark.smoke
def test_a_failing_stage_stops_the_chain_and_says_why(cluster: Cluster, tmp_path: Path) -> None:
    """By exit code 2, at once: what comes after it is taken out of the queue, and the report is made of what there is."""
    site = Site(cluster, tmp_path)
    site.submit(overrides=("evaluate.suites.0={type: jsonl, path: gone.jsonl}",))
    site.wait_until_over(120)
    found = site.status()
    assert found["prompts"]["state"] == "failed" and "gone.jsonl" in str(found["prompts"]["reason"]), everything(site)
    assert {found[stage]["state"] for stage in STAGES[1:-1]} == {"never ran"}, everything(site)
    said = site.give("status", str(site.run.root)).out
    assert "stopped   prompts is failed" in said and "gone.jsonl" in said


def test_cancel_stops_cleanly_and_submit_continues(cluster: Cluster, tmp_path: Path) -> None:
    site = Site(cluster, tmp_path)
    site.submit()
    wait_for(lambda: any(site.run.traces.glob("*.json")), "first traces", 300)
    started = time.monotonic()
    ended = site.give("cancel", str(site.run.root))
    assert ended.code == 0 and "generate  stopped" in ended.out and "train     taken out of the queue" in ended.out, ended
    assert time.monotonic() - started < 60 and not cluster.call("squeue", "-h")
    found = site.status()
    assert found["generate"]["state"] == "cancelled" and found["prompts"]["state"] == "done", everything(site)
    before = read_ledger(site.run).completed
    assert 0 < before < 128
    again = site.submit()
    assert again["prompts"] == again["headroom"] == "done" and again["generate"] == again["report"] == "submitted"
    site.wait_until_over()
    assert read_ledger(site.run).completed == 128 and site.state("export") == "done", everything(site)
    assert site.give("cancel", str(site.run.root)).out.startswith("nothing to cancel")
