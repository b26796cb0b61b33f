"""A recipe as a chain of Slurm jobs: one readable sbatch script a stage."""

import hashlib
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs.cluster import Slurm, StageName
from configs.errors import UnusableInput
from configs.schema import DeepSpeedEngine, HttpEngine, Recipe
from data.store import RunFolder
from slurm.attempts import JobFolder, excluded_nodes
from slurm.serving import server_command
from slurm.topology import ASKING, SPECS, previous_of, stage_shape, stages_of

TEMPLATE = "stage.sbatch.j2"
BEYOND_S = 300.0
"""Beyond the longest silence that is nobody's fault."""


@dataclass(frozen=True, slots=True)
class Chain:
    """What is submitted: a recipe, the words that name it again on a node, and the cluster's settings (slurm/site.py).

    cwd, folder: of the command line and of the recipe, where relative paths are looked up. max_nodes: that jobs of the chain may
    hold at the same time.
    """

    recipe: Recipe
    config: str
    overrides: Sequence[str]
    run: RunFolder
    slurm: Slurm
    cwd: Path
    folder: Path
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
        "previous": previous_of(stages, stage),
        "after": dependency_kind(stage),
        "shape": shape,
        "array": array_of(chain, stage),
        "job": chain.slurm.job(stage),
        "slurm": chain.slurm,
        "excluded": sorted({*chain.slurm.exclude, *(excluded_nodes(JobFolder.of(run)) if stage != "report" else ())}),
        "wandb": recipe.train.wandb,
        "cwd": _in_quotes(chain.cwd),
        "log": f"{_in_quotes(run.logs).replace('%', '%%')}/{stage}-%j.log",
        "comment": _in_quotes(comment_of(run, stage)),
        "log_now": shlex.quote(str(run.logs / f"{stage}-")) + '"$SLURM_JOB_ID".log',
        "programs": shlex.quote(str(Path(sys.executable).parent)),
        "input": input_of(stage, stages),
        "loading": chain.slurm.loading_seconds if SPECS[stage].counts else "inf",
        "cancelled": shlex.quote(str(JobFolder.of(run).cancelled)),
        "silence": silence_of(chain, stage),
        "health": health_words(chain, stage),
        "staged": staged_shards(chain, stage),
        "asks_servers": asks_servers(chain, stage),
        "closes_servers": chain.slurm.servers is not None and stage in ("evaluate", "report"),
        "run_dir": shlex.quote(str(run.root)),
        "command": stage_command(chain, stage),
    }


def _in_quotes(said: Path | str) -> str:
    """For an #SBATCH line. Raises UnusableInput for what cannot stand in one."""
    if any(sign in str(said) for sign in '"\n\\'):
        raise UnusableInput(
            f"{str(said)!r}: sbatch reads no path with a quotation mark, a backslash or a line break; name another folder"
        )
    return str(said)


def silence_of(chain: Chain, stage: StageName) -> float:
    """Seconds. A server that does not stream says nothing of an answer before its end, and servers that have gone may be starting
    anew: the engine's own patience with them comes first."""
    patience_s, engine = chain.slurm.silence_seconds, chain.recipe.teacher.engine
    if not SPECS[stage].counts:
        return math.inf
    if stage in ASKING and isinstance(engine, HttpEngine) and not engine.stream:
        patience_s = max(patience_s, engine.timeout_s + BEYOND_S)
    if asks_servers(chain, stage) and chain.slurm.servers is not None:
        patience_s = max(patience_s, chain.slurm.servers.start_seconds + BEYOND_S)
    return patience_s


def asks_servers(chain: Chain, stage: StageName) -> bool:
    return chain.slurm.servers is not None and stage in ASKING


