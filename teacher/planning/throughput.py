"""How fast a placed teacher can be: bytes and operations of one decode step and of one prompt, against what the GPUs can
move and multiply. The bound is the slowest of memory, arithmetic and links, as if they overlapped perfectly; nothing is
faster, and what is reached is a stated share of it (plan.efficiency).

Of a decode step, per GPU (C requests in flight, b of them on a replica, t tensor-parallel ranks, e ranks a copy of the
experts):

- weights read: of the dense ones the slices and what tensor parallelism leaves whole (weights.py; the embedding is looked up),
  and of its E / e experts those that the step's tokens chose. n tokens choosing k of E experts evenly touch the share
  1 - (1 - k/E)^n of them: 0.9997 at n = 256, 0.22 at n = 8 (GLM-5.2);
- cache read: b requests, on every tensor-parallel rank the same; with a sparse indexer the selected latents and all
  indexer keys;
- gathered: what ZeRO-3 assembles each step: the dense weights above (37 GB for GLM-5.2 in BF16 where t = 1), and the experts
  that are not spread by expert parallelism over all ranks (1.49 TB without any);
- all-to-all: b k / t tokens' hidden states to the experts and back, on every sparse layer, in 16 bits;
- tensor parallel: two sums of the hidden states a layer, and under AutoEP the experts' answers to the other ranks' share.
"""

from typing import NamedTuple

from configs.devices import WEIGHT_BYTES, Device, Links
from configs.planning import Planning
from configs.schema import Teacher
from teacher.planning.architecture import Architecture, Parts
from teacher.planning.degrees import Degrees
from teacher.planning.placement import cache_dtype
from teacher.planning.weights import RankWeights, gathered_weights, rank_weights

ACTIVATION_BYTES = 2


class Traffic(NamedTuple):
    """Bytes per GPU and pass. all_to_all counts what leaves the GPU."""

    dense_read: float
    experts_read: float
    cache_read: float
    gathered: float
    all_to_all: float
    tensor_parallel: float


class Step(NamedTuple):
    """One decode step of the whole launch. Seconds are at full bandwidth and peak arithmetic. weights_s is the part of
    memory_s that reading weights takes: the bound that public tables quote."""

    concurrency: int
    context_tokens: int
    traffic: Traffic
    weights_s: float
    memory_s: float
    compute_s: float
    network_s: float

    @property
    def bound_s(self) -> float:
        return max(self.memory_s, self.compute_s, self.network_s)

    @property
    def bound_by(self) -> str:
        seconds = {"memory": self.memory_s, "compute": self.compute_s, "network": self.network_s}
        return max(seconds, key=lambda name: seconds[name])

    def tokens_per_s(self, efficiency: float = 1.0) -> float:
        """Output tokens a second of the whole launch."""
        return efficiency * self.concurrency / self.bound_s


class Machine(NamedTuple):
    """Everything a rate depends on besides the load."""

    architecture: Architecture
    degrees: Degrees
    device: Device
    links: Links
    dtype: str
    kv_dtype: str

    @property
    def weights(self) -> RankWeights:
        """What a rank uses in a pass: the account that its memory is taken from too."""
        return rank_weights(self.architecture, self.degrees, self.dtype)


def machine(architecture: Architecture, teacher: Teacher, degrees: Degrees, device: Device) -> Machine:
    links = Links(device.link, teacher.hardware.network_gb_per_s * 1e9, degrees.ranks_per_node)
    return Machine(architecture, degrees, device, links, teacher.engine.dtype, cache_dtype(teacher))


def touched_share(num_experts: int, experts_per_token: int, tokens: float) -> float:
    """Expected share of the experts that at least one of `tokens` chooses, all experts being equally likely."""
    return 1 - (1 - experts_per_token / num_experts) ** tokens if num_experts else 0.0


def decode_step(machine: Machine, concurrency: int, context: int) -> Step:
    """concurrency: requests in flight over the launch. context: tokens each of them has in the cache."""
    model, degrees, device = machine.architecture, machine.degrees, machine.device
    requests = concurrency / degrees.replicas
    traffic = Traffic(
        dense_read=multiplied(model, machine.weights.num_bytes),
        experts_read=_experts_read(machine, concurrency),
        cache_read=_cache_read(machine, concurrency, context),
        gathered=gathered_bytes(machine),
        all_to_all=_all_to_all_bytes(machine, requests) * (1 - 1 / degrees.expert),
        tensor_parallel=_tensor_parallel_bytes(machine, requests),
    )
    weights_s = (traffic.dense_read + traffic.experts_read) / device.bandwidth
    return Step(
        concurrency,
        context,
        traffic,
        weights_s,
        memory_s=weights_s + (traffic.cache_read + traffic.gathered) / device.bandwidth,
        compute_s=_decode_flops(machine, concurrency, context) / device.flops(machine.dtype),
        network_s=gather_s(machine) + token_network_s(machine, requests),
    )


