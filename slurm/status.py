"""Where the chain of a run stands: from its files, and from Slurm where Slurm answers."""

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from configs.cluster import StageName
from configs.errors import UnusableInput
from data.ledger import Ledger, read_ledger
from data.store import ROLLUP, RunFolder, read_rollup
from slurm.attempts import Attempt, JobFolder, excluded_nodes, lines, read_attempts
from slurm.chain import is_done, jobs_of, what_holds
from slurm.client import QueuedJob
from slurm.progress import progress_of
from slurm.topology import SPECS, TOGETHER

LAST_BYTES = 1 << 14
WOULD_GO_ON = ("hung", "interrupted", "failed", "bad node", "busy", "not begun")
FOR_GOOD = ("refused", "unusable", "stuck")
"""Outcomes after which the job is not queued again."""
ENDED = ("held", "refused", "failed", "interrupted", "cancelled")
STATES = ("done", "running", "pending", "held", "refused", "failed", "interrupted", "cancelled", "not submitted", "never ran")


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One stage. state: of STATES. jobs: those that are queued, else the newest one's id. attempts: starts of its jobs.

    count: the newest of the running attempt, as words. eta_s: seconds until it is done at the speed of this attempt; None: not
    known. reason: why it waits, or why it ended as it did.
    """

    stage: StageName
    state: str
    jobs: tuple[int, ...] = ()
    attempts: int = 0
    nodes: str = ""
    count: str = ""
    progress: str = ""
    seconds: float | None = None
    eta_s: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ChainStatus:
    """stages: in order. asked_slurm: False where Slurm did not answer, so that only files speak. ledger: None before there are
    prompts. excluded: nodes that failed a health check, with the reason."""

    stages: Sequence[StageStatus]
    asked_slurm: bool
    ledger: Ledger | None
    excluded: Mapping[str, str]

    @property
    def stopped_at(self) -> StageStatus | None:
        """The stage that keeps the chain from going on, if one does. After a stage of which one job failed although others made
        its output whole, that is the one which Slurm has taken out of the queue."""
        stopped = next((one for one in self.stages if one.state in ENDED), None)
        return stopped or next((one for one in self.stages if one.state == "never ran" and self.asked_slurm), None)


def read_status(run: RunFolder, stages: Sequence[StageName], known: Sequence[QueuedJob] | None) -> ChainStatus:
    """known: what Slurm has queued; None where it did not answer. Raises UnusableInput for damaged files."""
    folder = JobFolder.of(run)
    alive = jobs_of(run, known or ())
    submitted: dict[str, list[int]] = {}
    for line in lines(folder.jobs, stage=str, job_id=int):
        submitted.setdefault(line["stage"], []).append(line["job_id"])
    found = [_stage_status(run, stage, alive.get(stage, []), submitted.get(stage, []), known is not None) for stage in stages]
    for place, (before, one) in enumerate(itertools.pairwise(found), 1):
        if one.state == "never ran" and before.state == "done" and (said := _failed_job(folder, before.stage)):
            found[place] = replace(one, reason=f"{said}; what {before.stage} makes is whole all the same: submit again")
    try:
        ledger = read_ledger(run)
    except UnusableInput:
        ledger = None
    return ChainStatus(found, known is not None, ledger, excluded_nodes(folder))


def _stage_status(
    run: RunFolder, stage: StageName, jobs: Sequence[QueuedJob], submitted: Sequence[int], asked_slurm: bool
) -> StageStatus:
    folder = JobFolder.of(run)
    attempts = read_attempts(folder, stage)
    last = attempts[-1] if attempts else None
    common: dict[str, Any] = {
        "stage": stage, "attempts": len(attempts), "progress": progress_of(run, stage), "seconds": _seconds(run, stage, attempts),
    }  # fmt: skip
    running = [job for job in jobs if not job.is_waiting]
    if running:
        beats = [beat for job in running if (beat := _beat(folder, stage, job.job_id)) is not None]
        return StageStatus(
            state="running", jobs=tuple(job.job_id for job in jobs), nodes=",".join(dict.fromkeys(job.nodes for job in running)),
            count=_count(beats), eta_s=_eta(beats),
            reason="suspended by Slurm" if all(job.state == "SUSPENDED" for job in running) else "", **common,
        )  # fmt: skip
    if jobs:
        why = (held := what_holds(jobs)) or (jobs[0].reason if jobs[0].reason not in ("None", "") else "")
        ended = f"; last: {last.outcome}: {last.reason}" if last is not None and last.ended and last.outcome != "done" else ""
        state = "held" if held else "pending"
        return StageStatus(state=state, jobs=tuple(job.job_id for job in jobs), reason=f"{why}{ended}", **common)
    if is_done(run, stage) and not _stopped_since(run, stage, last, submitted):
        made_by = [one.job_id for one in attempts if one.outcome == "done"] or submitted
        return StageStatus(state="done", jobs=tuple(made_by[-1:]), **common)
    ids = tuple(submitted[-1:])
    if last is not None and (not ids or last.job_id >= ids[-1] or stage == "serve"):  # others of it may only have waited
        if last.ended is None:
            state, reason = (
                ("interrupted", "its job is gone and has left no word") if asked_slurm else ("running", "by its files")
            )
        else:
            states = {"refused": "refused", "cancelled": "cancelled", "interrupted": "interrupted", "done": "interrupted"}
            gone = "what it made is no longer there" if last.outcome == "done" else ""
            state, reason = states.get(last.outcome, "failed"), last.reason or gone
            if last.outcome in WOULD_GO_ON and folder.cancelled.exists():
                state, reason = "cancelled", f"while it waited to go on; before: {last.outcome}: {reason}"
            elif last.outcome in WOULD_GO_ON and asked_slurm:  # requeueing was refused, or somebody took it out
                said = _last_line(run.logs / f"{stage}-{last.job_id}.log")
                reason += "; its job is not in the queue any more" + (f": {said}" if said and said not in reason else "")
        return StageStatus(state=state, jobs=ids, reason=reason, **common)
    if not ids:
        sealed = SPECS[stage].output is not None and read_rollup(run.root / str(SPECS[stage].output)) is not None
        return StageStatus(state="done" if sealed else "not submitted", **common)
    if not asked_slurm:
        return StageStatus(state="never ran", jobs=ids, reason="Slurm does not answer", **common)
    log = run.logs / f"{stage}-{ids[-1]}.log"
    if said := _last_line(log):  # of its own script, or of Slurm
        return StageStatus(state="failed", jobs=ids, reason=f"it ended before its stage began: {said}; see {log}", **common)
    if folder.cancelled.exists():
        return StageStatus(state="cancelled", jobs=ids, reason="before it began", **common)
    reason = "its job never ran: the stage before it failed, or somebody took it out of the queue"
    return StageStatus(state="never ran", jobs=ids, reason=reason, **common)


def _stopped_since(run: RunFolder, stage: str, last: Attempt | None, submitted: Sequence[int]) -> bool:
    """Whether the newest job has stopped for good, over what an earlier one had made: with other settings, say. Of several jobs
    at one stage each may end so while the output is whole."""
    output = SPECS[stage].output  # type: ignore[index]
    if last is None or last.ended is None or stage in TOGETHER or output is None:
        return False
    if last.outcome not in FOR_GOOD or last.job_id < max(submitted, default=0):
        return False
    return (run.root / output / ROLLUP).stat().st_mtime < last.ended  # else somebody has made it by hand


def _failed_job(folder: JobFolder, stage: str) -> str:
    """Of an array, the element that failed for good: Slurm then lets nothing begin that waits for the array."""
    last = {one.job_id: one for one in read_attempts(folder, stage)}
    failed = next((one for one in last.values() if one.ended and one.outcome not in ("done", "interrupted", "busy")), None)
    return "" if failed is None else f"{stage} job {failed.job_id} was {failed.outcome}: {failed.reason}"


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
            text = file.read().decode(errors="replace")
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    except OSError:
        return ""


def _seconds(run: RunFolder, stage: StageName, attempts: Sequence[Attempt]) -> float | None:
    """In all attempts, or what a finished stage has noted."""
    if attempts:
        now = time.time()
        return sum((one.ended or (now if one is attempts[-1] else one.started)) - one.started for one in attempts)
    output = SPECS[stage].output
    rollup = read_rollup(run.root / output) if output is not None else None
    return rollup.seconds if rollup is not None else None


def _beat(folder: JobFolder, stage: str, job_id: int) -> dict[str, Any] | None:
    return next(lines(folder.beat(stage, job_id), done=int, total=int, unit=str, per_s=int | float), None)


def _count(beats: Sequence[Mapping[str, Any]]) -> str:
    """Jobs of an array count what all of them have done: the furthest one is right."""
    if not beats:
        return ""
    most = max(beats, key=lambda beat: beat["done"])
    note = f", {most['note']}" if most.get("note") else ""
    share = (
        f"{most['done']:,} of {most['total']:,}" if most["total"] else f"{most['done']:,}"
    )  # servers go on as long as they may
    return f"{share} {most['unit']}{note}"


def _eta(beats: Sequence[Mapping[str, Any]]) -> float | None:
    if not beats:
        return None
    most = max(beats, key=lambda beat: beat["done"])
    return (most["total"] - most["done"]) / most["per_s"] if most["per_s"] > 0 and most["total"] else None


# --- for people ---------------------------------------------------------------------------------------------------

_STYLES = {
    "done": "green",
    "running": "bold",
    "held": "red",
    "refused": "red",
    "failed": "red",
    "interrupted": "red",
    "cancelled": "red",
}


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def status_tables(found: ChainStatus) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "state", "job", "attempts", "took", "left", "count"):
        table.add_column(name, no_wrap=name != "count")
    for one in found.stages:
        jobs = f"{one.jobs[0]}" + (f" +{len(one.jobs) - 1}" if len(one.jobs) > 1 else "") if one.jobs else ""
        style = _STYLES.get(one.state, "")
        count = ", ".join(filter(None, [one.count or one.progress, f"on {one.nodes}" if one.nodes else "", one.reason]))
        table.add_row(
            one.stage, f"[{style}]{one.state}[/{style}]" if style else one.state, jobs, str(one.attempts or ""),
            duration(one.seconds), duration(one.eta_s), count.replace("[", "\\["),
        )  # fmt: skip
    parts: list[RenderableType] = [table]
    if found.ledger is not None:
        ledger = found.ledger
        parts.append(
            f"ledger    {ledger.requested:,} requested = {ledger.completed:,} completed + {ledger.failed:,} failed + "
            f"{ledger.pending:,} pending"
        )
    parts += [f"excluded  {node}: {reason}" for node, reason in found.excluded.items()]
    if not found.asked_slurm:
        parts.append("Slurm does not answer here: what its jobs are doing is read from the run folder alone")
    if (stop := found.stopped_at) is not None:
        parts.append(f"stopped   {stop.stage} is {stop.state}: {stop.reason}")
        if stop.state != "held":
            parts.append(
                "          once that is settled, tracestill submit with the same recipe and run folder goes on from there"
            )
    return Group(*parts)


def status_json(found: ChainStatus) -> dict[str, Any]:
    return {
        "stages": [asdict(one) for one in found.stages],
        "asked_slurm": found.asked_slurm,
        "ledger": None if found.ledger is None else asdict(found.ledger),
        "excluded": dict(found.excluded),
    }
