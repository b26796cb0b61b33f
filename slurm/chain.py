"""The chain of a run on the cluster: submitted, and attached to.

A job is known as this run's by its comment, which Slurm keeps; so whoever was killed between sbatch and the note of it, or finds
jobs of a colleague at the same folder, attaches to them. What needs no job: stages whose output is sealed for these settings,
and that nothing before them is about to make anew. A stage that judges (headroom, canary, evaluate) is done only where its last
attempt says so: its output is whole when it refuses.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from configs.cluster import Job, StageName, seconds_of
from configs.errors import Refused, UnusableInput
from data.store import RunFolder, read_rollup, write_bytes
from slurm.attempts import JobFolder, append, excluded_nodes, lines, note_stages, read_attempts
from slurm.client import (
    UNLIMITED,
    QueuedJob,
    SlurmAway,
    SlurmFailed,
    call,
    queued,
    sbatch,
    scancel,
    time_limits,
    unread_settings,
)
from slurm.scripts import Chain, array_of, dependency_kind, jobs_in, render_scripts
from slurm.topology import ASKING, SPECS, previous_of, stage_shape

SETTLE_S = 120.0
POLL_S = 3.0
NOT_NOW = (
    "Requested node configuration is not available", "Required node not available (down, drained or reserved)",
    "Requested partition configuration not available now",
)  # fmt: skip
"""What sbatch --test-only says of what is drained, down or reserved at the moment too, for which a job would wait. The first was
seen (22.05); the others are Slurm's own words for it (slurm_strerror)."""


class Placed(NamedTuple):
    """A stage of the chain. job_id: of its job; None where none is needed. note: what a user would not expect."""

    stage: StageName
    how: Literal["done", "attached", "submitted", "left out"]
    job_id: int | None = None
    note: str = ""


def jobs_of(run: RunFolder, known: Sequence[QueuedJob]) -> dict[str, list[QueuedJob]]:
    """This run's jobs among those that Slurm knows, by stage; elements of an array one by one. Where a site's plugin has put
    something of its own into the comment: by the number that was noted, and the name."""
    noted = {line["job_id"]: line["stage"] for line in lines(JobFolder.of(run).jobs, stage=str, job_id=int)}
    found: dict[str, list[QueuedJob]] = {}
    for job in known:
        words = job.comment.split(" ", 2)
        stage = words[1] if len(words) == 3 and words[0] == "tracestill" and words[2] == str(run.root) else None
        if stage is None and words[0] != "tracestill" and job.name.endswith(f"-{noted.get(job.array_id)}"):
            stage = noted[job.array_id]
        if stage is not None and job.is_alive:
            found.setdefault(stage, []).append(job)
    return found


