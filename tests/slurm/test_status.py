"""Where a chain stands, from what Slurm says and from what the run folder holds."""

from pathlib import Path

import pytest

from data.store import RunFolder
from slurm.client import QueuedJob
from slurm.status import read_status


def of_train(run: RunFolder, state: str, reason: str) -> tuple[str, str]:
    """The state and the reason that the status gives a stage whose one job Slurm describes so."""
    job = QueuedJob(7, 7, state, reason, "", f"tracestill train {run.root}", "7")
    found = read_status(run, ("train",), [job])
    assert (found.stopped_at is not None) == (found.stages[0].state == "held")
    return found.stages[0].state, found.stages[0].reason


@pytest.mark.parametrize("reason", ["JobHeldAdmin", "JobHeldUser", "JobHoldMaxRequeue", "launch failed requeued held"])
def test_a_job_that_slurm_holds_waits_for_somebody(tmp_path: Path, reason: str) -> None:
    state, why = of_train(RunFolder(tmp_path), "PENDING", reason)
    assert state == "held" and reason in why and "scontrol release 7" in why


@pytest.mark.parametrize("reason", ["Priority", "Resources", "BeginTime", "Dependency", "ReqNodeNotAvail", "None"])
def test_a_job_that_waits_its_turn_is_pending(tmp_path: Path, reason: str) -> None:
    assert of_train(RunFolder(tmp_path), "PENDING", reason) == ("pending", reason.replace("None", ""))
