"""A recipe as a chain of Slurm jobs: one readable sbatch script a stage."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs.schema import Recipe
from data.store import ROLLUP, RunFolder
from slurm.topology import stage_shape, stages_of

# Stage -> the folder whose manifest proves that its input is whole.
INPUT = {
    "prompts": None,
    "headroom": "prompts",
    "generate": "prompts",
    "data": "traces",
    "train": "dataset",
    "evaluate": "checkpoints",
    "export": "evaluation",
    "report": None,
}
COMMAND = {"data": "data build", "headroom": "evaluate --headroom"}


class Script(NamedTuple):
    """One job, in submission order."""

    stage: str
    text: str


def render_scripts(recipe: Recipe, *, config: str, overrides: Sequence[str], run: RunFolder) -> list[Script]:
    """The scripts of every stage. Paths in them are absolute: a job starts wherever Slurm puts it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    template = environment.get_template("stage.sbatch.j2")
    scripts = []
    stages = stages_of(recipe)
    for position, stage in enumerate(stages, 1):
        folder = "headroom" if stage == "generate" and "headroom" in stages else INPUT[stage]
        text = template.render(
            run_name=recipe.name,
            stage=stage,
            position=position,
            total=len(stages),
            previous=stages[position - 2] if position > 1 else None,
            shape=stage_shape(recipe, stage),
            slurm=recipe.slurm,
            wandb=recipe.train.wandb,
            log=run.logs / f"{stage}-%j.log",
            input_manifest=shlex.quote(str(run.root / folder / ROLLUP)) if folder else None,
            command=stage_command(stage, config, overrides, run),
        )
        scripts.append(Script(stage, text))
    return scripts


def stage_command(stage: str, config: str, overrides: Sequence[str], run: RunFolder) -> str:
    words = ["tracestill", *COMMAND.get(stage, stage).split()]
    if stage == "report":
        return shlex.join([*words, str(run.root)])
    return shlex.join(
        [*words, config, *(word for override in overrides for word in ("-s", override)), "--run-dir", str(run.root)]
    )
