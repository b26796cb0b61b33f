"""The chain of a run on the cluster: submitted, attached to, and stopped.

A job is known as this run's by its comment, which Slurm keeps; so whoever was killed between sbatch and the note of it, or finds
jobs of a colleague at the same folder, attaches to them. What needs no job: stages whose output is sealed for these settings,
and that nothing before them is about to make anew. A stage that judges (headroom, canary, evaluate) is done only where its last
attempt says so: its output is whole when it refuses.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from configs.cluster import StageName
from configs.errors import Refused, UnusableInput
from data.store import RunFolder, read_rollup, write_bytes
from slurm.attempts import JobFolder, append, lines, note_stages, read_attempts
from slurm.client import QueuedJob, call, queued, sbatch
from slurm.scripts import Chain, array_of, dependency_kind, render_scripts
from slurm.topology import ASKING, SPECS, previous_of, stage_shape

GRACE_S = 60.0
POLL_S = 0.5


class Placed(NamedTuple):
    """A stage of the chain. job_id: of its job; None where none is needed. note: what a user would not expect."""

    stage: StageName
    how: Literal["done", "attached", "submitted", "left out"]
    job_id: int | None = None
    note: str = ""


def jobs_of(run: RunFolder, known: Sequence[QueuedJob]) -> dict[str, list[QueuedJob]]:
    """This run's jobs among those that Slurm knows, by stage; elements of an array one by one."""
    found: dict[str, list[QueuedJob]] = {}
    for job in known:
        words = job.comment.split(" ", 2)
        if len(words) == 3 and words[0] == "tracestill" and words[2] == str(run.root) and job.is_alive:
            found.setdefault(words[1], []).append(job)
    return found


def how_to_release(jobs: Sequence[QueuedJob]) -> str:
    """Of jobs that nobody but an operator sets going again; empty when there are none. Slurm itself holds what it could not
    launch, or has requeued too often."""
    stopped = [job for job in jobs if job.is_held]
    if not stopped:
        return ""
    return f"held ({stopped[0].reason}); let it go with: scontrol release {' '.join(str(job.job_id) for job in stopped)}"


def check_size(chain: Chain, stages: Sequence[StageName]) -> None:
    """Raises Refused when a stage needs more nodes than it may have."""
    if chain.max_nodes is None:
        return
    for stage in stages:
        if (nodes := stage_shape(chain.recipe, stage).nodes) > chain.max_nodes:
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
        SlurmFailed: sbatch refuses a job: those before it stay, and the same command attaches to them.
    """
    run, folder, stages = chain.run, JobFolder.of(chain.run), chain.stages
    chosen = chosen_stages(chain, first, only)
    alive = jobs_of(run, queued())
    folder.cancelled.unlink(missing_ok=True)
    scripts = {script.stage: script.text for script in render_scripts(chain)}
    run.logs.mkdir(parents=True, exist_ok=True)
    folder.root.mkdir(parents=True, exist_ok=True)
    note_stages(folder, stages)
    noted = {line["job_id"] for line in lines(folder.jobs)}
    placed: list[Placed] = []
    before: int | None = None
    fresh = False  # something earlier is being made
    for stage in stages:
        if stage == "serve":
            continue
        if jobs := alive.get(stage):
            before, fresh = jobs[0].array_id, True
            if before not in noted:
                append(folder.jobs, {"stage": stage, "job_id": before, "array": array_of(chain, stage), "at": time.time()})
            placed.append(Placed(stage, "attached", before, how_to_release(jobs)))
            continue
        if stage not in chosen:
            placed.append(Placed(stage, "left out"))
            continue
        note = ""
        if not fresh and first is None and only is None and is_done(run, stage):
            if is_current(stage):
                placed.append(Placed(stage, "done"))
                continue
            note = "what it made was made with other settings"
        _require_input(chain, stage, before)
        before, fresh = _submit(chain, stage, scripts[stage], before), True
        placed.append(Placed(stage, "submitted", before, note))
    if "serve" in stages and any(one.stage in ASKING and one.job_id is not None for one in placed):
        placed.append(_place_servers(chain, scripts["serve"], alive.get("serve", []), placed))
    return placed


def _submit(chain: Chain, stage: StageName, text: str, before: int | None) -> int:
    """The job's id. before: the job that it waits for."""
    folder = JobFolder.of(chain.run)
    script = folder.script(stage)
    write_bytes(script, text.encode())
    options = [] if before is None else [f"--dependency={dependency_kind(stage)}:{before}", "--kill-on-invalid-dep=yes"]
    job_id = sbatch(str(script), options)
    append(
        folder.jobs,
        {"stage": stage, "job_id": job_id, "array": array_of(chain, stage), "at": time.time(), "options": options},
    )
    return job_id


def _place_servers(chain: Chain, text: str, alive: Sequence[QueuedJob], placed: Sequence[Placed]) -> Placed:
    """Servers beside the stages that ask them: they wait for what comes before the first of those, and nobody waits for them."""
    if alive:
        return Placed("serve", "attached", alive[0].array_id)
    folder, jobs = JobFolder.of(chain.run), {one.stage: one.job_id for one in placed}
    folder.closed.unlink(missing_ok=True)
    folder.servers.mkdir(parents=True, exist_ok=True)
    before = previous_of(chain.stages, "serve")
    return Placed("serve", "submitted", _submit(chain, "serve", text, None if before is None else jobs.get(before)))


def is_done(run: RunFolder, stage: StageName) -> bool:
    """Whether a job of this stage would have nothing to do, as far as its files tell."""
    spec = SPECS[stage]
    sealed = spec.output is not None and read_rollup(run.root / spec.output) is not None
    if spec.output is not None and not spec.judges:
        return sealed
    last = next((one for one in reversed(read_attempts(JobFolder.of(run), stage)) if one.ended is not None), None)
    return last is not None and last.outcome == "done" and (sealed or spec.output is None)


def _require_input(chain: Chain, stage: StageName, before: int | None) -> None:
    folder = SPECS[stage].input
    if before is None and folder is not None and read_rollup(chain.run.root / folder) is None:
        raise UnusableInput(
            f"submit: {stage} reads {chain.run.root / folder}, which is not finished, and no job makes it; "
            "leave out --only, or name an earlier stage with --from"
        )


# --- the end of it -----------------------------------------------------------------------------------------------


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
        running = [job for job in jobs if job.state in ("RUNNING", "COMPLETING", "SUSPENDED")]
        waiting = [job for job in jobs if job not in running]
        if waiting:
            call("scancel", *(str(job.job_id) for job in waiting))
        for job in running:
            call("scancel", "--signal=USR2", "--batch", str(job.job_id))
        found[stage] = "asked to stop" if running else "taken out of the queue"
    deadline = time.monotonic() + grace_s
    while (left := jobs_of(run, queued())) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for stage, jobs in left.items():
        call("scancel", *(str(job.job_id) for job in jobs))
        found[stage] = f"ended: it had not stopped within {grace_s:g} s"
    return {stage: "stopped" if how == "asked to stop" else how for stage, how in found.items()}
