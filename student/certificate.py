"""What training's certificate says, for whoever states it. No torch: a finished stage is recognised without loading anything."""

from typing import NamedTuple

from configs.schema import Recipe
from data.checksum import parse_checked
from data.store import RunFolder, sha256_file

SETTINGS = (
    "objective", "dtype", "zero_stage", "sequence_parallel", "activation_checkpointing", "offload", "liger", "processes", "nodes",
)  # fmt: skip
"""Of Train, on which the way to a gradient depends."""


class Certified(NamedTuple):
    """What metrics/certificate.json says of the recipe's gradients, and the file's sha256. others: settings that are not those of
    the recipe in hand."""

    sha256: str
    holds: bool
    largest_difference: float
    bound: float
    others: tuple[str, ...] = ()


def certified_settings(recipe: Recipe) -> dict[str, object]:
    """What a certificate stands for, by name."""
    train = recipe.train.model_dump(mode="json", include=set(SETTINGS))
    lora = recipe.student.lora.model_dump(mode="json")
    return {f"train.{name}": value for name, value in train.items()} | {f"student.lora.{name}": lora[name] for name in lora}


def read_certificate(run: RunFolder, recipe: Recipe) -> Certified | None:
    """None where `tracestill train --certify` was not run. Raises UnusableInput when the file is not what was written."""
    path = run.metrics / "certificate.json"
    if not path.is_file():
        return None
    said = parse_checked(path, path.read_bytes())
    stated, wanted = said.get("certified", {}), certified_settings(recipe)
    others = tuple(name for name in wanted if stated.get(name) != wanted[name])
    return Certified(sha256_file(path), said["holds"], said["largest_difference"], said["bound"], others)
