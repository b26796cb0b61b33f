"""Servers of the teacher that are jobs of the run: waited for, and closed when nobody asks them any more."""

import sys
import time

from configs.errors import UnusableInput
from data.stage import exclusive
from data.store import RunFolder, write_bytes
from slurm.attempts import JobFolder, append, read_attempts
from slurm.chain import jobs_of
from slurm.client import QueuedJob, SlurmFailed, queued, sbatch, scancel
from slurm.topology import ASKING

LOOK_S = 2.0
ASK_SLURM_S = 30.0


def wait_for_server(run: RunFolder) -> str:
    """Returns when a server has registered: "", or why none ever will."""
    folder, asked = JobFolder.of(run), time.monotonic()  # jobs that begin together are not all known to have begun at once
    while not any(folder.servers.glob("*.url")):
        if time.monotonic() - asked > ASK_SLURM_S:
            asked = time.monotonic()
            try:
                there = jobs_of(run, queued()).get("serve", [])  # those of a later stage wait for it
                if not any(could_start(job) for job in there) and not _called_back(run):
                    return f"no server has registered in {folder.servers}, and no job is left that could: see the logs of serve"
            except (SlurmFailed, UnusableInput) as error:
                print(f"waiting for a server: {error}", file=sys.stderr, flush=True)
        time.sleep(LOOK_S)
    return ""


def _called_back(run: RunFolder) -> bool:
    """Servers that ended because nobody asked are started once more, as they were; those that failed are not. One of several
    that miss them does it, and not while a user submits or cancels."""
    folder = JobFolder.of(run)
    with exclusive(run, "submit", waits=True):
        if any(could_start(job) for job in jobs_of(run, queued()).get("serve", [])):
            return True
        ended = [one.outcome for one in read_attempts(folder, "serve")]
        if not ended or ended[-1] != "done" or folder.closed.exists() or folder.cancelled.exists():
            return False
        job_id = sbatch(str(folder.script("serve")), [])
        append(folder.jobs, {"stage": "serve", "job_id": job_id, "array": None, "at": time.time(), "options": []})
        return True


def is_asked(run: RunFolder) -> bool:
    """Whether a job of the run asks the teacher, or waits for nothing but its turn. True where Slurm does not answer."""
    try:
        jobs = jobs_of(run, queued())
    except (SlurmFailed, UnusableInput):
        return True
    return any(could_start(job) for stage in ASKING for job in jobs.get(stage, []))


def could_start(job: QueuedJob) -> bool:
    """It has, or waits for nothing but its turn."""
    return not job.is_waiting or not (job.is_held or job.is_impossible or job.reason.startswith("Dependency"))


def close_servers(run: RunFolder) -> None:
    """Their jobs end and do not come back. What Slurm does not hear is said, and ends with the jobs' time limit."""
    folder = JobFolder.of(run)
    write_bytes(folder.closed, b"the teacher is asked nothing more\n")  # before a job can end with 75
    try:
        for job in jobs_of(run, queued()).get("serve", []):
            scancel(job.address)
    except (SlurmFailed, UnusableInput) as error:
        print(f"servers are not closed: {error}", file=sys.stderr, flush=True)
