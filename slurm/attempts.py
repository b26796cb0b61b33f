"""What the jobs of a run have done, in files of the run folder: Slurm forgets a job within minutes of its end, and many a site
keeps no accounts.

    slurm/chain.json                the stages of the newest submission
    slurm/jobs.jsonl                one line a job that was submitted
    slurm/attempts/STAGE.JOB.jsonl  a line when an attempt of a job starts, and one when it ends
    slurm/beats/STAGE.JOB.json      the stage's newest count (configs/progress.py)
    slurm/excluded.jsonl            nodes that failed a health check
    slurm/servers/JOB.url           where a server of the teacher listens; renewed while it answers
    slurm/servers/JOB.idle          nobody has asked it for a while: it ends
    slurm/served.jsonl              a line when a server has answered for the first time
    slurm/servers.closed            nobody is to ask them any more
    slurm/cancelled                 nobody is to requeue anything
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args

from configs.cluster import StageName
from data.store import RunFolder, write_json


@dataclass(frozen=True, slots=True)
class JobFolder:
    """The places of a run's jobs, by name."""

    root: Path

    @classmethod
    def of(cls, run: RunFolder) -> "JobFolder":
        return cls(run.root / "slurm")

    @property
    def jobs(self) -> Path:
        return self.root / "jobs.jsonl"

    @property
    def chain(self) -> Path:
        return self.root / "chain.json"

    @property
    def excluded(self) -> Path:
        return self.root / "excluded.jsonl"

    @property
    def cancelled(self) -> Path:
        return self.root / "cancelled"

    @property
    def servers(self) -> Path:
        return self.root / "servers"

    def server(self, job_id: int) -> Path:
        return self.servers / f"{job_id}.url"

    def idle(self, job_id: int) -> Path:
        """There when nobody asks the server any more: all nodes of its job end."""
        return self.servers / f"{job_id}.idle"

    @property
    def served(self) -> Path:
        return self.root / "served.jsonl"

    @property
    def closed(self) -> Path:
        return self.root / "servers.closed"

    def script(self, stage: str) -> Path:
        return self.root / f"{stage}.sbatch"

    def attempts(self, stage: str, job_id: int) -> Path:
        return self.root / "attempts" / f"{stage}.{job_id}.jsonl"

    def beat(self, stage: str, job_id: int) -> Path:
        return self.root / "beats" / f"{stage}.{job_id}.json"


class Attempt(NamedTuple):
    """One start of a job.

    started, ended: seconds since the epoch; None while it runs, or where it was killed before it could say. before, after: what
    was committed then (slurm/progress.py). code: of the stage's command. outcome: what came of it.
    """

    stage: str
    job_id: int
    restart: int
    nodes: str
    started: float
    before: str
    ended: float | None = None
    after: str = ""
    code: int | None = None
    outcome: str = ""
    reason: str = ""


def append(path: Path, values: Mapping[str, Any]) -> None:
    """One line, on disk when this returns. Two processes may append: a line is one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(values, sort_keys=True) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lines(path: Path, **keys: type | UnionType) -> Iterator[dict[str, Any]]:
    """Whole lines of a file of `append` that have these keys, of these types; none where it is not there. A line that a full disk
    has cut is passed over."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in keys.items()):
                yield found


def begin(folder: JobFolder, stage: str, job_id: int, restart: int, nodes: str, before: str) -> None:
    append(
        folder.attempts(stage, job_id),
        {"event": "start", "restart": restart, "nodes": nodes, "at": time.time(), "progress": before, "pid": os.getpid()},
    )


def end(folder: JobFolder, stage: str, job_id: int, *, after: str, code: int, outcome: str, reason: str) -> None:
    append(
        folder.attempts(stage, job_id),
        {"event": "end", "at": time.time(), "progress": after, "code": code, "outcome": outcome, "reason": reason,
         "pid": os.getpid()},
    )  # fmt: skip


def read_attempts(folder: JobFolder, stage: str) -> list[Attempt]:
    """Of all jobs of the stage, by their start, as far as the clocks of their nodes agree."""
    jobs = (path.name.split(".")[1] for path in (folder.root / "attempts").glob(f"{stage}.*.jsonl"))
    found = [one for job in jobs if job.isdigit() for one in attempts_of(folder, stage, int(job))]
    return sorted(found, key=lambda one: one.started)


def attempts_of(folder: JobFolder, stage: str, job_id: int) -> list[Attempt]:
    """Of one job, oldest first. Two that a confused controller launched at once are two: an end belongs to the start of the same
    process."""
    found: list[Attempt] = []
    begun: dict[int, int] = {}
    for line in lines(folder.attempts(stage, job_id), event=str, pid=int, at=int | float, progress=str):
        if line["event"] == "start":
            begun[line["pid"]] = len(found)
            found.append(Attempt(stage, job_id, line.get("restart", 0), str(line.get("nodes", "")), line["at"], line["progress"]))
        elif (place := begun.get(line["pid"])) is not None:
            found[place] = found[place]._replace(
                ended=line["at"], after=line["progress"], code=line.get("code"), outcome=str(line.get("outcome", "")),
                reason=str(line.get("reason", "")),
            )  # fmt: skip
    return found


def excluded_nodes(folder: JobFolder) -> dict[str, str]:
    """Nodes that failed a health check of this run, with what was wrong."""
    return {line["node"]: line["reason"] for line in lines(folder.excluded, node=str, reason=str)}


def note_stages(folder: JobFolder, stages: Sequence[StageName]) -> None:
    write_json(folder.chain, {"stages": list(stages)})


def read_stages(folder: JobFolder) -> tuple[StageName, ...]:
    """Empty where nothing was submitted, or the file says nothing of use: submit writes it anew."""
    try:
        found = json.loads(folder.chain.read_text())["stages"]
        return tuple(stage for stage in found if stage in get_args(StageName))
    except (OSError, ValueError, TypeError, KeyError):
        return ()
