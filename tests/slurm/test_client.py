"""What is handed to Slurm's commands, and how their words are read."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import Interrupted, UnusableInput
from slurm import nodes
from slurm.client import QueuedJob, SlurmAway, call, sbatch, time_limits
from slurm.nodes import HealthUnknown, unfit_nodes
from slurm.servers import could_start

Programs = Callable[..., None]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Puts shell scripts in the place of commands."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def write(**scripts: str) -> None:
        for name, script in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
            (tmp_path / name).chmod(0o755)

    return write


def test_a_job_is_submitted_as_its_script_says(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a variable of the user's says, nor with what belongs to the job that submits it; which cluster it is stays."""
    programs(sbatch=f"env > {tmp_path}/seen; echo '7;here'", squeue=f"env > {tmp_path}/seen")
    kept = {"SLURM_CONF": "/etc/x.conf", "SLURM_JWT": "token", "SLURM_CLUSTERS": "here", "NCCL_DEBUG": "INFO"}
    taken = {"SBATCH_PARTITION": "debug", "SLURM_ARRAY_JOB_ID": "3", "SRUN_CPUS_PER_TASK": "2", "TRACESTILL_RENDEZVOUS": "n1:1"}
    for name, value in (kept | taken | {"SQUEUE_STATES": "CD"}).items():
        monkeypatch.setenv(name, value)
    assert sbatch("script", []) == 7
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert {name: seen.get(name) for name in kept} == kept and not seen.keys() & (taken.keys() | {"SQUEUE_STATES"})
    call("squeue")
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert seen["SLURM_ARRAY_JOB_ID"] == "3" and "SQUEUE_STATES" not in seen


def test_how_long_a_partition_lets_jobs_run(programs: Programs) -> None:
    programs(
        scontrol="""echo 'PartitionName=main AllocNodes=ALL Default=YES DefaultTime=00:05:00 MaxTime=01:00:00 State=UP'
        echo 'PartitionName=long Default=NO MaxTime=UNLIMITED'"""
    )
    assert time_limits() == {"main": "01:00:00", "": "01:00:00", "long": "UNLIMITED"}
    programs(scontrol="echo 'slurm_load_partitions error: Access/permission denied' >&2; exit 1")
    assert time_limits() == {}
    programs(scontrol="echo 'slurm_load_partitions error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(SlurmAway, match="is slurmctld up"):
        time_limits()


def test_a_machine_that_knows_no_cluster_is_told_what_to_set(programs: Programs) -> None:
    programs(squeue="echo 'squeue: fatal: Could not establish a configuration source' >&2; exit 1")
    with pytest.raises(UnusableInput, match="login node of the cluster, or set SLURM_CONF"):
        call("squeue")


@pytest.mark.parametrize(
    ("state", "reason", "starts"),
    [
        ("RUNNING", "None", True),
        ("PENDING", "Resources", True),
        ("PENDING", "QOSMaxJobsPerUserLimit", True),  # when another ends
        ("PENDING", "Dependency", False),
        ("PENDING", "JobHeldUser", False),
        ("PENDING", "QOSMaxNodePerJobLimit", False),
        ("PENDING", "AssocMaxWallDurationPerJobLimit", False),
        ("PENDING", "PartitionTimeLimit", False),
    ],
)
def test_what_can_start_without_anybodys_help(state: str, reason: str, starts: bool) -> None:
    assert could_start(QueuedJob(7, 7, state, reason, "", "")) is starts


SHOW = 'echo n1; [[ "$SLURM_JOB_NODELIST" == n1 ]] || echo n2'


@pytest.mark.parametrize(
    ("listed", "srun", "found"),
    [
        ("n[1-2]", """echo '{"node": "n1", "bad": []}'; echo '{"node": "n2", "bad": ["slow", "hot"]}'""", {"n2": "slow; hot"}),
        ("n[1-2]", """echo '{"node": "n1", "bad": []}'; sleep 60""", {"n2": "no answer to the health check within 2 s"}),
        ("n1", "sleep 60", {"n1": "no answer to the health check within 2 s"}),
        ("n1", "echo 'srun: error: Unable to contact slurm controller' >&2; sleep 60", HealthUnknown),
        ("n[1-2]", "sleep 60", HealthUnknown),  # all of them at once: no node's fault
        ("n1", "exit 1", HealthUnknown),
        ("n[1-2]", """echo '{"node": "n1", "bad": []}'; exit 143""", Interrupted),
    ],
)
def test_who_is_to_blame_for_a_health_check(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, listed: str, srun: str, found: dict[str, str] | type[Exception]
) -> None:
    programs(scontrol=SHOW, srun=srun.replace("sleep 60", "exec sleep 60"))
    monkeypatch.setenv("SLURM_JOB_NODELIST", listed)
    monkeypatch.setattr(nodes, "HEALTH_S", 2.0)
    if isinstance(found, dict):
        assert unfit_nodes([]) == found
    else:
        with pytest.raises(found):
            unfit_nodes([])
