"""What a recipe's teacher takes, whether it fits, how fast it can be and what that costs: arithmetic over its config.json
and the recipe. Nothing is loaded and torch is not imported.

Of planning/: sizes come from architecture.py, bytes on a GPU from placement.py, the verdict from fit.py, rates from
throughput.py, money from workload.py; here they become one value.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configs.devices import WEIGHT_BYTES, device_of
from configs.errors import UnusableInput
from configs.lengths import output_lengths
from configs.planning import Planning
from configs.schema import Recipe, Teacher
from teacher.folders import model_folder, read_config_json
from teacher.planning.architecture import FAMILIES, Architecture, model_type_of, read_architecture
from teacher.planning.degrees import degrees_of
from teacher.planning.fit import Demand, Fit, demand_of, judge, workload_step
from teacher.planning.layout_search import Alternative, nearest_layouts
from teacher.planning.placement import ANY_SAMPLING, cache_dtype, room
from teacher.planning.tensor_headers import count_headers
from teacher.planning.throughput import Machine, Step, decode_step, machine, prefill_seconds
from teacher.planning.workload import Cost, cost

REPOSITORY = Path(__file__).parent.parent


class ContextRow(NamedTuple):
    """One length of context. requests: as many of it as fit the launch at once. decode_tokens_per_s_per_gpu: expected, with
    as many of them in flight as fit and the engine takes. prefill_seconds: to the first token of such a prompt. None where
    it does not fit, or the device is unknown."""

    context_tokens: int
    requests: int | None
    decode_tokens_per_s_per_gpu: float | None
    prefill_seconds: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole calculation as a value. step: decoding the workload; with prefill and cost None where the device's speed
    is unknown or the layout does not fit. alternatives: layouts near this one that fit, when it does not."""

    name: str
    teacher: Teacher
    planning: Planning
    architecture: Architecture
    demand: Demand
    fit: Fit
    machine: Machine | None
    step: Step | None
    contexts: tuple[ContextRow, ...]
    cost: Cost | None
    alternatives: tuple[Alternative, ...]

    @property
    def kv_dtype(self) -> str:
        return cache_dtype(self.teacher)

    @property
    def kv_bytes_per_value(self) -> float:
        return WEIGHT_BYTES[self.kv_dtype]

    @property
    def max_context_tokens(self) -> int | None:
        """The longest single request that fits, within the model's positions."""
        longest = self.fit.cache.max_tokens
        return None if longest is None else min(longest, self.architecture.max_positions)

    @property
    def decode_tokens_per_s_per_gpu(self) -> float | None:
        """Expected: the bound times plan.efficiency."""
        return None if self.step is None else self.step.tokens_per_s(self.planning.efficiency) / self.fit.degrees.world

    @property
    def cost_per_million_output_tokens(self) -> float | None:
        """Dollars, of decoding alone; `cost` has the workload's, prompts included."""
        rate = self.decode_tokens_per_s_per_gpu
        return None if rate is None else self.planning.price_per_gpu_hour / (rate * 3600) * 1e6

    @property
    def refusal(self) -> str | None:
        """Why this layout cannot be and what could, on one line; None when it can, or when nobody knows."""
        if self.fit.refusal is None:
            return None
        if not self.fit.by_layout:
            return f"{self.name}: {self.fit.refusal}"
        found = "; ".join(f"{one.words}: {one.overrides}" for one in self.alternatives)
        return f"{self.name}: {self.fit.refusal}; " + (f"nearest that fit: {found}" if found else "no layout near it fits")


def plan_recipe(recipe: Recipe) -> Plan:
    """Raises UnusableInput when the model's folder or configuration cannot be read, or a figure is beyond counting. A layout
    that does not fit is a plan like any other, with a refusal."""
    try:
        return _plan(recipe)
    except OverflowError as error:
        raise UnusableInput(f"{recipe.name}: a figure of the recipe is too large to count with ({error}); lower it") from error


def _plan(recipe: Recipe) -> Plan:
    teacher, planning = recipe.teacher, recipe.plan
    architecture, device = architecture_of(teacher.model), device_of(teacher.hardware.gpu)
    lengths = output_lengths(planning.workload, min(recipe.generate.sampling.max_tokens, architecture.max_positions))
    demand = demand_of(architecture, recipe, lengths)
    fit = judge(architecture, recipe, teacher, demand)
    runs_on = machine(architecture, teacher, fit.degrees, device) if device and fit.fits else None
    step = workload_step(runs_on, fit, demand) if runs_on else None
    return Plan(
        name=recipe.name,
        teacher=teacher,
        planning=planning,
        architecture=architecture,
        demand=demand,
        fit=fit,
        machine=runs_on,
        step=step,
        contexts=tuple(
            context_row(runs_on, fit, demand, planning, tokens)
            for tokens in planning.context_lengths
            if tokens <= architecture.max_positions
        ),
        cost=cost(
            planning.workload,
            lengths,
            planning.api,
            samples_per_prompt=recipe.generate.samples_per_prompt,
            tokens_per_s=step.tokens_per_s(planning.efficiency),
            prefill_s=prefill_seconds(runs_on, planning.workload.prompt_tokens, planning, alone=False),
            replicas=fit.degrees.replicas,
            dollars_per_hour=planning.price_per_gpu_hour * fit.degrees.world,
        )
        if runs_on and step
        else None,
        alternatives=nearest_layouts(architecture, recipe, demand) if fit.fits is False and fit.by_layout else (),
    )


def kv_budget_bytes(teacher: Teacher, planning: Planning | None = None) -> int | None:
    """Bytes of one GPU that caches may take: the usable share less weights, what comes with them, and the buffers of one
    pass. None where the device's size is unknown; never below zero. The decode loop admits requests by it,
    whatever their sampling."""
    architecture, degrees, device = architecture_of(teacher.model), degrees_of(teacher), device_of(teacher.hardware.gpu)
    usable = device.usable if device else None
    budget = room(architecture, teacher, degrees, usable, planning or Planning(), ANY_SAMPLING).cache
    return None if budget is None else max(0, budget)


def architecture_of(model: str) -> Architecture:
    """Of `teacher.model`: a folder, relative to the working directory or else to this repository, where the shipped
    architectures lie. A family without a formula is counted from its safetensors headers."""
    shipped = REPOSITORY / model
    folder = model_folder(str(shipped) if shipped.is_dir() and not Path(model).is_dir() else model)
    where = f"teacher.model {model}"
    try:
        config = read_config_json(folder)
    except UnusableInput:
        raise
    except (ValueError, RecursionError) as error:  # bytes that are no text, a number of 5,000 digits, brackets without end
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnusableInput(f"{where}: config.json cannot be read ({said}); restore the file") from error
    if model_type_of(config, where) in FAMILIES:
        return read_architecture(config, where)
    return count_headers(folder, config, where)


def context_row(runs_on: Machine | None, fit: Fit, demand: Demand, planning: Planning, tokens: int) -> ContextRow:
    requests = fit.cache.requests(tokens)
    if not requests or runs_on is None:
        return ContextRow(tokens, requests, None, None)
    step = decode_step(runs_on, min(requests, demand.slots), tokens)
    rate = step.tokens_per_s(planning.efficiency) / fit.degrees.world
    return ContextRow(tokens, requests, rate, prefill_seconds(runs_on, tokens, planning))