def _serve_command(chain: Chain) -> str:
    settings, teacher = chain.slurm.servers, chain.recipe.teacher
    assert settings is not None
    command = server_command(chain.recipe, (chain.folder, chain.cwd))
    ranks = max(1, teacher.hardware.gpus_per_node // teacher.layout.tensor_parallel)
    words = ["python", "-P", "-m", "slurm.serve", str(chain.run.root), f"--start={settings.start_seconds:g}"]
    words += [f"--idle={settings.idle_seconds:g}"]
    words += [f"--ranks-per-node={ranks}", f"--others={shlex.join(command.others)}"] if command.others else []
    return shlex.join([*words, "--", *command.first])


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
    free = None if chain.max_nodes is None else chain.max_nodes - (stage == "serve")  # one is for whoever asks
    at_once = shape.jobs if free is None else min(shape.jobs, free // shape.nodes)
    return f"0-{shape.jobs - 1}" + (f"%{at_once}" if at_once < shape.jobs else "")


def jobs_in(array: str) -> int:
    """How many `array_of` has asked for; one where that is not what it says."""
    found = re.fullmatch(r"0-(\d+)(?:%\d+)?", array)
    return int(found[1]) + 1 if found else 1


class Staged(NamedTuple):
    """source: the shards, quoted. target: on a node's own disk; variables in it are filled in there."""

    source: str
    target: str


def staged_shards(chain: Chain, stage: StageName) -> Staged | None:
    """Of the stages that load the teacher, where the site wants its shards copied to the node first. Two folders of one name are
    told apart by where they lie."""
    engine = chain.recipe.teacher.engine
    if not (chain.slurm.stage_weights and isinstance(engine, DeepSpeedEngine) and engine.prepared and stage in ASKING):
        return None
    source = chain.cwd / engine.prepared
    where = hashlib.sha256(str(source).encode()).hexdigest()[:8]
    return Staged(shlex.quote(str(source)), f"{chain.slurm.scratch}/tracestill/{source.name}-{where}")


def health_words(chain: Chain, stage: StageName) -> str | None:
    """What slurm.health is asked on every node of the job, quoted as one word; None where nothing is: a stage on no GPU, of a
    site that has no command of its own."""
    settings, shape = chain.slurm.health, stage_shape(chain.recipe, stage)
    if settings is None or not (shape.uses_gpus or (settings.command and shape.processes)):
        return None
    gpus = gpus_asked(chain, stage) if settings.gpus is None else settings.gpus
    values = {
        "gpus": gpus if shape.uses_gpus else None,
        "gpu-memory-gib": settings.gpu_memory_gib if shape.uses_gpus else None,
        "memory-gib": settings.memory_gib, "scratch": chain.slurm.scratch or None, "scratch-gib": settings.scratch_gib,
        "copy-gib-s": settings.copy_gib_s, "gpu-copy-gib-s": settings.gpu_copy_gib_s if shape.uses_gpus else None,
        "command": settings.command,
    }  # fmt: skip
    return shlex.quote(shlex.join(f"--{name}={value}" for name, value in values.items() if value is not None))


def gpus_asked(chain: Chain, stage: StageName) -> int:
    """On a node: what the stage's gres says, such as gpu:h200:8; without one, what a node has."""
    found = re.search(r"(?:^|,)(?:gres/)?gpu(?::[^:,()]+)?:(\d+)", chain.slurm.job(stage).gres or "")
    return int(found[1]) if found else chain.recipe.teacher.hardware.gpus_per_node


def stage_command(chain: Chain, stage: StageName) -> str:
    """tracestill, as it is called on every node of the job."""
    spec = SPECS[stage]
    if stage == "serve":
        return _serve_command(chain)
    if stage == "report":
        return shlex.join(["tracestill", *spec.command, str(chain.run.root)])
    share = [str(chain.slurm.canary)] if stage == "canary" else []
    overrides = [word for override in chain.overrides for word in ("-s", override)]
    if asks_servers(chain, stage):
        places = f"teacher.engine.servers_file={JobFolder.of(chain.run).servers}"
        overrides += ["-s", "teacher.engine.base_urls=[]", "-s", places]
    where = [] if stage == "prepare" else ["--run-dir", str(chain.run.root)]
    return shlex.join(["tracestill", *spec.command, *share, chain.config, *overrides, *where])
