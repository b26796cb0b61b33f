"""A GPU's memory under a training's settings, and whether it is enough."""

from typing import NamedTuple

from configs.devices import device_of
from configs.training import Train
from student.planning.activations import Activations, activations
from student.planning.adapter import Adapter, frozen_tensors
from student.planning.shape import Shape
from student.planning.sharding import Buffers, Placed, buffers, placed, rank_state


class Room(NamedTuple):
    """Where a GPU's memory goes, in bytes, at the longest row. usable: None where the device's size is unknown. host: of
    each rank, in the node's own memory."""

    usable: int | None
    row_tokens: int
    state: Placed
    buffers: Buffers
    activations: Activations

    @property
    def needed(self) -> int:
        return sum(self.state.gpu) + sum(self.buffers) + self.activations.total

    @property
    def headroom(self) -> int | None:
        """Negative where it does not fit."""
        return None if self.usable is None else self.usable - self.needed

    @property
    def fits(self) -> bool | None:
        return None if self.headroom is None else self.headroom >= 0


def room_of(shape: Shape, adapter: Adapter, train: Train) -> Room:
    device, row_tokens = device_of(train.gpu), train.row_lengths[-1]
    frozen = frozen_tensors(shape)
    return Room(
        usable=device.usable if device else None,
        row_tokens=row_tokens,
        state=placed(rank_state(frozen, adapter.tensors, train), train),
        buffers=buffers(frozen, adapter.tensors, train, largest=shape.layer_parameters + shape.hidden * shape.vocabulary),
        activations=activations(shape, adapter, train, row_tokens),
    )


def refusal_of(shape: Shape, train: Train, room: Room) -> str | None:
    """Why these settings cannot be, in words; None when they can, or when nobody knows."""
    if (reason := uneven_heads(shape, train.sequence_parallel)) is not None:
        return reason
    if room.headroom is None or room.headroom >= 0:
        return None
    assert room.usable is not None
    state, kept = (sum(room.state.gpu) + sum(room.buffers)) / 1e9, room.activations.total / 1e9
    return (
        f"{state:.1f} GB of weights, optimizer and buffers and {kept:.1f} GB of activations of a row of {room.row_tokens:,} "
        f"tokens do not fit {room.usable / 1e9:.1f} GB of each {train.gpu}: {-room.headroom / 1e9:.1f} GB short per GPU"
    )


def uneven_heads(shape: Shape, degree: int) -> str | None:
    """Ulysses deals heads out; key heads it also copies, so they may divide the degree instead."""
    if shape.heads % degree:
        return f"train.sequence_parallel {degree} does not divide the student's {shape.heads} attention heads"
    if shape.kv_heads % degree and degree % shape.kv_heads:
        return f"train.sequence_parallel {degree} and the student's {shape.kv_heads} key heads do not divide one another"
    return None
