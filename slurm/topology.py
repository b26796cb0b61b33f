"""What each stage needs of a cluster: nodes and tasks, derived from the recipe alone."""

from typing import NamedTuple

from configs.schema import DeepSpeedEngine, Recipe

STAGES = ("prompts", "generate", "data", "train", "evaluate", "export", "report")


class Shape(NamedTuple):
    """One job's size. torchrun starts `processes` ranks on each of `nodes` nodes; 0 means a plain process."""

    nodes: int
    processes: int
    uses_gpus: bool


def stage_shape(recipe: Recipe, stage: str) -> Shape:
    gpus = recipe.teacher.hardware.gpu != "cpu"
    engine = recipe.teacher.engine
    match stage:
        case "generate" if isinstance(engine, DeepSpeedEngine):
            return Shape(recipe.teacher.hardware.nodes, recipe.teacher.ranks_per_node, gpus)
        case "generate":
            return Shape(1, 0, gpus)
        case "train":
            return Shape(recipe.train.nodes, recipe.train.processes, gpus)
        case "evaluate":
            return Shape(1, 0, gpus)
        case _:
            return Shape(1, 0, False)