def prefill_seconds(machine: Machine, tokens: int, planning: Planning, *, alone: bool = True) -> float:
    """Time to the first token of a prompt of that length, while every replica loads one of its own. Arithmetic at
    plan.prefill_efficiency of the peak, or the passes' reads of all weights, or the links, whichever takes longest; memory and
    links at their full rates, and no collective's latency.

    Arithmetic is 2 x active parameters a token, attention in its cheaper form, and the indexers' T^2 / 2 scores, which
    no tensor parallelism cuts: of GLM-5.2 on 8 ranks they are the larger half from 0.1 M tokens on. alone: the prompt has
    its passes to itself; else short prompts share them."""
    model, degrees, device = machine.architecture, machine.degrees, machine.device
    attention, weights = model.attention, machine.weights
    parameters = weights.parameters
    dense = parameters.dense - parameters.embeddings - parameters.head  # the head answers for the last token only
    flops = 2.0 * tokens * (dense + _routed_per_token(machine))
    flops += attention.prefill_flops(model.layers, tokens) / degrees.tensor
    flops += attention.index_flops(tokens * tokens / 2) / (degrees.tensor if degrees.kv_sharded else 1)
    passes = tokens / planning.prefill_chunk_tokens
    passes = max(1.0, passes) if alone else passes
    read = multiplied(model, weights.num_bytes) + weights.num_bytes.routed_experts
    return max(
        flops / (device.flops(machine.dtype) * planning.prefill_efficiency),
        passes * read / device.bandwidth,
        passes * gather_s(machine) + token_network_s(machine, tokens),
    )


def multiplied(model: Architecture, parts: Parts) -> int:
    """Of `parts` the dense ones that a token is multiplied with: an embedding is looked up, unless it is the head too."""
    return parts.dense - (0 if model.tied else parts.embeddings)


def gathered_bytes(machine: Machine) -> float:
    return sum(gathered_weights(machine.architecture, machine.degrees, machine.dtype))


def gather_s(machine: Machine) -> float:
    """Seconds of one pass's ZeRO-3 gathers."""
    degrees, links = machine.degrees, machine.links
    found = gathered_weights(machine.architecture, degrees, machine.dtype)
    return (
        links.ring(found.everywhere, degrees.world)
        + links.ring(found.replicas, degrees.replicas, degrees.tensor)
        + links.ring(found.experts, degrees.world // degrees.expert, degrees.expert)
    )


def token_network_s(machine: Machine, tokens: float) -> float:
    """Seconds on the links for `tokens` of one replica: to the experts and back, and between tensor-parallel ranks."""
    degrees, links = machine.degrees, machine.links
    expert = links.all_to_all(_all_to_all_bytes(machine, tokens), degrees.expert)
    return expert + _tensor_parallel_bytes(machine, tokens) / links.within(degrees.tensor)


def _experts_read(machine: Machine, concurrency: int) -> float:
    """One copy of the experts serves the requests of all ranks it is spread over."""
    model, degrees = machine.architecture, machine.degrees
    tokens = concurrency * max(degrees.expert_slices, degrees.tensor) / degrees.world
    share = touched_share(model.num_experts, model.experts_per_token, tokens)
    return share * machine.weights.num_bytes.routed_experts


def _cache_read(machine: Machine, concurrency: int, context: int) -> float:
    model, degrees, per_value = machine.architecture, machine.degrees, WEIGHT_BYTES[machine.kv_dtype]
    if degrees.kv_sharded:
        return concurrency * per_value * model.attention.values_read(model.layers, context) / degrees.world
    read = model.attention.values_read(model.layers, context, degrees.tensor)
    return concurrency / degrees.replicas * per_value * read


def _decode_flops(machine: Machine, concurrency: int, context: int) -> float:
    model, degrees = machine.architecture, machine.degrees
    requests = concurrency / degrees.replicas
    index = model.attention.index_flops(requests * context) / (degrees.tensor if degrees.kv_sharded else 1)
    attention = requests * model.attention.decode_flops(model.layers, context) / degrees.tensor
    dense = multiplied(model, machine.weights.parameters)
    return 2.0 * requests * (dense + _routed_per_token(machine)) + attention + index


def _routed_per_token(machine: Machine) -> float:
    """Parameters of routed experts that a rank multiplies for each token of its replica: other ranks' tokens come for those
    that leave, and tensor-parallel ranks share the work."""
    model, degrees = machine.architecture, machine.degrees
    return model.sparse_layers * model.experts_per_token * model.expert / min(degrees.tensor, degrees.expert_slices)


def _all_to_all_bytes(machine: Machine, tokens: float) -> float:
    """To all experts, one's own rank's among them. AutoEP gives each tensor-parallel rank its share of the tokens."""
    model, degrees = machine.architecture, machine.degrees
    if degrees.expert == 1:
        return 0.0
    sent = tokens / degrees.tensor * model.experts_per_token * model.hidden * ACTIVATION_BYTES
    return 2.0 * sent * model.sparse_layers


def _tensor_parallel_bytes(machine: Machine, tokens: float) -> float:
    model, degrees = machine.architecture, machine.degrees
    others = (degrees.tensor - 1) / degrees.tensor
    hidden = tokens * model.hidden * ACTIVATION_BYTES * others
    answers = model.sparse_layers * model.experts_per_token if degrees.expert > 1 and not degrees.server else 0
    return hidden * (4 * model.layers + answers)
