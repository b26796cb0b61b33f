"""When a layout does not fit: the nearest that do, by how few nodes come or go, then by how little else changes."""

from collections.abc import Iterator
from math import gcd
from typing import Literal, NamedTuple

from configs.devices import device_of
from configs.schema import DeepSpeedEngine, LocalEngine, Recipe, Teacher
from teacher.planning.architecture import Architecture
from teacher.planning.fit import Demand, engine_slots, judge, workload_step
from teacher.planning.throughput import machine

MAX_NODES = 64
SHOWN = 3


class Alternative(NamedTuple):
    """A layout that fits. cache_bytes_per_gpu: what it leaves for caches. decode_tokens_per_s_per_gpu: expected. overrides:
    what to add to the command line."""

    nodes: int
    expert_parallel: int
    tensor_parallel: int
    zero_stage: Literal[0, 3]
    cache_bytes_per_gpu: int
    decode_tokens_per_s_per_gpu: float
    overrides: str

    @property
    def words(self) -> str:
        zero = f", ZeRO-{self.zero_stage}" if self.zero_stage else ""
        return f"{self.nodes} node{'s' if self.nodes > 1 else ''}, EP {self.expert_parallel}, TP {self.tensor_parallel}{zero}"


def nearest_layouts(architecture: Architecture, recipe: Recipe, demand: Demand) -> tuple[Alternative, ...]:
    """At most three, nearest node counts first, up to 64 nodes; of one node count those that change least, then the fastest.
    Tensor parallelism stays inside a node, and no layout gathers expert weights. None for the local engine, which has one
    device, nor for a device of unknown size."""
    teacher = recipe.teacher
    if isinstance(teacher.engine, LocalEngine) or device_of(teacher.hardware.gpu) is None:
        return ()
    found: list[Alternative] = []
    for nodes in sorted(range(1, MAX_NODES + 1), key=lambda nodes: (abs(nodes - teacher.hardware.nodes), nodes)):
        tried = (_if_fits(architecture, recipe, demand, one) for one in _layouts(architecture, teacher, nodes))
        fitting = [one for one in tried if one is not None]
        fitting.sort(key=lambda one: (one.overrides.count("-s "), -one.decode_tokens_per_s_per_gpu))
        found += fitting[: SHOWN - 1]
        if len(found) >= SHOWN:
            break
    return tuple(found[:SHOWN])


def _layouts(architecture: Architecture, teacher: Teacher, nodes: int) -> Iterator[Teacher]:
    """Every layout of that many nodes whose degrees divide ranks, experts and heads: at most as many as those have divisors,
    however many ranks there are."""
    hardware = teacher.hardware.model_copy(update={"nodes": nodes})
    world, local = teacher.ranks_per_node * nodes, teacher.ranks_per_node
    stages = (0, 3) if isinstance(teacher.engine, DeepSpeedEngine) else (teacher.layout.zero_stage,)
    for expert in _divisors(gcd(architecture.num_experts, world) if architecture.num_experts else 1):
        for tensor in _divisors(gcd(architecture.attention.heads, local)):
            for stage in stages if expert == world or not architecture.num_experts else (0,):
                degree = "all" if expert == world and teacher.layout.expert_parallel == "all" else expert
                layout = teacher.layout.model_copy(
                    update={"expert_parallel": degree, "tensor_parallel": tensor, "zero_stage": stage}
                )
                yield teacher.model_copy(update={"hardware": hardware, "layout": layout})


def _if_fits(architecture: Architecture, recipe: Recipe, demand: Demand, teacher: Teacher) -> Alternative | None:
    device, fit = device_of(teacher.hardware.gpu), judge(architecture, recipe, teacher, demand)
    if not fit.fits or fit.cache_bytes_per_gpu is None or device is None:
        return None
    layout = teacher.layout
    step = workload_step(machine(architecture, teacher, fit.degrees, device), fit, demand._replace(slots=engine_slots(teacher)))
    return Alternative(
        nodes=teacher.hardware.nodes,
        expert_parallel=fit.degrees.expert,
        tensor_parallel=layout.tensor_parallel,
        zero_stage=3 if fit.degrees.zero else 0,
        cache_bytes_per_gpu=fit.cache_bytes_per_gpu,
        decode_tokens_per_s_per_gpu=step.tokens_per_s(recipe.plan.efficiency) / fit.degrees.world,
        overrides=_overrides(recipe.teacher, teacher),
    )


def _overrides(old: Teacher, new: Teacher) -> str:
    changed = {"hardware.nodes": (old.hardware.nodes, new.hardware.nodes)} | {
        f"layout.{name}": (getattr(old.layout, name), getattr(new.layout, name))
        for name in ("expert_parallel", "tensor_parallel", "zero_stage")
    }
    return " ".join(f"-s teacher.{name}={after}" for name, (before, after) in changed.items() if before != after)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
