"""The embedded recipe as jobs of a real Slurm: four virtual nodes, a teacher on two of them."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from data.ledger import read_ledger
from tests.e2e.commands import SMALL, STAGES, command
from tests.slurm.cluster import Cluster, releasing, running, wait_for
from tests.slurm.site import CLUSTER, Site, everything

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


def test_other_settings_take_the_place_of_jobs_that_wait(cluster: Cluster, tmp_path: Path) -> None:
    """Nothing goes past a gate because its job waited for the end of an evaluation with another."""
    site = Site(cluster, tmp_path)
    site.submit()
    wait_for(lambda: any(site.run.logs.glob("prompts-*.log")), "a start", 60)
    before = {stage: site.job_of(stage) for stage in STAGES}
    again = site.submit(overrides=(HARD,))
    running = [stage for stage in STAGES if again[stage] == "attached"]
    assert running in (["prompts"], ["headroom"], []) and again["generate"] == again["export"] == again["report"] == "submitted"
    queue = {int(line) for line in cluster.call("squeue", "-h", "-o", "%A").split()}
    assert queue.isdisjoint(before[stage] for stage in STAGES if again[stage] == "submitted")
    assert f"afterok:{site.job_of('evaluate')}" in cluster.job(site.job_of("export"))["Dependency"]
    cluster.call("scancel", str(site.job_of("train")))  # those behind it go with it, but for the report
    wait_for(lambda: "evaluate" not in cluster.call("squeue", "-h", "-o", "%j"), "the end of what waits for it", 30)
    last = site.submit(overrides=(HARD,))
    assert {last[stage] for stage in ("train", "evaluate", "export", "report")} == {"submitted"}
    assert f"afterany:{site.job_of('export')}" in cluster.job(site.job_of("report"))["Dependency"]
    assert site.give("cancel", str(site.run.root)).code == 0 and not cluster.call("squeue", "-h")
    found = {stage: one["state"] for stage, one in site.status().items()}
    assert found["train"] == found["report"] == "cancelled", everything(site)


@pytest.mark.parametrize("asked", ["partition: nowhere", "options: [--gres=gpu:99]"])
def test_what_slurm_refuses_leaves_nothing_in_the_queue(cluster: Cluster, tmp_path: Path, asked: str) -> None:
    """Told before the first job, or, where Slurm cannot tell so early, by the refusal of one in the middle."""
    site = Site(cluster, tmp_path)
    ended = site.give("submit", *site.words(f"slurm.stages={{evaluate: {{{asked}}}}}"))
    assert ended.code == 2 and "slurm.stages.evaluate" in ended.err and ended.err.count("\n") == 1, ended
    wait_for(lambda: not cluster.call("squeue", "-h"), "an empty queue", 30)
    assert site.submit() == dict.fromkeys(STAGES, "submitted")


@pytest.mark.parametrize("key", ["student.model", "teacher.model"])
def test_a_model_that_is_not_there_costs_no_night(cluster: Cluster, tmp_path: Path, key: str) -> None:
    """Its job would find out hours later. In a container there may be other paths."""
    site = Site(cluster, tmp_path)
    ended = site.give("submit", *site.words(f"{key}=weights/none"))
    assert ended.code == 2 and f"{key} weights/none: no such folder" in ended.err and ended.err.count("\n") == 1, ended
    assert not site.run.root.exists() and not cluster.call("squeue", "-h")
    for node in cluster.nodes:
        cluster.call("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    inside = site.submit(overrides=(f"{key}=weights/none", "slurm.srun=[--container-image=x]"))
    assert set(inside.values()) == {"submitted"}


def test_nodes_that_are_away_for_the_moment_are_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    """sbatch --test-only calls that a configuration that is not available. A time limit that the partition does not grant it does
    not mention, and a job that waits for another one does not show it."""
    for node in cluster.nodes:
        cluster.call("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    site = Site(cluster, tmp_path)
    shown = site.give("submit", *site.words("slurm.stages={train: {time_limit: '02:00:00'}}"))
    lines = {line.split()[0]: line for line in shown.out.splitlines()}
    assert shown.code == 0 and {lines[stage].split()[1] for stage in STAGES} == {"submitted"}, shown
    assert "no node for it now, or ever: sbatch: allocation failure" in lines["generate"], shown
    for node in cluster.nodes:
        cluster.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
    cluster.call("scancel", "--user=root")
    wait_for(lambda: not cluster.call("squeue", "-h"), "an empty queue", 30)
    again = site.give("submit", *site.words("slurm.stages={train: {time_limit: '02:00:00'}}"))
    said = [line for line in again.out.splitlines() if "may never start" in line]
    assert len(said) == 1 and said[0].startswith("train ") and "the default partition grants 01:00:00" in said[0], again


def test_a_stage_is_not_made_anew_under_the_one_that_reads_it(cluster: Cluster, tmp_path: Path) -> None:
    """What generate makes would be of prompts that are not there any more, and pass for new."""
    site = Site(cluster, tmp_path)
    site.submit()
    wait_for(lambda: any(site.run.traces.glob("*.json")), "first traces", 300)
    queue = cluster.call("squeue", "-h", "-o", "%A %T")
    ended = site.give("submit", *site.words(), "--from", "prompts")
    said = f"prompts is to be made anew, and generate (job {site.job_of('generate')}) is at work on what there is"
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended
    assert cluster.call("squeue", "-h", "-o", "%A %T") == queue
    assert site.give("cancel", str(site.run.root)).code == 0
    assert site.submit("--from", "prompts") == dict.fromkeys(STAGES, "submitted")
    assert site.give("cancel", str(site.run.root)).code == 0


def test_an_array_that_has_lost_a_job_is_gone_on_with(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm starts nothing that waits for all of them; the others do its work as well."""
    site = Site(cluster, tmp_path, (*SMALL, *CLUSTER, "slurm.generate_jobs=2"))
    site.submit()
    wait_for(lambda: any(site.run.traces.glob("*.json")), "first traces", 300)
    array = site.job_of("generate")
    cluster.call("scancel", f"{array}_0")
    wait_for(lambda: f"{array}_0" not in cluster.call("squeue", "-h", "-r", "-o", "%i"), "its end", 60)
    shown = site.give("submit", *site.words())
    lines = {line.split()[0]: line for line in shown.out.splitlines()}
    assert "attached" in lines["generate"] and "1 of its jobs ended without finishing; the others go on" in lines["generate"], (
        shown
    )
    data = site.job_of("data")
    assert f"afterany:{array}" in cluster.job(data)["Dependency"], everything(site)
    assert site.submit()["data"] == "attached" and site.job_of("data") == data
    site.wait_until_over()
    assert {one["state"] for one in site.status().values()} == {"done"}, everything(site)
    assert read_ledger(site.run).completed == 128


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