def settled_jobs_of(run: RunFolder) -> dict[str, list[QueuedJob]]:
    """Likewise, once none of them is on its way out: what is COMPLETING is back in the queue a moment later, or gone, and
    whatever waits for it then goes too."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        found = jobs_of(run, queued())
        if not any(job.state == "COMPLETING" for jobs in found.values() for job in jobs):
            return found
        if time.monotonic() > deadline:
            raise SlurmFailed(f"submit: jobs of this run are still ending after {SETTLE_S:g} s; the same command tries again")
        time.sleep(POLL_S)


def what_holds(jobs: Sequence[QueuedJob]) -> str:
    """Jobs that nobody but a person sets going, and how; empty when there are none. Slurm itself holds what it could not launch,
    or has requeued too often."""
    if impossible := next((job for job in jobs if job.is_impossible), None):
        return f"{impossible.reason}: it will not start as it was asked for; change that in slurm, and submit again"
    stopped = [job for job in jobs if job.is_held]
    if not stopped:
        return ""
    return f"held ({stopped[0].reason}); let it go with: scontrol release {' '.join(job.address for job in stopped)}"


def check_size(chain: Chain, stages: Sequence[StageName]) -> None:
    """Raises Refused when a stage needs more nodes than it may have."""
    if chain.max_nodes is None:
        return
    for stage in stages:
        nodes = stage_shape(chain.recipe, stage).nodes
        if stage in ASKING and "serve" in chain.stages:
            nodes += stage_shape(chain.recipe, "serve").nodes
        if nodes > chain.max_nodes:
            key = "train.nodes" if stage == "train" else "teacher.hardware.nodes"
            raise Refused(f"--max-nodes {chain.max_nodes}: {stage} needs {nodes} nodes at once; raise it, or lower {key}")


def chosen_stages(chain: Chain, first: str | None, only: str | None) -> tuple[StageName, ...]:
    """Raises UnusableInput when a stage is named that the recipe has not."""
    stages = chain.stages
    for option, name in (("--from", first), ("--only", only)):
        if name is not None and name not in stages:
            raise UnusableInput(f"{option} {name}: no stage of this recipe; expected one of {', '.join(stages)}")
    if first is not None and only is not None:
        raise UnusableInput("--from and --only: expected one of them")
    if only is not None:
        return tuple(stage for stage in stages if stage == only)
    return stages if first is None else stages[stages.index(first) :]  # type: ignore[arg-type]


def submit_chain(
    chain: Chain,
    *,
    first: str | None = None,
    only: str | None = None,
    is_current: Callable[[StageName], bool] = lambda stage: True,
) -> list[Placed]:
    """Every chosen stage is done or has a job, each after the one before it. first, only: stages that are asked for by name are
    submitted although their output is there (a finished one is passed over by its job, in seconds). is_current: whether what a
    finished stage has made is what these settings make.

    Raises:
        UnusableInput: a stage that is not there, an input that nobody makes; no Slurm here.
        UnusableInput: besides, when sbatch refuses a job: those that this call has submitted are taken out again.
        SlurmAway: the controller has gone in between: those before it stay, and the same command attaches to them.
    """
    run, folder = chain.run, JobFolder.of(chain.run)
    chosen = chosen_stages(chain, first, only)
    alive = settled_jobs_of(run)
    scripts: dict[StageName, str] = {script.stage: script.text for script in render_scripts(chain)}
    run.logs.mkdir(parents=True, exist_ok=True)
    folder.root.mkdir(parents=True, exist_ok=True)
    submission = _Submission(chain, scripts, alive)
    limits = time_limits()
    for stage, text in scripts.items():
        if (stage in chosen or stage in alive or stage == "serve") and stage not in submission.at_work:
            said = _refuse_what_slurm_would(folder, stage, text)
            submission.doubts[stage] = said or _beyond_the_partition(chain.slurm.job(stage), limits)
    folder.cancelled.unlink(missing_ok=True)
    note_stages(folder, chain.stages)
    try:
        submission.place_stages(chosen, is_current if first is None and only is None else None)
        if "serve" in chain.stages:
            submission.place_servers()
    except UnusableInput:
        submission.take_back()
        raise
    return submission.placed


class _Submission:
    """One call of submit. alive: the run's jobs that Slurm has, by stage. differs: stages whose script is another than the one
    that stands in the run folder. at_work: stages of which a job has begun. changed: something was submitted by now, so that jobs
    of before wait for what is not there any more. broken: arrays of which an element is gone, so that nobody may wait for all.
    doubts: why a job that Slurm takes may never start, by stage."""

    def __init__(self, chain: Chain, scripts: Mapping[StageName, str], alive: Mapping[str, Sequence[QueuedJob]]) -> None:
        self.chain, self.folder, self.scripts, self.alive = chain, JobFolder.of(chain.run), scripts, alive
        self.differs = {
            stage: _without_nodes(_text_of(self.folder.script(stage))) != _without_nodes(text) for stage, text in scripts.items()
        }
        self.at_work = {stage for stage, jobs in alive.items() if not all(job.is_waiting for job in jobs)}
        self.noted = {line["job_id"]: line.get("options", ()) for line in lines(self.folder.jobs, job_id=int)}
        self.placed: list[Placed] = []
        self.changed = False
        self.broken: set[int] = set()
        self.doubts: dict[StageName, str] = {}

    def place_stages(self, chosen: Sequence[StageName], is_current: Callable[[StageName], bool] | None) -> None:
        """All but servers, each after the one before it. is_current: None where stages are asked for by name."""
        before: int | None = None
        fresh = False  # something earlier is being made
        for stage in self.chain.stages:
            if stage == "serve":
                continue
            jobs = self.alive.get(stage, [])
            is_other = self.changed or self.differs[stage] or self._waits_in_vain(jobs, before)
            is_stale = bool(jobs) and is_other and stage not in self.at_work
            if is_stale:
                self._require_no_reader(stage)
                for job in jobs:
                    scancel(job.address)
            elif jobs and not (stage == "report" and self.changed):  # a report that is being written is of what was
                before, fresh = jobs[0].array_id, True
                self._attach(stage, jobs)
                continue
            if stage not in chosen and not is_stale:
                self.placed.append(Placed(stage, "left out"))
                continue
            note = ""
            if not fresh and is_current is not None and is_done(self.chain.run, stage):
                if is_current(stage):
                    self.placed.append(Placed(stage, "done"))
                    continue
                note = "what it made was made with other settings"
            self._require_no_reader(stage)
            _require_input(self.chain, stage, self.placed)
            before, fresh, self.changed = self._submit(stage, before), True, True
            note = "in the place of one that waited" if is_stale else note
            self.placed.append(Placed(stage, "submitted", before, note or self.doubts.get(stage, "")))

    def place_servers(self) -> None:
        """Beside the stages that ask them: they wait for what comes before the first of those, and nobody waits for them. While
        the student is trained there are none, so evaluation has its own."""
        jobs, servers = {one.stage: one.job_id for one in self.placed}, self.alive.get("serve", [])
        if self.changed or self.differs["serve"]:  # what they wait for may be one of the jobs that were replaced
            for job in [job for job in servers if job.is_waiting]:
                scancel(job.address)
            servers = [job for job in servers if not job.is_waiting]
        there = list(dict.fromkeys(job.array_id for job in servers))
        for group in (ASKING[:-1], ASKING[-1:]):
            first: StageName | None = next((stage for stage in group if jobs.get(stage) is not None), None)
            if first is None:
                continue
            if there:
                self.placed.append(Placed("serve", "attached", there.pop(0)))
                continue
            self.folder.closed.unlink(missing_ok=True)
            self.folder.servers.mkdir(parents=True, exist_ok=True)
            before = previous_of(self.chain.stages, first)
            self.placed.append(Placed("serve", "submitted", self._submit("serve", None if before is None else jobs.get(before))))

    def take_back(self) -> None:
        """What this call has submitted."""
        for one in reversed(self.placed):
            if one.how == "submitted":
                scancel(str(one.job_id))

    def _require_no_reader(self, stage: StageName) -> None:
        """Raises UnusableInput when a later stage is at work on what this one is to make anew: its output would be of what is not
        there any more, and pass for new."""
        later = self.chain.stages[self.chain.stages.index(stage) + 1 :]
        reader = next((one for one in later if one in self.at_work and one not in ("serve", "report")), None)
        if reader is not None:
            raise UnusableInput(
                f"submit: {stage} is to be made anew, and {reader} (job {self.alive[reader][0].array_id}) is at work on what "
                f"there is; wait for its end or give tracestill cancel {self.chain.run.root}, then the same command"
            )

    def _waits_in_vain(self, jobs: Sequence[QueuedJob], before: int | None) -> bool:
        """For the success of an array that has lost a job: Slurm takes them out of the queue when the array ends."""
        return before in self.broken and any(f"afterany:{before}" not in str(self.noted.get(job.array_id)) for job in jobs)

    def _attach(self, stage: StageName, jobs: Sequence[QueuedJob]) -> None:
        job_id = jobs[0].array_id
        if job_id not in self.noted:
            self._note(stage, job_id)
        other = "at work with the settings that it was submitted with" if self.differs[stage] else ""
        if stage != "serve" and (gone := _gone_elements(self.folder, stage, jobs)):
            self.broken.add(job_id)
            other = f"{gone} of its jobs ended without finishing; the others go on"
        self.placed.append(Placed(stage, "attached", job_id, what_holds(jobs) or other))

    def _submit(self, stage: StageName, before: int | None) -> int:
        """The job's id. before: the job that it waits for."""
        write_bytes(self.folder.script(stage), self.scripts[stage].encode())
        kind = "afterany" if before in self.broken else dependency_kind(stage)  # its job looks for the input's manifest
        options = [] if before is None else [f"--dependency={kind}:{before}", "--kill-on-invalid-dep=yes"]
        try:
            job_id = sbatch(str(self.folder.script(stage)), options)
        except SlurmAway:
            raise
        except SlurmFailed as error:
            raise _refused(stage, error, self.folder) from error
        self._note(stage, job_id, options=options)
        return job_id

    def _note(self, stage: StageName, job_id: int, **more: Sequence[str]) -> None:
        array = array_of(self.chain, stage)
        append(self.folder.jobs, {"stage": stage, "job_id": job_id, "array": array, "at": time.time(), **more})


