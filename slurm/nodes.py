"""Nodes that are not fit for a job: found before anything is loaded on them, and left out of the run from then on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from configs.errors import Interrupted, TracestillError, UnusableInput
from data.store import RunFolder, write_bytes
from slurm.attempts import JobFolder, append, excluded_nodes
from slurm.chain import jobs_of
from slurm.client import SlurmFailed, call, is_away, own_address, queued, sbatch, scancel

HEALTH_S = 300.0
MAX_TIMES = 5
HELPER_S, LOOK_S = 900.0, 3.0
"""On a full cluster the small job waits for a core: a job that goes back before it is at work gets the same node again."""
EXCLUDE = "exclude"


class HealthUnknown(TracestillError):
    """That is no node's fault."""


def unfit_nodes(words: Sequence[str]) -> dict[str, str]:
    """Nodes of this job that slurm.health found something wrong with, or that did not answer it, with what it was.

    Raises:
        HealthUnknown: no answer at all, or none of several nodes has answered in time: that is the controller's fault, or the
            network's, and condemning them would leave the run without nodes.
        Interrupted: Slurm has ended the check.
    """
    nodes = call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    command = ["srun", f"--nodes={len(nodes)}", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0",
               sys.executable, "-P", "-m", "slurm.health", *words]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=HEALTH_S, check=False)
        said, wrong, within, code = done.stdout, done.stderr, "", done.returncode
    except subprocess.TimeoutExpired as error:
        said, wrong = (
            one.decode(errors="replace") if isinstance(one, bytes) else one or "" for one in (error.stdout, error.stderr)
        )
        within, code = f" within {HEALTH_S:g} s", 0
    found = {}
    for line in said.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            answer = json.loads(line)
            found[answer["node"]] = "; ".join(answer["bad"])
    last = next((line for line in reversed(wrong.splitlines()) if line.strip()), "")
    silence = f"no answer to the health check{within}" + (f": {last.strip()}" if last else "")
    if code == 128 + signal.SIGTERM and len(found) < len(nodes):
        raise Interrupted("SIGTERM")
    if not found and (not within or len(nodes) > 1 or is_away(wrong)):
        raise HealthUnknown(silence)
    return {node: found.get(node, silence) for node in nodes if found.get(node, "?")}


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
    if times >= MAX_TIMES:  # or the check asks for what no node here has
        return LeftOut(f"{times + 1} attempts have met unfit nodes; this one {reason}", is_futile=True)
    for node in sorted(unfit.keys() - known.keys()):
        append(folder.excluded, {"node": node, "reason": unfit[node], "job_id": job_id, "at": time.time()})
    listed = ",".join(sorted({*known, *unfit}))
    with _said(listed):
        jobs = jobs_of(run, queued())
        for job in jobs.pop(f"{EXCLUDE}.{own_address()}", []):  # it knows fewer nodes
            scancel(job.address)
        jobs.pop("report", None)  # whatever node is left makes it
        for job in [job for waiting in jobs.values() for job in waiting if job.state == "PENDING"]:
            with _said(listed):  # it may have started meanwhile
                call("scontrol", "update", f"JobId={job.address}", f"ExcNodeList={_with_those_of(job.address, listed)}")
    with _said(listed):
        helper = _update_when_queued(folder, run, own_address(), _with_those_of(own_address(), listed))
        deadline = time.monotonic() + HELPER_S
        while any(job.job_id == helper and job.is_waiting for job in queued()) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
    return LeftOut(reason, is_futile=False)


@contextlib.contextmanager
def _said(listed: str) -> Iterator[None]:
    try:
        yield
    except (SlurmFailed, UnusableInput) as error:
        print(f"leaving out {listed}: {error}", file=sys.stderr, flush=True)


def _with_those_of(job: str, listed: str) -> str:
    """And the nodes that the job leaves out already, by its site's wish: an update replaces them."""
    already = _fields_of(job).get("ExcNodeList", "(null)")
    return listed if already == "(null)" else f"{already},{listed}"


def _update_when_queued(folder: JobFolder, run: RunFolder, job: str, nodes: str) -> int:
    """The small job's id. It waits out the first half second of a requeue: a job that is let go then starts with a revoked
    credential (Slurm 22.05)."""
    script = folder.root / f"exclude.{job}.sbatch"
    lines = [
        "#!/bin/bash", f"# job {job} goes on without {nodes}", "for _ in $(seq 60); do", "    sleep 5",
        f"    scontrol update JobId={job} ExcNodeList={nodes} StartTime=now && exit 0", "done", "exit 1", "",
    ]  # fmt: skip
    write_bytes(script, "\n".join(lines).encode())
    options = ["--ntasks=1", "--time=10", f"--exclude={nodes}", f"--output={run.logs / 'exclude-%j.log'}", "--job-name=exclude"]
    options += [f"--comment=tracestill {EXCLUDE}.{job} {run.root}", *_where_it_runs(job)]
    try:
        return sbatch(str(script), options)
    except SlurmFailed:  # a partition of GPUs alone lets nobody in who asks for none
        return sbatch(str(script), [*options, "--gres=gpu:1"])


def _where_it_runs(job: str) -> list[str]:
    """What a small job says to get onto the same kind of node."""
    fields = _fields_of(job)
    same = {"partition": "Partition", "account": "Account", "qos": "QOS", "constraint": "Features", "reservation": "Reservation"}
    return [f"--{option}={fields[name]}" for option, name in same.items() if fields.get(name, "") not in ("", "(null)", "N/A")]


def _fields_of(job: str) -> dict[str, str]:
    """Of what scontrol shows of a job."""
    return dict(word.split("=", 1) for word in call("scontrol", "--oneliner", "show", "job", job).split() if "=" in word)
