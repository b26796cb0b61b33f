"""The login node of a cluster: commands of a user there, and what a run folder says afterwards."""

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from data.ledger import Ledger, read_ledger
from data.store import RunFolder, read_first_copies
from slurm.attempts import Attempt, JobFolder, read_attempts
from slurm.topology import SPECS
from tests.e2e.commands import ROOT, SMALL, Ended, command
from tests.slurm.cluster import Cluster, wait_for

# Two nodes generate, one process on each; nothing here waits for half an hour.
CLUSTER = (
    "teacher.hardware.nodes=2",
    "teacher.engine.processes=1",
    "slurm.time_limit=00:30:00",
    "slurm.warning_seconds=60",
    "slurm.silence_seconds=300",
)
SAID = ("raw_text", "finish_reason", "reasoning_tokens", "answer_tokens", "seed")
CHAIN_S = 900.0  # two minutes on an idle machine


class Site:
    """A working directory there, a run of the embedded recipe in it, and the commands given for that run."""

    def __init__(self, cluster: Cluster, folder: Path, overrides: tuple[str, ...] = (*SMALL, *CLUSTER)) -> None:
        self.cluster, self.folder, self.overrides = cluster, folder, overrides
        self.run = RunFolder(folder / "run")
        folder.mkdir(exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        return self.cluster.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def give(self, *words: str) -> Ended:
        done = subprocess.run(
            [*self.cluster.inside, *command(*words)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def words(self, *overrides: str) -> list[str]:
        """The recipe and the run folder of a command, with further overrides."""
        settings = [word for override in (*self.overrides, *overrides) for word in ("-s", override)]
        return ["embedded", "--run-dir", str(self.run.root), *settings]

    def submit(self, *options: str, overrides: tuple[str, ...] = ()) -> dict[str, str]:
        """What became of each stage: `submitted`, `attached`, `done`."""
        ended = self.give("submit", *self.words(*overrides), *options)
        assert ended.code == 0, ended.err[-2000:]
        return {words[0]: words[1] for line in ended.out.splitlines() if (words := line.split())[0] in SPECS}

    def finish(self, stage: str, seconds: float = CHAIN_S) -> None:
        """The job of one stage, to its end."""
        self.submit("--only", stage)
        self.wait_until_over(seconds)
        assert self.state(stage) == "done", everything(self)

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
        wait_for(lambda: not self.cluster.call("squeue", "-h"), f"end of the chain\n{self.run.root}", seconds, poll_s=1.0)

    def attempts(self, stage: str) -> list[Attempt]:
        return read_attempts(JobFolder.of(self.run), stage)


def everything(site: Site) -> str:
    """For an assertion: what a user would look at."""
    logs = [f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(site.run.logs.glob("*-*.log"))]
    return site.give("status", str(site.run.root)).out + "\n".join(logs)


class Result(NamedTuple):
    """What a run has come to, as far as it must not depend on what happened on the way. traces: what was said at each request.
    dataset: the hash of each split's rows, as the manifest vouches for it."""

    ledger: Ledger
    traces: dict[str, dict[str, Any]]
    dataset: dict[str, str]


def result_of(run: RunFolder) -> Result:
    return Result(read_ledger(run), traces_of(run), dataset_of(run))


def traces_of(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Raises AssertionError when a reader would see one twice."""
    found: dict[str, dict[str, Any]] = {}
    for table in read_first_copies(run.traces):
        for row in table.select(["trace_id", *SAID]).to_pylist():
            assert row["trace_id"] not in found, row
            found[row["trace_id"]] = row
    return found


def dataset_of(run: RunFolder) -> dict[str, str]:
    files = json.loads((run.dataset / "manifest.json").read_text())["files"]
    found = {Path(name).parent.name: sha for name, sha in files.items() if name.endswith(".arrow")}
    return {split: found[split] for split in ("train", "validation")}
