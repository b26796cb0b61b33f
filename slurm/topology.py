"""What each stage needs of a cluster: nodes and tasks, derived from the recipe alone."""

from typing import NamedTuple

from configs.schema import DeepSpeedEngine, Recipe

STAGES = ("prompts", "headroom", "generate", "data", "train", "evaluate", "export", "report")


class Shape(NamedTuple):
    """One job's size. torchrun starts `processes` ranks on each of `nodes` nodes; 0 means a plain process."""

    nodes: int
    processes: int
    uses_gpus: bool


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """Those that the recipe asks for, in order."""
    measured = recipe.evaluate.headroom is not None and bool(recipe.evaluate.prompt_suites)
    return tuple(stage for stage in STAGES if stage != "headroom" or measured)


def stage_shape(recipe: Recipe, stage: str) -> Shape:
    gpus = recipe.teacher.hardware.gpu != "cpu"
    engine = recipe.teacher.engine
    match stage:
        case "headroom" | "generate" | "evaluate" if isinstance(engine, DeepSpeedEngine):  # the teacher's own ranks
            return Shape(recipe.teacher.hardware.nodes, recipe.teacher.ranks_per_node, gpus)
        case "headroom" | "generate":
            return Shape(1, 0, gpus)
        case "train":
            return Shape(recipe.train.nodes, recipe.train.processes, gpus)
        case "evaluate":
            return Shape(1, 0, gpus)
        case _:
            return Shape(1, 0, False)
