"""The stages of a chain: what each runs, what it reads, what it makes, and what it needs of a cluster. From the recipe alone."""

from collections.abc import Sequence
from typing import NamedTuple

from configs.cluster import StageName
from configs.schema import DeepSpeedEngine, HttpEngine, Recipe


class StageSpec(NamedTuple):
    """command: of tracestill. input: the folder of the run whose manifest proves that the stage before has finished. output:
    the folder that the stage seals; None where it seals none. judges: it may refuse although its output is whole. counts: it
    says how far it is, so that a silence means something; what does not has the time limit alone."""

    name: StageName
    command: tuple[str, ...]
    input: str | None
    output: str | None
    judges: bool = False
    counts: bool = True


SPECS: dict[StageName, StageSpec] = {
    spec.name: spec
    for spec in (
        StageSpec("prepare", ("prepare",), None, None),  # first: prompts are counted with the tokenizer beside the shards
        StageSpec("prompts", ("prompts",), None, "prompts", counts=False),
        StageSpec("serve", (), None, None),
        StageSpec("headroom", ("evaluate", "--headroom"), "prompts", "headroom", judges=True),
        StageSpec("canary", ("generate", "--canary"), "prompts", None, judges=True),
        StageSpec("generate", ("generate",), "prompts", "traces"),
        StageSpec("data", ("data", "build"), "traces", "dataset"),
        StageSpec("train", ("train",), "dataset", "checkpoints"),
        StageSpec("evaluate", ("evaluate",), "checkpoints", "evaluation", judges=True),
        StageSpec("export", ("export",), "evaluation", "export", counts=False),
        StageSpec("report", ("report",), None, None, counts=False),
    )
}
STAGES: tuple[StageName, ...] = tuple(SPECS)
ASKING: tuple[StageName, ...] = ("headroom", "canary", "generate", "evaluate")
"""Stages that ask the teacher: where servers are jobs of the run, they wait for one of them."""

TOGETHER: tuple[StageName, ...] = ("serve", "canary", "generate")
"""Stages that several jobs may be at."""


class Shape(NamedTuple):
    """One job's size. torchrun starts `processes` ranks on each of `nodes` nodes; 0 means a plain process. jobs: how many of
    the kind may work at the same time."""

    nodes: int
    processes: int
    uses_gpus: bool
    jobs: int = 1


def stages_of(recipe: Recipe) -> tuple[StageName, ...]:
    """Those that the recipe asks for, in order."""
    engine = recipe.teacher.engine
    asked = {
        "headroom": recipe.evaluate.headroom is not None and bool(recipe.evaluate.prompt_suites),
        "prepare": isinstance(engine, DeepSpeedEngine) and bool(engine.prepared),
        "canary": recipe.slurm.canary is not None,
        "serve": recipe.slurm.servers is not None,
    }
    return tuple(stage for stage in STAGES if asked.get(stage, True))


def previous_of(stages: Sequence[StageName], stage: StageName) -> StageName | None:
    """The stage that this one waits for. Nobody waits for servers: they run beside the others."""
    before: StageName | None = None
    for one in stages[: stages.index(stage)]:
        before = before if one == "serve" else one
    return before


def stage_shape(recipe: Recipe, stage: StageName) -> Shape:
    teacher = recipe.teacher
    gpus = teacher.hardware.gpu != "cpu"
    asks_servers = isinstance(teacher.engine, HttpEngine)
    jobs = recipe.slurm.generate_jobs if stage == "generate" else 1
    match stage:
        case "serve":
            assert recipe.slurm.servers is not None
            return Shape(teacher.hardware.nodes, 1, gpus, recipe.slurm.servers.jobs)
        case "headroom" | "canary" | "generate" | "evaluate" if isinstance(teacher.engine, DeepSpeedEngine):  # its own ranks
            return Shape(teacher.hardware.nodes, teacher.ranks_per_node, gpus, jobs)
        case "canary" | "generate":
            return Shape(1, 0, gpus and not asks_servers, jobs)
        case "headroom" | "evaluate" | "export":  # the student answers, and is opened again, here
            return Shape(1, 0, gpus)
        case "train":
            return Shape(recipe.train.nodes, recipe.train.processes, gpus)
        case _:
            return Shape(1, 0, False)
