"""`tracestill submit`, `status`, `logs` and `cancel`: a recipe's stages as jobs of a cluster.

tracestill.py names the commands, and gives `submit --dry-run` the plan's hours, which other packages calculate.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from configs.errors import UnusableInput
from configs.options import AsJson, RunFolderArgument
from data.invocation import Invocation, existing_run

if TYPE_CHECKING:
    from configs.cluster import StageName
    from configs.schema import Recipe
    from data.stage import Context
    from data.store import RunFolder
    from slurm.client import QueuedJob
    from slurm.scripts import Chain

Hours = Callable[["Recipe"], Mapping[str, float]]
Current = Callable[["Context", "StageName"], bool]
Check = Callable[["Recipe"], None]


def print_scripts(named: Invocation, max_nodes: int | None, chosen: tuple[str | None, str | None], hours: Hours) -> None:
    """The scripts and what the plan says of their hours. Touches nothing."""
    from slurm.chain import check_size, chosen_stages
    from slurm.scripts import array_of, render_scripts
    from slurm.topology import ASKING, stage_shape

    context = named.look()
    chain = _chain(context, max_nodes)
    wanted = chosen_stages(chain, *chosen)
    check_size(chain, wanted)
    asks = "serve" in chain.stages and any(stage in ASKING for stage in wanted)
    for script in render_scripts(chain):
        if script.stage in wanted or (script.stage == "serve" and asks):
            print(f"# ---- {script.stage}.sbatch {'-' * (80 - len(script.stage))}\n{script.text}")
    known = hours(context.recipe)
    print("# ---- plan")
    for stage in wanted:
        shape, job = stage_shape(context.recipe, stage), chain.slurm.job(stage)
        jobs = f"{shape.jobs} jobs of " if shape.jobs > 1 else ""
        at_once = int((array_of(chain, stage) or "").rpartition("%")[2]) if "%" in (array_of(chain, stage) or "") else shape.jobs
        planned = f"{known[stage] / at_once:,.1f} h by the plan" if stage in known else "not planned"
        limit = job.time_limit or "the partition's"
        print(f"{stage:<9} {jobs}{shape.nodes} node{'s'[: shape.nodes > 1]}, time limit {limit}; {planned}")


def submit_run(
    named: Invocation, max_nodes: int | None, chosen: tuple[str | None, str | None], models: Check, current: Current
) -> None:  # fmt: skip
    """What is missing is in the queue; what is there is attached to. models: raises UnusableInput for models that are not there.
    current: whether what a stage has sealed is what this configuration makes."""
    from data.stage import exclusive
    from slurm.chain import check_size, chosen_stages, submit_chain
    from slurm.client import queued
    from slurm.scripts import render_scripts

    first, only = chosen
    wanted = _chain(named.look(), max_nodes)
    check_size(wanted, chosen_stages(wanted, first, only))
    render_scripts(wanted)  # a path that sbatch cannot read, before the folder is made
    queued()  # a machine without Slurm is told so before anything is written
    if only is None and not any(option.startswith("--container") for option in wanted.slurm.srun):  # which has paths of its own
        models(wanted.recipe)
    context = named.open()
    chain = _chain(context, max_nodes)
    with exclusive(context.run, "submit"):
        placed = submit_chain(chain, first=first, only=only, is_current=lambda stage: current(context, stage))
    for one in placed:
        if one.how != "left out":
            job = f"  job {one.job_id}" if one.job_id is not None else ""
            print(f"{one.stage:<9} {one.how}{job}" + (f"  {one.note}" if one.note else ""))
    if all(one.how in ("done", "left out") for one in placed):
        print("nothing to do; what is to be made once more is for --from STAGE")
    print(f"look at it with: tracestill status {context.run.root}")


def _chain(context: "Context", max_nodes: int | None) -> "Chain":
    from slurm.scripts import Chain
    from slurm.site import settle_site

    settings = settle_site(context.recipe.slurm, context.folders)
    recipe = context.recipe.model_copy(update={"slurm": settings})
    return Chain(recipe, context.config, context.overrides, context.run, settings, Path.cwd(), context.loaded.folder, max_nodes)


# --- looking, and stopping ------------------------------------------------------------------------------------------


def status(
    run_dir: RunFolderArgument,
    as_json: AsJson = False,
) -> None:
    """The stages of a run on the cluster: jobs, attempts, counts, what is left, why it stopped."""
    run = existing_run(run_dir)
    from slurm.status import read_status, status_json, status_tables

    found = read_status(run, _stages(run), _asked())
    Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200).print(status_tables(found))
    if as_json:
        print(json.dumps(status_json(found)))


def _asked() -> "Sequence[QueuedJob] | None":
    from slurm.client import SlurmFailed, queued

    try:
        return queued()
    except (UnusableInput, SlurmFailed):  # a run folder is looked at from anywhere
        return None


def _stages(run: "RunFolder") -> "tuple[StageName, ...]":
    """Of the newest submission; without one, those that every run has."""
    from slurm.attempts import JobFolder, read_stages
    from slurm.topology import STAGES

    return read_stages(JobFolder.of(run)) or tuple(stage for stage in STAGES if stage not in ("prepare", "serve", "canary"))


def logs(
    run_dir: RunFolderArgument,
    stage: Annotated[str, typer.Argument(help="A stage, e.g. generate.")],
    follow: Annotated[bool, typer.Option("--follow/--no-follow", "-f", help="Go on as the log grows.")] = True,
    lines: Annotated[int, typer.Option("-n", help="Lines of what is there already.")] = 50,
) -> None:
    """The newest log of a stage's jobs, as it grows."""
    run = existing_run(run_dir)
    stages = _stages(run)
    if stage not in stages:
        raise UnusableInput(f"logs: no stage {stage} in {run.root}; expected one of {', '.join(stages)}")
    found = sorted(run.logs.glob(f"{stage}-*.log"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UnusableInput(f"logs: {run.logs} has no {stage}-JOB.log yet; see: tracestill status {run.root}")
    newest = found[-1]
    print(f"==> {newest}", file=sys.stderr, flush=True)
    tail = subprocess.Popen(["tail", f"--lines={lines}", *(["--follow=name", "--retry"] if follow else []), str(newest)])
    try:
        tail.wait()
    finally:
        tail.terminate()
        tail.wait()


def cancel(
    run_dir: RunFolderArgument,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that running stages have for committing what they hold.")
    ] = 300.0,
) -> None:
    """Stops the run's jobs cleanly: what is committed stays, nothing is queued again. `submit` continues."""
    run = existing_run(run_dir)
    from data.stage import exclusive
    from slurm.cancel import cancel_chain

    with exclusive(run, "submit", waits=True):
        found = cancel_chain(run, grace_s=grace)
    for stage, how in found.items():
        print(f"{stage:<9} {how}")
    if not found:
        print("nothing to cancel: no job of this run is queued or running")
