"""What training a recipe's student takes, whether it fits, how long and at what price: arithmetic over its config.json and the
recipe. Nothing is loaded and torch is not imported. The formulas are in planning/; here they become one value.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from configs.devices import device_of
from configs.errors import UnusableInput
from configs.lengths import output_lengths
from configs.planning import Planning
from configs.schema import Recipe
from configs.training import Train
from student.folders import EMBEDDED
from student.planning.adapter import Adapter, adapter_of
from student.planning.memory import Room, refusal_of, room_of
from student.planning.nearest import Alternative, nearest_settings
from student.planning.rate import Rate, Traces, rate_of, traces_of
from student.planning.shape import Shape, read_shape

REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class StudentPlan:
    """rate: None where the device's speed is unknown or the training does not fit. why_not: why it cannot be; None when it can,
    or when nobody knows. alternatives: settings near these that fit, when they do not."""

    name: str
    model: str
    train: Train
    planning: Planning
    shape: Shape
    adapter: Adapter
    room: Room
    traces: Traces
    rate: Rate | None
    why_not: str | None
    alternatives: tuple[Alternative, ...]

    @property
    def refusal(self) -> str | None:
        """On one line, with what could be."""
        if self.why_not is None:
            return None
        found = "; ".join(one.overrides for one in self.alternatives)
        return f"{self.name}: {self.why_not}; " + (f"nearest that fit: {found}" if found else "no settings near these fit")


def plan_student(recipe: Recipe) -> StudentPlan:
    """A training that does not fit is a plan like any other, with a refusal; on a CPU nothing is refused.

    Raises:
        UnusableInput: the student's folder or configuration cannot be read, its family has no formula, LoRA names no module of
            it, or a figure is beyond counting.
    """
    try:
        return _plan(recipe)
    except OverflowError as error:
        raise UnusableInput(f"{recipe.name}: a figure of the recipe is too large to count with ({error}); lower it") from error


def _plan(recipe: Recipe) -> StudentPlan:
    train, planning, device = recipe.train, recipe.plan, device_of(recipe.train.gpu)
    shape = shape_of(recipe.student.model)
    adapter = adapter_of(shape, recipe.student.lora)
    room = room_of(shape, adapter, train)
    traces = traces_of(planning, output_lengths(planning.workload, recipe.generate.sampling.max_tokens))
    why_not = refusal_of(shape, train, room) if device else None
    return StudentPlan(
        recipe.name, recipe.student.model, train, planning, shape, adapter, room, traces,
        rate=rate_of(shape, adapter, train, planning, device, traces) if device and why_not is None else None,
        why_not=why_not,
        alternatives=nearest_settings(shape, adapter, train) if why_not else (),
    )  # fmt: skip


def shape_of(model: str) -> Shape:
    """Of `student.model`: a folder, relative to the working directory or else to this repository, where the shipped
    architectures lie. Weights are not needed."""
    where, folder = f"student.model {model}", EMBEDDED if model == "embedded" else Path(model)
    if not folder.is_dir():
        folder = REPOSITORY / model
    if not folder.is_dir():
        raise UnusableInput(f"{where}: no such folder; expected a Hugging Face checkpoint folder, or `embedded`")
    path = folder / "config.json"
    if not path.is_file():
        raise UnusableInput(f"{where}: no config.json in the folder; expected a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of 5,000 digits, brackets without end
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnusableInput(f"{where}: config.json cannot be read ({said}); restore the file") from error
    if not isinstance(config, dict):
        raise UnusableInput(f"{where}: config.json is a JSON {type(config).__name__}, expected an object; restore the file")
    return read_shape(config, where)