def _gone_elements(folder: JobFolder, stage: StageName, jobs: Sequence[QueuedJob]) -> int:
    """How many of an array's jobs are neither queued nor done: Slurm then starts nothing that waits for all of them."""
    array_id = jobs[0].array_id
    array = next((line["array"] for line in lines(folder.jobs, job_id=int, array=str) if line["job_id"] == array_id), "0-0")
    alive = {job.job_id for job in jobs}
    last = {one.job_id: one for one in read_attempts(folder, stage) if one.job_id >= array_id}
    done = sum(one.outcome == "done" and job_id not in alive for job_id, one in last.items())
    return max(0, jobs_in(array) - len(jobs) - done)


def _text_of(script: Path) -> str:
    try:
        return script.read_text()
    except OSError:
        return ""


def _without_nodes(text: str) -> str:
    """Nodes that fail a health check change no result."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("#SBATCH --exclude="))


def _beyond_the_partition(job: Job, limits: Mapping[str, str]) -> str:
    """A time limit that no partition of the job's grants: most sites take such a job and never start it, and a job that waits for
    another does not show it. Not refused: a QOS may allow it."""
    names = (job.partition or "").split(",")
    longest = [math.inf if limits.get(name, UNLIMITED) == UNLIMITED else seconds_of(limits[name]) for name in names]
    asked = math.inf if job.time_limit is not None and seconds_of(job.time_limit) == 0 else seconds_of(job.time_limit or "0")
    if asked <= max(longest):
        return ""
    where = f"partition {job.partition}" if job.partition else "the default partition"
    return f"may never start: time_limit {job.time_limit}, and {where} grants {', '.join(limits[name] for name in names)}"


def _refuse_what_slurm_would(folder: JobFolder, stage: StageName, text: str) -> str:
    """What Slurm says of a job that it takes and has no nodes for; empty when it says nothing. Raises UnusableInput before the
    first job is in the queue, and not between two of them."""
    script = folder.script(f".{stage}")  # what is in the queue stands in the other
    write_bytes(script, text.encode())
    try:
        call("sbatch", "--test-only", str(script))
    except SlurmAway:
        raise
    except SlurmFailed as error:
        if not any(words in str(error) for words in NOT_NOW):
            raise _refused(stage, error, folder) from error
        return f"no node for it now, or ever: {' '.join(str(error).split())}"
    finally:
        script.unlink(missing_ok=True)
    return ""


def _refused(stage: StageName, error: SlurmFailed, folder: JobFolder) -> UnusableInput:
    """One line for what Slurm says of a stage's script."""
    left_out = excluded_nodes(folder)
    without = f"; {', '.join(sorted(left_out))} failed a health check: delete {folder.excluded} if they are mended"
    unread = ", ".join(unread_settings())
    return UnusableInput(
        f"slurm, or slurm.stages.{stage}: {error}; nothing is submitted; tracestill submit --dry-run shows what was asked for"
        + (without if left_out else "")
        + (f"; of the environment {unread} is not read: say it in the site's YAML" if unread else "")
    )


def is_done(run: RunFolder, stage: StageName) -> bool:
    """Whether a job of this stage would have nothing to do, as far as its files tell."""
    spec = SPECS[stage]
    sealed = spec.output is not None and read_rollup(run.root / spec.output) is not None
    if spec.output is not None and not spec.judges:
        return sealed
    last = next((one for one in reversed(read_attempts(JobFolder.of(run), stage)) if one.ended is not None), None)
    return last is not None and last.outcome == "done" and (sealed or spec.output is None)


def _require_input(chain: Chain, stage: StageName, placed: Sequence[Placed]) -> None:
    """Its input is there, or a job before it makes it."""
    folder = SPECS[stage].input
    if folder is None or read_rollup(chain.run.root / folder) is not None:
        return
    if not any(one.job_id is not None and SPECS[one.stage].output == folder for one in placed):
        raise UnusableInput(
            f"submit: {stage} reads {chain.run.root / folder}, which is not finished, and no job makes it; "
            "leave out --only, or name an earlier stage with --from"
        )
