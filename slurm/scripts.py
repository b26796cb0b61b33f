"""A recipe as a chain of Slurm jobs: one readable sbatch script a stage."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs.cluster import Slurm, StageName
from configs.schema import Recipe
from data.store import RunFolder
from slurm.attempts import JobFolder, excluded_nodes
from slurm.topology import SPECS, stage_shape, stages_of

TEMPLATE = "stage.sbatch.j2"


@dataclass(frozen=True, slots=True)
class Chain:
    """What is submitted: a recipe, the words that name it again on a node, and the cluster's settings (slurm/site.py). cwd: where
    relative paths of the command line are looked up. max_nodes: that jobs of the chain may hold at the same time."""

    recipe: Recipe
    config: str
    overrides: Sequence[str]
    run: RunFolder
    slurm: Slurm
    cwd: Path
    max_nodes: int | None = None

    @property
    def stages(self) -> tuple[StageName, ...]:
        return stages_of(self.recipe)


class Script(NamedTuple):
    """One job, in submission order."""

    stage: StageName
    text: str


def comment_of(run: RunFolder, stage: StageName) -> str:
    """By which a job is known again as this run's. Slurm's accounts need not exist for it."""
    return f"tracestill {stage} {run.root}"


def render_scripts(chain: Chain) -> list[Script]:
    """The scripts of every stage. Paths in them are absolute: a job starts wherever Slurm puts it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["quote"] = shlex.quote
    template = environment.get_template(TEMPLATE)
    return [Script(stage, template.render(_values(chain, stage))) for stage in chain.stages]


def _values(chain: Chain, stage: StageName) -> dict[str, object]:
    recipe, run, stages = chain.recipe, chain.run, chain.stages
    shape, position = stage_shape(recipe, stage), stages.index(stage) + 1
    return {
        "run_name": recipe.name,
        "stage": stage,
        "position": position,
        "total": len(stages),
        "previous": stages[position - 2] if position > 1 else None,
        "after": dependency_kind(stage),
        "shape": shape,
        "array": array_of(chain, stage),
        "job": chain.slurm.job(stage),
        "slurm": chain.slurm,
        "excluded": sorted({*chain.slurm.exclude, *excluded_nodes(JobFolder.of(run))}),
        "wandb": recipe.train.wandb,
        "comment": comment_of(run, stage),
        "cwd": chain.cwd,
        "log": run.logs / f"{stage}-%j.log",
        "log_now": shlex.quote(str(run.logs / f"{stage}-")) + '"$SLURM_JOB_ID".log',
        "programs": shlex.quote(str(Path(sys.executable).parent)),
        "input": input_of(stage, stages),
        "run_dir": shlex.quote(str(run.root)),
        "command": stage_command(chain, stage),
    }


def dependency_kind(stage: StageName) -> str:
    """The report is made of whatever there is in the end: it is what people open in the morning."""
    return "afterany" if stage == "report" else "afterok"


def input_of(stage: StageName, stages: Sequence[StageName]) -> str | None:
    """The folder whose manifest the job looks for."""
    return "headroom" if stage == "generate" and "headroom" in stages else SPECS[stage].input


def array_of(chain: Chain, stage: StageName) -> str | None:
    """sbatch's --array where several jobs work at a stage together; as many at once as the nodes allow."""
    shape = stage_shape(chain.recipe, stage)
    if shape.jobs == 1:
        return None
    at_once = shape.jobs if chain.max_nodes is None else min(shape.jobs, chain.max_nodes // shape.nodes)
    return f"0-{shape.jobs - 1}" + (f"%{at_once}" if at_once < shape.jobs else "")


def stage_command(chain: Chain, stage: StageName) -> str:
    """tracestill, as it is called on every node of the job."""
    spec = SPECS[stage]
    if stage == "report":
        return shlex.join(["tracestill", *spec.command, str(chain.run.root)])
    share = [str(chain.slurm.canary)] if stage == "canary" else []
    overrides = [word for override in chain.overrides for word in ("-s", override)]
    where = [] if stage == "prepare" else ["--run-dir", str(chain.run.root)]
    return shlex.join(["tracestill", *spec.command, *share, chain.config, *overrides, *where])
