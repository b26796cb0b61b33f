"""Bytes of one rank's weights, gradients and optimizer under DeepSpeed 0.19's ZeRO, by its own rules of padding.

- Stages 1 and 2 flatten the trained tensors into one, padded to a multiple of 2 x ranks elements, and give every rank an equal
  part; frozen weights and the flat adapter itself stay whole on each rank.
- Stage 3 cuts each tensor by itself into ceil(elements / ranks), frozen ones too; those of at most 100,000 elements
  (train.engine_config.ZERO3_PERSISTENCE_THRESHOLD) stay whole on every rank beside their slice.
- Gradients of micro-batches are added up in float32; at stage 2 in float32 a tensor that lies across two parts is whole in both
  until the step ends, which is not counted. Masters and AdamW's two moments are float32. Stage 0 has no masters; the others have
  them in float32 too, where they are a copy.

A test compares every figure with what two ranks hold.
"""

from collections import Counter
from math import ceil
from typing import NamedTuple

from configs.devices import WEIGHT_BYTES
from configs.training import Train

ALIGNMENT = 2
"""Elements: the start of every rank's part is a multiple of it (nccl_start_alignment_factor)."""
PERSISTENCE_THRESHOLD = 100_000
BUCKET_ELEMENTS = 500_000_000
"""Of gradients that are reduced at once, at most (train.engine_config.REDUCE_BUCKET)."""
LIVE_ELEMENTS = 1_000_000_000
"""That stage 3 keeps gathered at a time (stage3_max_live_parameters)."""
MASTER_BYTES, MOMENT_BYTES, GRADIENT_BYTES = 4, 8, 4


class State(NamedTuple):
    """Bytes of one rank. weights: frozen. adapter: what is trained, in the compute dtype. persistent: small tensors whole beside
    their slices."""

    weights: int
    adapter: int
    persistent: int
    gradients: int
    masters: int
    moments: int


class Placed(NamedTuple):
    """Where offloading leaves a rank's state."""

    gpu: State
    host: State


def effective_stage(train: Train) -> int:
    """Stage 0 in bf16 runs as stage 2 (train.engine_config.deepspeed_config)."""
    return 2 if train.zero_stage == 0 and train.dtype == "bf16" else train.zero_stage


def rank_state(frozen: Counter[int], trained: Counter[int], train: Train) -> State:
    """frozen, trained: tensors by their number of elements. The ranks of a sequence-parallel group are data-parallel to ZeRO."""
    value_bytes, stage, ranks = int(WEIGHT_BYTES[train.dtype]), effective_stage(train), train.ranks
    whole, elements = _elements(frozen), _elements(trained)
    if stage == 0:
        return State(value_bytes * whole, value_bytes * elements, 0, GRADIENT_BYTES * elements, 0, MOMENT_BYTES * elements)
    if stage == 2:
        part = ceil(elements / (ALIGNMENT * ranks)) * ALIGNMENT
        flat = part * ranks
        return State(value_bytes * whole, value_bytes * flat, 0, GRADIENT_BYTES * part, MASTER_BYTES * part, MOMENT_BYTES * part)
    part = _slices(trained, ranks)
    return State(
        weights=value_bytes * _slices(frozen, ranks),
        adapter=value_bytes * part,
        persistent=value_bytes * (_small(frozen) + _small(trained)),
        gradients=GRADIENT_BYTES * part,
        masters=MASTER_BYTES * part,
        moments=MOMENT_BYTES * part,
    )


def placed(state: State, train: Train) -> Placed:
    """optimizer: masters, moments and the gradients they are made with. parameters: also all slices of weights; what is
    persistent stays."""
    nothing = State(0, 0, 0, 0, 0, 0)
    if train.offload == "none":
        return Placed(state, nothing)
    host = state._replace(weights=0, adapter=0, persistent=0)
    if train.offload == "parameters":
        host = state._replace(persistent=0)
    return Placed(State(*(all_of - away for all_of, away in zip(state, host, strict=True))), host)


def _elements(tensors: Counter[int]) -> int:
    return sum(size * count for size, count in tensors.items())


def _slices(tensors: Counter[int], ranks: int) -> int:
    return sum(ceil(size / ranks) * count for size, count in tensors.items())


def _small(tensors: Counter[int]) -> int:
    return sum(size * count for size, count in tensors.items() if size <= PERSISTENCE_THRESHOLD)


class Buffers(NamedTuple):
    """Bytes that DeepSpeed works in. reduced: its bucket of gradients under way, in the dtype they are sent in. gathered: whole
    weights that stage 3 has assembled, or brought back from the host, at a time: its limit, or the head and one layer, or one
    tensor, where that is more; at most the model."""

    reduced: int
    gathered: int


def buffers(frozen: Counter[int], trained: Counter[int], train: Train, *, largest: int) -> Buffers:
    """largest: elements of the head and one layer."""
    stage, value_bytes = effective_stage(train), int(WEIGHT_BYTES[train.dtype])
    bucket = min(BUCKET_ELEMENTS, _elements(trained))
    if stage == 0:
        return Buffers(bucket * GRADIENT_BYTES, 0)
    if stage == 2 or (train.ranks == 1 and train.offload != "parameters"):
        return Buffers(bucket * value_bytes, 0)
    total = _elements(frozen) + _elements(trained) - _small(frozen) - _small(trained)
    return Buffers(bucket * value_bytes, min(total, max(LIVE_ELEMENTS, largest, *frozen, *trained)) * value_bytes)
