"""When a training does not fit: the nearest settings that do, by how few of them change, then by what the change costs."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from configs.training import Train
from student.planning.adapter import Adapter
from student.planning.memory import room_of, uneven_heads
from student.planning.shape import Shape

SHOWN = 3
SHORTEST_ROW = 1_024
SETTINGS = ("activation_checkpointing", "sequence_parallel", "zero_stage", "offload", "max_tokens_per_row", "longer_rows")
"""In the order of what they cost: a third more arithmetic, exchanges inside a node, gathers, the host's memory, traces."""


class Alternative(NamedTuple):
    """Settings that fit. needed: bytes of a GPU. overrides: what to add to the command line."""

    needed: int
    overrides: str


def nearest_settings(shape: Shape, adapter: Adapter, train: Train) -> tuple[Alternative, ...]:
    """At most three. Shorter rows drop the traces that no longer fit one, so they come last."""
    found = []
    for changed in sorted(_candidates(train), key=lambda one: _distance(train, one)):
        if uneven_heads(shape, changed.sequence_parallel) is None and (room := room_of(shape, adapter, changed)).fits:
            found.append(Alternative(room.needed, _overrides(train, changed)))
            if len(found) == SHOWN:
                break
    return tuple(found)


def _candidates(train: Train) -> Iterator[Train]:
    degrees = [train.sequence_parallel * 2**power for power in range(10)]
    shared = [degree for degree in degrees if train.processes % degree == 0 and train.row_lengths[-1] % degree == 0]
    stages, offloads = [stage for stage in (0, 2, 3) if stage >= train.zero_stage], ("none", "optimizer", "parameters")
    for checkpointing, degree, stage, offload, row in product(
        sorted({True, train.activation_checkpointing}), shared or degrees[:1], stages, offloads, _rows(train)
    ):
        if (offload == "none" or stage > 0) and (offload != "parameters" or stage == 3):
            longer = train.longer_rows if row == train.row_lengths[-1] else ()
            yield train.model_copy(
                update={
                    "activation_checkpointing": checkpointing, "sequence_parallel": degree, "zero_stage": stage,
                    "offload": offload, "longer_rows": longer, "max_tokens_per_row": min(row, train.max_tokens_per_row),
                }
            )  # fmt: skip


def _rows(train: Train) -> list[int]:
    """The longest row, its halves, and the recipe's common row without longer ones."""
    longest = train.row_lengths[-1]
    halves = {longest >> power for power in range(8) if longest >> power >= SHORTEST_ROW}
    return sorted({longest, train.max_tokens_per_row, *halves}, reverse=True)


def _distance(old: Train, new: Train) -> tuple[bool, int, list[float]]:
    """Shorter rows last; then fewest changes; then those that come first in SETTINGS, by the least of each."""
    changed = [getattr(old, name) != getattr(new, name) for name in SETTINGS]
    costs = [
        float(new.activation_checkpointing), float(new.sequence_parallel), float(new.zero_stage),
        float(("none", "optimizer", "parameters").index(new.offload)), -float(new.row_lengths[-1]),
    ]  # fmt: skip
    return old.row_lengths != new.row_lengths, sum(changed), costs[::-1]


def _overrides(old: Train, new: Train) -> str:
    changed = [name for name in SETTINGS if getattr(old, name) != getattr(new, name)]
    return " ".join(f"-s train.{name}={_yaml(getattr(new, name))}" for name in changed)


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "[]" if value == () else str(value)