EVERY_KIND = (
    "teacher.engine.prepared=shards", "slurm.generate_jobs=2", "slurm.canary=0.2", "train.nodes=2", "train.processes=1",
)  # fmt: skip
HARD, SOFT = "evaluate.gates={accuracy: {min: 1.0}}", "evaluate.gates={accuracy: {min: 0.0}}"


def test_every_kind_of_job_and_a_gate_that_says_no(cluster: Cluster, tmp_path: Path) -> None:
    """Shards are prepared, a canary goes ahead, two jobs of two nodes generate together, two nodes train. The student is refused:
    nothing is exported, the report says so, and what is asked for afterwards follows from the gates then."""
    site = Site(cluster, tmp_path, (*SMALL, *CLUSTER, *EVERY_KIND))
    stages = ["prepare", "prompts", "headroom", "canary", *STAGES[2:]]
    assert site.submit("--max-nodes", "4", overrides=(HARD,)) == dict.fromkeys(stages, "submitted")
    (site.run.root / "slurm" / "jobs.jsonl").unlink()  # whoever was killed before the note was written
    assert site.submit("--max-nodes", "4", overrides=(HARD,)) == dict.fromkeys(stages, "attached")
    held = site.cluster.call("squeue", "-h", "--name=embedded-report", "-o", "%A")
    cluster.call("scontrol", "hold", held)
    assert f"scontrol release {held}" in str(site.status()["report"]["reason"]), everything(site)
    cluster.call("scontrol", "release", held)
    wait_for(lambda: any(site.run.logs.glob("generate-*.log")), "a log of generate", 400)
    with subprocess.Popen(
        command("logs", str(site.run.root), "generate"),
        env=site.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as follower:
        wait_for(lambda: bool(site.status()["generate"]["state"] == "done"), "end of generate", 400, poll_s=1.0)
        follower.send_signal(signal.SIGINT)
        shown, _ = follower.communicate(timeout=30)
    assert "generate" in shown and follower.returncode in (0, 75), (follower.returncode, shown)
    site.wait_until_over()
    found = site.status()
    states = {stage: one["state"] for stage, one in found.items()}
    refused = dict.fromkeys(stages, "done") | {"evaluate": "refused", "export": "never ran"}
    assert states == refused, everything(site)
    assert "accuracy" in str(found["evaluate"]["reason"]) and found["evaluate"]["attempts"] == 1, everything(site)
    assert [one.outcome for one in site.attempts("generate")] == ["done", "done"], everything(site)
    assert (
        "".join(path.read_text() for path in site.run.logs.glob("canary-*.log")).count("canary: 32 requests") == 1
    )  # by one node of two
    assert not site.run.export.exists() and (site.run.report / "index.html").is_file()
    assert any(site.run.root.rglob("offline-run-*/run-*.wandb"))
    assert read_ledger(site.run).completed == 128

    # Gates are free to change once everything is sealed: what they decide is decided anew, on the login node where it can be.
    after = site.submit(overrides=(SOFT,))
    assert after == dict.fromkeys(stages, "done") | dict.fromkeys(("evaluate", "export", "report"), "submitted")
    site.wait_until_over()
    assert site.submit(overrides=(SOFT,)) == dict.fromkeys(stages, "done"), everything(site)
    again = site.give("submit", *site.words(HARD))
    assert "evaluate  submitted" in again.out and "with other settings" in again.out, again
    site.wait_until_over()
    assert site.state("evaluate") == "refused", everything(site)


def test_the_chain_on_a_cluster_without_any_network_but_its_own(tmp_path: Path) -> None:
    """Controller, nodes and jobs see loopback alone: no stage, and nothing that W&B does, needs more. It has a second address,
    because Slurm's daemons do not start where there is none but 127.0.0.1."""
    alone = ["unshare", "--net", "sh", "-c", "ip link set lo up && ip addr add 10.0.0.1 dev lo && echo up && exec sleep 3600"]
    with subprocess.Popen(alone, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as network:
        try:
            assert network.stdout is not None
            if network.stdout.readline() != "up\n":
                pytest.skip("unshare --net is not permitted here, or ip is not installed (iproute2)")
            with running(tmp_path / "cluster", 2, inside=("nsenter", f"--net=/proc/{network.pid}/ns/net")) as cluster:
                site = Site(cluster, tmp_path / "site")
                away = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
                tried = subprocess.run([*cluster.inside, "python3", "-c", away], capture_output=True, text=True, check=False)
                assert "Network is unreachable" in tried.stderr
                site.submit()
                site.wait_until_over()
                assert {one["state"] for one in site.status().values()} == {"done"}, everything(site)
                assert any(site.run.root.rglob("offline-run-*/run-*.wandb"))
        finally:
            network.kill()
