"""The end of a chain by somebody's wish: what waits is taken out of the queue, what runs commits and ends."""

import time
from collections.abc import Mapping

from data.store import RunFolder, write_bytes
from slurm.attempts import JobFolder
from slurm.chain import POLL_S, SETTLE_S, jobs_of
from slurm.client import QueuedJob, queued, scancel

GRACE_S = 300.0
"""What a stage has for stopping by default (slurm.warning_seconds); who ends sooner is not waited for."""


def cancel_chain(run: RunFolder, *, grace_s: float = GRACE_S) -> Mapping[str, str]:
    """Nothing of the run is queued when this returns: jobs that wait are taken out, those that run are asked to finish their
    step, commit, and end. Returns what became of each stage that had a job."""
    folder = JobFolder.of(run)
    found: dict[str, str] = {}
    alive = jobs_of(run, queued())
    if not alive:
        return found
    folder.root.mkdir(parents=True, exist_ok=True)
    write_bytes(folder.cancelled, b"no job of this run goes back into the queue\n")  # before anybody can end with 75
    for stage, jobs in alive.items():
        for job in jobs:
            if job.is_waiting:
                scancel(job.address)
        found[stage] = "taken out of the queue" if all(job.is_waiting for job in jobs) else "stopped"
    for jobs in alive.values():
        for job in jobs:
            if not job.is_waiting and job.state != "COMPLETING":
                scancel("--signal=USR2", "--batch", job.address)
    if left := _wait_until_gone(run, grace_s):
        for stage, jobs in left.items():
            for job in jobs:
                scancel(job.address)
            found[stage] = f"ended: it had not stopped within {grace_s:g} s"
        _wait_until_gone(run, SETTLE_S)
    return found


def _wait_until_gone(run: RunFolder, seconds: float) -> Mapping[str, list[QueuedJob]]:
    """What is left of the run's jobs after that time, at most. What has come back meanwhile is taken out."""
    deadline = time.monotonic() + seconds
    while (left := jobs_of(run, queued())) and time.monotonic() < deadline:
        for jobs in left.values():
            for job in jobs:
                if job.is_waiting:
                    scancel(job.address)
        time.sleep(POLL_S)
    return left
