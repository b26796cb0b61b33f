"""Slurm's own commands, and what they print."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from configs.errors import TracestillError, UnusableInput

TIMEOUT_S = 60.0
GONE = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "PREEMPTED",
    "NODE_FAIL",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "REVOKED",
)


IMPOSSIBLE = re.compile(
    "PartitionConfig|PartitionTimeLimit|PartitionNodeLimit|BadConstraints|InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed"
    r"|DependencyNeverSatisfied|(QOS|Assoc)Max\w+PerJob\w*"
)
"""Reasons for which a job waits until somebody changes something."""


class SlurmFailed(TracestillError):
    """A command of Slurm's that should have worked; its own words."""


class SlurmAway(SlurmFailed):
    """The controller does not answer: the same command may work later."""


class QueuedJob(NamedTuple):
    """A job that Slurm has not forgotten. job_id: of an element of an array, its own once it has been started; array_id: the id
    that the array was submitted as. address: what commands call this one job: ARRAY_TASK of an element, because the number of one
    element is that of the array, and means all of them. state: Slurm's word. reason: why it is pending. nodes: where it runs.
    name, comment: ours."""

    job_id: int
    array_id: int
    state: str
    reason: str
    nodes: str
    comment: str
    address: str = ""
    name: str = ""

    @property
    def is_alive(self) -> bool:
        return self.state not in GONE

    @property
    def is_waiting(self) -> bool:
        """It has not been started, or not again."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    @property
    def is_impossible(self) -> bool:
        """It waits for what its partition, account or constraint will never give it."""
        return self.is_waiting and IMPOSSIBLE.fullmatch(self.reason) is not None

    @property
    def is_held(self) -> bool:
        """JobHeldUser, JobHeldAdmin, JobHoldMaxRequeue, "launch failed requeued held"."""
        return self.is_waiting and re.search("held|hold", self.reason, re.I) is not None


def call(*words: str) -> str:
    """Standard output of a command of Slurm's.

    Raises:
        UnusableInput: Slurm is not installed here.
        SlurmFailed: the command failed; SlurmAway: because the controller does not answer.
    """
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False, env=_environment(words[0])
        )
    except FileNotFoundError as error:
        raise UnusableInput(f"{words[0]}: not found on this machine; give this command on a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmAway(f"{words[0]}: no answer within {TIMEOUT_S:g} s; is slurmctld up? The same command tries again") from error
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        said = f"{words[0]}: {said.removeprefix(words[0] + ': ')}"
        if "configuration source" in said:  # neither a file of Slurm's nor a controller that hands one out
            raise UnusableInput(f"{said}; give this command on a login node of the cluster, or set SLURM_CONF to its slurm.conf")
        if is_away(said):
            raise SlurmAway(f"{said}; is slurmctld up? The same command tries again")
        raise SlurmFailed(said)
    return done.stdout


_AWAY = re.compile("unable to contact|socket timed out|connection refused|zero bytes", re.IGNORECASE)


def is_away(said: str) -> bool:
    """Words of a command that got no answer from the controller."""
    return _AWAY.search(said) is not None


KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


def _environment(command: str) -> dict[str, str]:
    """Without what a user has set for squeue's tables: SQUEUE_STATES would hide jobs from us. sbatch takes its variables over
    what the script says, and hands a job's own on to the job that it submits: an element of an array would make a server believe
    that it is one."""
    taken = ("SQUEUE_", "SBATCH_", "SLURM_", "SRUN_", "TRACESTILL_") if command == "sbatch" else ("SQUEUE_",)
    return {name: value for name, value in os.environ.items() if name in KEPT or not name.startswith(taken)}


def unread_settings() -> list[str]:
    """Variables by which a user tells sbatch something, and which we keep from it."""
    return sorted(name for name in os.environ if name.startswith("SBATCH_"))


def sbatch(script: str, options: Sequence[str]) -> int:
    """The job's id. script: a path."""
    return int(call("sbatch", "--parsable", *options, script).split(";")[0])


def scancel(*words: str) -> None:
    """A job may have ended since it was looked at; what Slurm says of one must not keep us from the others."""
    try:
        call("scancel", *words)
    except SlurmFailed as error:
        print(error, file=sys.stderr, flush=True)


_FIELDS = "%A|%F|%i|%T|%r|%N|%j|%k"


def queued() -> list[QueuedJob]:
    """All jobs that wait or run, whoever's they are: a run folder may be shared. Elements of an array one by one."""
    found = []
    for line in call("squeue", "--noheader", "--all", "--array", f"--format={_FIELDS}").splitlines():
        parts = line.split("|", 7)
        if len(parts) == 8 and parts[0].isdigit() and parts[1].isdigit():  # a name of somebody else's may hold a bar
            job_id, array_id, address, state, reason, nodes, name, comment = parts
            found.append(QueuedJob(int(job_id), int(array_id), state, reason, nodes, comment.strip(), address, name))
    return found


UNLIMITED = "UNLIMITED"


def time_limits() -> dict[str, str]:
    """MaxTime of each partition in Slurm's words; of the default one also under the empty name. What Slurm does not say is not
    there."""
    found: dict[str, str] = {}
    try:
        shown = call("scontrol", "--oneliner", "show", "partition")
    except SlurmAway:
        raise
    except SlurmFailed:  # a site may keep it to itself
        return found
    for line in shown.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" in fields and "MaxTime" in fields:
            names = [fields["PartitionName"], *([""] if fields.get("Default") == "YES" else [])]
            found.update(dict.fromkeys(names, fields["MaxTime"]))
    return found


def own_address() -> str:
    """Of the job that this runs in, as `QueuedJob.address`."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
