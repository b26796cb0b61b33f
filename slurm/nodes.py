"""Nodes that are not fit for a job: found before anything is loaded on them, and left out of the run from then on."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from configs.errors import UnusableInput
from data.store import RunFolder, write_bytes
from slurm.attempts import JobFolder, append, excluded_nodes
from slurm.chain import jobs_of
from slurm.client import SlurmFailed, call, queued, sbatch

HEALTH_S = 300.0
MAX_TIMES = 5


def unfit_nodes(words: Sequence[str]) -> dict[str, str]:
    """Nodes of this job that slurm.health found something wrong with, or that did not answer it, with what it was."""
    nodes = call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    command = ["srun", f"--nodes={len(nodes)}", "--ntasks-per-node=1", "--kill-on-bad-exit=0",
               sys.executable, "-P", "-m", "slurm.health", *words]  # fmt: skip
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=HEALTH_S, check=False).stdout
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
    found = {}
    for line in said.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            answer = json.loads(line)
            found[answer["node"]] = "; ".join(answer["bad"])
    return {
        node: found.get(node, f"no answer to the health check within {HEALTH_S:g} s") for node in nodes if found.get(node, "?")
    }


class LeftOut(NamedTuple):
    """reason: of every node. is_futile: Slurm has given this job such nodes again and again."""

    reason: str
    is_futile: bool


def leave_out(run: RunFolder, job_id: int, unfit: Mapping[str, str], *, times: int) -> LeftOut:
    """No job of the run gets these nodes from now on; this one is about to be requeued, and goes on without them. times: that it
    has met such nodes before. A running job's list of nodes to leave out cannot be changed, and requeueing ends whoever asks for
    it: a job of a minute does it for this one."""
    folder = JobFolder.of(run)
    reason = "; ".join(f"{node}: {why}" for node, why in sorted(unfit.items()))
    known = excluded_nodes(folder)
    if unfit.keys() <= known.keys() and times >= MAX_TIMES:
        return LeftOut(f"Slurm gives this job nodes that are left out: {reason}", is_futile=True)
    for node in sorted(unfit.keys() - known.keys()):
        append(folder.excluded, {"node": node, "reason": unfit[node], "job_id": job_id, "at": time.time()})
    listed = ",".join(sorted({*known, *unfit}))
    try:
        for jobs in jobs_of(run, queued()).values():
            for job in jobs:
                if job.state == "PENDING":
                    call("scontrol", "update", f"JobId={job.job_id}", f"ExcNodeList={listed}")
        _update_when_queued(folder, run, job_id, listed)
    except (SlurmFailed, UnusableInput) as error:
        print(f"leaving out {listed}: {error}", file=sys.stderr, flush=True)
    return LeftOut(reason, is_futile=False)


def _update_when_queued(folder: JobFolder, run: RunFolder, job_id: int, nodes: str) -> None:
    """Not within the first half second of a requeue: the job would start with a revoked credential (Slurm 22.05)."""
    script = folder.root / f"exclude.{job_id}.sbatch"
    lines = [
        "#!/bin/bash", f"# job {job_id} goes on without {nodes}", "for _ in $(seq 60); do", "    sleep 5",
        f"    scontrol update JobId={job_id} ExcNodeList={nodes} StartTime=now && exit 0", "done", "exit 1", "",
    ]  # fmt: skip
    write_bytes(script, "\n".join(lines).encode())
    same = {"partition": "SLURM_JOB_PARTITION", "account": "SLURM_JOB_ACCOUNT", "qos": "SLURM_JOB_QOS"}
    options = [f"--{option}={os.environ[name]}" for option, name in same.items() if os.environ.get(name)]
    options += ["--ntasks=1", "--time=10", f"--exclude={nodes}", f"--output={run.logs / 'exclude-%j.log'}", "--job-name=exclude"]
    sbatch(str(script), options)
