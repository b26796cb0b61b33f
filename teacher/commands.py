"""`tracestill prepare`, where the teacher's checkpoint is cut once into what each rank loads, and its half of `tracestill plan`.

tracestill.py names the commands. It imports this module for every `--help`, so each function imports what it needs.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console

from configs.options import AsJson, Config, DryRun, Overrides
from data.invocation import Invocation

if TYPE_CHECKING:
    from teacher.plan import Plan


def prepare(
    config: Config,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder of the shards. [default: beside the model]")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Once: cut the teacher's checkpoint into what each rank of the recipe's layout loads; a killed one continues."""
    from configs.logging import configure_logging
    from configs.progress import Display

    configure_logging()
    teacher = Invocation(config, overrides).load().recipe.teacher
    from teacher import prepare as preparation
    from teacher.checkpoint import shard_plan
    from teacher.checkpoint.source import checkpoint_folder

    layout, dtype = shard_plan.layout_of(teacher)
    folder = checkpoint_folder(teacher.model)
    output = output or shard_plan.default_output(teacher, layout, dtype)
    if dry_run:
        said = preparation.describe_plan(shard_plan.plan_shards(folder, layout, dtype), output)
    else:
        with Display("prepare", "MB", Console(stderr=True)) as display:
            said = preparation.describe_prepared(preparation.prepare(folder, output, layout, dtype, display.show))
    print(said.text)
    if as_json:
        print(json.dumps(said.values))


class Planned(NamedTuple):
    """One model's plan, printed. values: what --json says of it."""

    values: dict[str, object]
    refusal: str | None


def plan_teacher(named: Invocation, *, probe: bool) -> Planned:
    """probe: what fits is also loaded and measured here."""
    from teacher.plan import plan_recipe
    from teacher.planning.table import plan_json, plan_tables

    result = plan_recipe(named.load().recipe)
    Console(highlight=False).print(plan_tables(result))
    measured = _probe(result, named) if probe and result.refusal is None else {}
    return Planned(plan_json(result) | measured, result.refusal)


def _probe(result: "Plan", named: Invocation) -> dict[str, object]:
    from configs.devices import device_of
    from teacher.probe import probe_json, probe_table
    from teacher.probe_launch import probe_recipe

    loaded = named.load()
    words = [word for override in named.overrides or () for word in ("-s", override)]
    found = probe_recipe(loaded.recipe, ["plan", str(loaded.path), *words, "--probe"], dict(os.environ))
    if found is None:
        print("probe: the first rank runs on another node, which prints what was measured")
        return {}
    Console(highlight=False).print(probe_table(found, device_of(result.teacher.hardware.gpu)))
    return {"probe": probe_json(found)}
