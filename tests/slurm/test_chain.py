"""The embedded recipe as jobs of a real Slurm: four virtual nodes, a teacher on two of them."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.ledger import read_ledger
from data.store import RunFolder
from tests.e2e.commands import ROOT, STAGES, Ended, command
from tests.slurm.cluster import Cluster, releasing, running, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(1500)]

SITE = (
    "teacher.hardware.nodes=2",
    "teacher.engine.processes=1",
    "slurm.time_limit=00:30:00",
    "slurm.warning_seconds=60",
    "slurm.silence_seconds=300",
)
CHAIN_S = 900.0  # two minutes on an idle machine


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm")) as found:
        yield found


class Site:
    """A user's login node: a working directory, and the commands given there."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.run = RunFolder(folder / "run")
        folder.mkdir(exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        return self.cluster.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def give(self, *words: str, small: bool = False) -> Ended:
        done = subprocess.run(
            command(*words, small=small), cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=200,
            check=False,
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr)

    def submit(self, *options: str, overrides: tuple[str, ...] = SITE) -> dict[str, str]:
        """What became of each stage: `submitted`, `attached`, `done`."""
        words = [word for override in overrides for word in ("-s", override)]
        ended = self.give("submit", "embedded", "--run-dir", str(self.run.root), *options, *words, small=True)
        assert ended.code == 0, ended.err[-2000:]
        return {line.split()[0]: line.split()[1] for line in ended.out.splitlines() if line.split()[0] in STAGES}

    def status(self) -> dict[str, dict[str, object]]:
        ended = self.give("status", str(self.run.root), "--json")
        assert ended.code == 0, ended.err
        return {one["stage"]: one for one in json.loads(ended.out.splitlines()[-1])["stages"]}

    def state(self, stage: str) -> str:
        return str(self.status()[stage]["state"])

    def job_of(self, stage: str) -> int:
        lines = (self.run.root / "slurm" / "jobs.jsonl").read_text().splitlines()
        return next(found["job_id"] for line in reversed(lines) if (found := json.loads(line))["stage"] == stage)

    def wait_until_over(self, seconds: float = CHAIN_S) -> None:
        wait_for(lambda: not self.cluster.call("squeue", "-h"), "end of the chain", seconds, poll_s=1.0)

    def attempts(self, stage: str) -> list[dict[str, object]]:
        folder = self.run.root / "slurm" / "attempts"
        return [json.loads(line) for path in sorted(folder.glob(f"{stage}.*")) for line in path.read_text().splitlines()]


def everything(site: Site) -> str:
    """For an assertion: what a user would look at."""
    logs = [f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(site.run.logs.glob("*-*.log"))]
    return site.give("status", str(site.run.root)).out + "\n".join(logs)


def dataset_of(run: RunFolder) -> dict[str, str]:
    """The rows of both splits, as the manifest vouches for them."""
    files = json.loads((run.dataset / "manifest.json").read_text())["files"]
    return {Path(name).parent.name: sha for name, sha in files.items() if name.endswith(".arrow")}


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
    site.submit(overrides=(*SITE, "evaluate.suites.0={type: jsonl, path: gone.jsonl}"))
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
