"""The weights of one rank: how many parameters of each part, in how many bytes. Memory (placement.py) and a pass's reads,
products and gathers (throughput.py) are taken from this one account."""

from math import ceil
from typing import NamedTuple

from configs.devices import WEIGHT_BYTES
from teacher.planning.architecture import Architecture, Parts
from teacher.planning.degrees import Degrees

SCALE_BYTES = {"fp8": 4 / 128**2, "int4": 2 / 128}
"""Per weight: one float32 a block of 128 x 128 (fp8), one bf16 a group of 128 (int4)."""
KEPT_IN_BF16 = Parts(embeddings=1, head=1, router=1, norms=1)
"""What quantised checkpoints do not quantise."""


class RankWeights(NamedTuple):
    """One rank's weights by part, as its passes use them: what ZeRO keeps in slices is gathered here.

    parameters: their number. even: bytes, if every dense matrix were cut as far as the layout says and experts over their
    slices, which is the published table's arithmetic. On top of that, in bytes: uncut, matrices that tensor parallelism leaves
    whole, less their even share; unquantised, what a quantised checkpoint keeps in bf16; scales, of its quantised blocks."""

    parameters: Parts
    even: Parts
    uncut: Parts
    unquantised: Parts
    scales: Parts

    @property
    def num_bytes(self) -> Parts:
        """Everything, by part."""
        return Parts(*map(sum, zip(self.even, self.uncut, self.unquantised, self.scales, strict=True)))


def rank_weights(architecture: Architecture, degrees: Degrees, dtype: str) -> RankWeights:
    parts, whole, per_weight = architecture.parts, whole_parameters(architecture, degrees), WEIGHT_BYTES[dtype]
    parameters = cut_weights(Parts(*map(int.__sub__, parts, whole)), degrees._replace(zero=False), 1.0)
    parameters = Parts(*map(int.__add__, parameters, whole))
    even = cut_weights(parts, degrees._replace(zero=False), per_weight)
    scale, more = SCALE_BYTES.get(dtype, 0.0), 2.0 - per_weight if dtype in SCALE_BYTES else 0.0
    return RankWeights(
        parameters,
        even,
        uncut=Parts(*(ceil(size * per_weight) - cut for size, cut in zip(parameters, even, strict=True))),
        unquantised=Parts(*(int(size * more * kept) for size, kept in zip(parameters, KEPT_IN_BF16, strict=True))),
        scales=Parts(*(int(size * scale * (1 - kept)) for size, kept in zip(parameters, KEPT_IN_BF16, strict=True))),
    )


def whole_parameters(architecture: Architecture, degrees: Degrees) -> Parts:
    """Parameters that every tensor-parallel rank uses whole: projections into latents, indexers, routers and norms; under
    DeepSpeed the input embedding too (servers cut it by rows)."""
    parts = architecture.parts
    return Parts(
        embeddings=0 if degrees.server else parts.embeddings,
        norms=parts.norms,
        attention=architecture.layers * architecture.attention.query_down,
        indexer=parts.indexer,
        router=parts.router,
    )


def cut_weights(parts: Parts, degrees: Degrees, bytes_per_weight: float) -> Parts:
    """Bytes of each part on one GPU, all of it cut as far as the layout says."""
    dense = degrees.world if degrees.zero else degrees.tensor
    routed = degrees.world if degrees.zero else degrees.expert_slices
    return Parts(*(ceil(size * bytes_per_weight / dense) for size in parts))._replace(
        routed_experts=ceil(parts.routed_experts * bytes_per_weight / routed)
    )


class Extra(NamedTuple):
    """Bytes in memory beyond the even cut, by their reason: the sums of RankWeights' columns, in ZeRO's slices if there are
    any."""

    uncut: int
    unquantised: int
    scales: int


def extra_bytes(architecture: Architecture, degrees: Degrees, dtype: str) -> Extra:
    """ZeRO slices what tensor parallelism leaves whole over all ranks, so nothing is held twice; but for the routers, which
    AutoEP makes anew and ZeRO then slices over the replicas alone."""
    held = rank_weights(architecture, degrees, dtype)
    uncut = sum(held.uncut)
    if degrees.zero:
        uncut = ceil(held.uncut.router / degrees.replicas) if degrees.expert > 1 else 0
    return Extra(uncut, sum(held.unquantised), sum(held.scales))


class Gathered(NamedTuple):
    """Bytes that ZeRO-3 assembles on a rank each pass, by the ranks that hold the slices: all of them, those with the same
    tensor-parallel slice (`tensor` apart), or those with the same experts (`expert` apart). Zero where there is one such
    rank."""

    everywhere: float
    replicas: float
    experts: float


def gathered_weights(architecture: Architecture, degrees: Degrees, dtype: str) -> Gathered:
    if not degrees.zero:
        return Gathered(0.0, 0.0, 0.0)
    held, whole = rank_weights(architecture, degrees, dtype).num_bytes, whole_parameters(architecture, degrees)
    everywhere = WEIGHT_BYTES[dtype] * (whole.total - (whole.router if degrees.expert > 1 else 0))
    return Gathered(
        everywhere if degrees.world > 1 else 0.0,
        held.dense - everywhere if degrees.replicas > 1 else 0.0,
        held.routed_experts if degrees.expert < degrees.world else 0.0,
    )
