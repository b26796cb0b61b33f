"""How fast a student trains, and what the recipe's data set then takes.

Arithmetic of a token, as it is done:
- a frozen weight: 2 forward, 2 for its input's gradient, none for its own; 2 more where layers are computed again;
- a trained weight: 2 more for its own gradient;
- the head: supervised positions only, forward and gradient, and its logits once more where it is trained itself;
- attention: 2 x length x width forward of a causal document (its two products, half of the square), twice that backward, once
  more where layers are computed again.
"""

from typing import NamedTuple

from configs.devices import WEIGHT_BYTES, Device, Links
from configs.lengths import Lengths
from configs.planning import Planning
from configs.training import Train
from student.planning.adapter import Adapter
from student.planning.shape import Shape
from student.planning.sharding import effective_stage

NETWORK_BYTES_PER_S = 50e9
"""Of one GPU to other nodes, one way: one 400 Gb/s port for every GPU."""


class Traces(NamedTuple):
    """The data set that a recipe's workload makes, were every trace of it kept. tokens: of a trace, on average. supervised: its
    output. square: mean of a trace's squared tokens."""

    number: int
    tokens: float
    supervised: float
    square: float


def traces_of(planning: Planning, outputs: Lengths) -> Traces:
    prompt = planning.workload.prompt_tokens
    return Traces(
        planning.workload.traces, prompt + outputs.mean, outputs.mean, prompt**2 + 2 * prompt * outputs.mean + outputs.square
    )


class Rate(NamedTuple):
    """flops_per_token: done, of all layers and the head. compute_s, network_s: of one packed row on the ranks that share it, at
    plan.train_efficiency of the peak and at the links' full rate; the longer of them counts. hours, dollars: of all epochs."""

    flops_per_token: float
    compute_s: float
    network_s: float
    tokens_per_s_per_gpu: float
    tokens: float
    steps: int
    hours: float
    dollars: float


def rate_of(shape: Shape, adapter: Adapter, train: Train, planning: Planning, device: Device, traces: Traces) -> Rate:
    flops = flops_per_token(shape, adapter, train, traces)
    row = train.max_tokens_per_row
    compute_s = row * flops / train.sequence_parallel / (device.flops(train.dtype) * planning.train_efficiency)
    network_s = row_network_s(shape, train, device, row)
    per_gpu = row / train.sequence_parallel / max(compute_s, network_s)
    tokens = traces.number * traces.tokens * train.epochs
    hours = tokens / (per_gpu * train.ranks) / 3600
    return Rate(
        flops, compute_s, network_s, per_gpu, tokens, max(1, round(tokens / row / train.rows_per_step)), hours,
        hours * train.ranks * planning.price_per_gpu_hour,
    )  # fmt: skip


def flops_per_token(shape: Shape, adapter: Adapter, train: Train, traces: Traces) -> float:
    again = 2 if train.activation_checkpointing else 0
    frozen = sum(module.count * module.inputs * module.outputs for module in shape.modules if module.kind == "linear")
    adapted = sum(module.count * (module.inputs + module.outputs) for module in adapter.targets if module.kind == "linear")
    whole = sum(module.count * module.inputs * module.outputs for module in adapter.saved if module.kind == "linear")
    head = 8 if any(module.kind == "head" for module in adapter.saved) else 4
    attention = shape.layers * shape.queries * (traces.square / traces.tokens) * (6 + again)
    return (
        (4 + again) * frozen
        + (6 + again) * adapter.lora.rank * adapted
        + 2 * whole
        + head * shape.hidden * shape.vocabulary * traces.supervised / traces.tokens
        + attention
    )


def row_network_s(shape: Shape, train: Train, device: Device, row_tokens: int) -> float:
    """Of one row: stage 3 gathers all weights for the forward and for the backward pass, and sequence parallelism sends queries,
    keys, values and outputs of every layer to the group and back, once more where layers are computed again. The adapter's
    gradients, once a step, are left out."""
    links, value_bytes = Links(device.link, NETWORK_BYTES_PER_S, train.processes), WEIGHT_BYTES[train.dtype]
    gathered = 2 * links.ring(shape.parameters * value_bytes, train.ranks) if effective_stage(train) == 3 else 0.0
    if train.sequence_parallel == 1:
        return gathered
    passes = 3 if train.activation_checkpointing else 2
    sent = row_tokens / train.sequence_parallel * 2 * (shape.queries + shape.keys) * value_bytes * shape.layers * passes
    return gathered + links.all_to_all(sent, train.sequence_parallel)
