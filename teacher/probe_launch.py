"""Starts a probe where the recipe's engine runs: in this process, or on every rank of this node."""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from configs.errors import UnusableInput
from configs.launch import die_with_parent, read_nodes, run_ranks
from configs.schema import DeepSpeedEngine, Recipe
from teacher.probe import Probe, probe, probe_from_json, probe_json

_MARK = "probe: "


def probe_recipe(recipe: Recipe, arguments: Sequence[str], environment: dict[str, str]) -> Probe | None:
    """Measured on all ranks of the launch; None on a node whose ranks were not the first (another node has the figures).

    arguments: the words that make `tracestill` call `probe_as_rank` with the same recipe.
    """
    if not isinstance(recipe.teacher.engine, DeepSpeedEngine):
        return probe(recipe)
    with tempfile.TemporaryDirectory(prefix="tracestill-probe-") as folder:
        log = Path(folder) / "probe.log"
        try:
            run_ranks(
                arguments, processes=recipe.teacher.ranks_per_node, extensions=Path(folder) / "torch_extensions", log=log,
                poll=_nothing, nodes=read_nodes(recipe.teacher.hardware.nodes, environment),
            )  # fmt: skip
        except UnusableInput:
            raise
        except Exception:
            sys.stderr.write(log.read_text(errors="replace")[-8000:])  # the folder goes, what it says must not
            raise
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(_MARK)]
    return probe_from_json(json.loads(lines[-1].removeprefix(_MARK))) if lines else None


def probe_as_rank(recipe: Recipe, rank: int, say: Callable[[str], None] = print) -> None:
    """One rank's part. The first says what was found."""
    die_with_parent()
    found = probe(recipe)
    if rank == 0:
        say(_MARK + json.dumps(probe_json(found)))


def _nothing() -> None: ...
