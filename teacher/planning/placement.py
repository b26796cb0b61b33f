"""Bytes on one GPU: weights by part, what comes on top of them, and the room that is left for the cache.

`weights` and what it leaves are the published table's arithmetic, every dense matrix cut as far as the layout says. What
the table leaves out is counted beside it, as `Extra` and `Transients`, and comes off the cache's budget.
"""

from math import ceil
from typing import NamedTuple

from configs.schema import Planning, Teacher
from teacher.planning.architecture import Architecture, Latent, Parts
from teacher.planning.devices import WEIGHT_BYTES, Degrees

SCALE_BYTES = {"fp8": 4 / 128**2, "int4": 2 / 128}
"""Per weight: one float32 a block of 128 x 128 (fp8), one bf16 a group of 128 (int4)."""
TILES_BYTES = 1 << 30
"""Bound of the tiles that sparse attention works in at a time: index scores, then selected or expanded keys."""
MASK_BYTES = 1 << 30
"""Bound of a prefill pass's mask, one byte for each pair of a token and a column (decode.Limits.prefill_pairs)."""


class Extra(NamedTuple):
    """Bytes beyond `weights`. uncut: matrices that tensor parallelism leaves whole on each rank, less their share.
    unquantised: embeddings, head, router and norms, which quantised checkpoints keep in bf16. scales: of quantised blocks."""

    uncut: int
    unquantised: int
    scales: int


class Transients(NamedTuple):
    """Bytes that live for one pass. gathered: ZeRO-3's largest whole unit (a decoder layer, or the embedding) and the next
    one. attention: expanded keys of the context, or with an indexer the tiles of float32 scores [queries, heads, tokens] and
    of keys. mask: of a prefill pass. activations: residual stream, queries and attention output of it. dispatch: tokens
    sent to experts and back with the experts' hidden layer, at even load. logits: of all slots, in float32, three times
    (sorted, summed up)."""

    gathered: int
    attention: int
    mask: int
    activations: int
    dispatch: int
    logits: int


class Room(NamedTuple):
    """Where a GPU's memory goes. free: what weights leave of the usable share. cache: what is left of that after extra
    and transients. Both None where the device's size is unknown; both may be negative."""

    usable: int | None
    weights: Parts
    extra: Extra
    transients: Transients

    @property
    def free(self) -> int | None:
        return None if self.usable is None else self.usable - self.weights.total

    @property
    def cache(self) -> int | None:
        return None if self.free is None else self.free - sum(self.extra) - sum(self.transients)


class Cache(NamedTuple):
    """Where requests' caches lie: `pools` of equal size, each of `pool_bytes`; a request is in one of them, taking
    `token_bytes` of it per token. Replicated: a pool is a replica's GPU (its tensor-parallel peers hold the same; heads of
    grouped-query attention are cut). Sharded by token: a pool is a node."""

    pools: int
    pool_bytes: int | None
    token_bytes: float

    @property
    def max_tokens(self) -> int | None:
        """The longest single request."""
        return None if self.pool_bytes is None else max(0, int(self.pool_bytes // self.token_bytes))

    def requests(self, tokens: int) -> int | None:
        """Requests of that length that fit the whole launch."""
        return None if self.pool_bytes is None else self.pools * max(0, int(self.pool_bytes // (self.token_bytes * tokens)))


def cut_weights(parts: Parts, degrees: Degrees, bytes_per_weight: float) -> Parts:
    """Bytes of each part on one GPU."""
    dense = degrees.world if degrees.zero else degrees.tensor
    routed = degrees.world if degrees.zero else degrees.expert_slices
    return Parts(*(ceil(size * bytes_per_weight / dense) for size in parts))._replace(
        routed_experts=ceil(parts.routed_experts * bytes_per_weight / routed)
    )


def uncut_parameters(architecture: Architecture, degrees: Degrees) -> int:
    """Parameters of matrices that each tensor-parallel rank holds whole: projections into latents, indexers, routers and
    norms; under DeepSpeed the input embedding too."""
    parts = architecture.parts
    whole = architecture.layers * architecture.attention.query_down + parts.indexer + parts.router + parts.norms
    return whole + (0 if degrees.server else parts.embeddings)


def extra_bytes(architecture: Architecture, degrees: Degrees, dtype: str) -> Extra:
    parts, per_weight = architecture.parts, WEIGHT_BYTES[dtype]
    tensor = degrees.tensor
    uncut = uncut_parameters(architecture, degrees) * per_weight * (1 - 1 / tensor)
    if degrees.zero:
        uncut /= degrees.replicas
    high = (parts.embeddings + parts.head + parts.router + parts.norms) * max(0.0, 2.0 - per_weight) / tensor
    quantised = dtype in SCALE_BYTES
    weights = cut_weights(parts, degrees, 1.0).total if quantised else 0
    return Extra(int(uncut), int(high) if quantised else 0, int(weights * SCALE_BYTES.get(dtype, 0.0)))


def transient_bytes(
    architecture: Architecture, degrees: Degrees, dtype: str, *, chunk: int, context: int, slots: int
) -> Transients:
    """chunk: prompt tokens of a pass. context: columns it looks at. slots: rows that decode together on a rank."""
    attention, hidden, tensor = architecture.attention, architecture.hidden, degrees.tensor
    value_bytes = 4 if dtype == "fp32" else 2
    layer, embedding = architecture.layer_dense / tensor, architecture.vocabulary * hidden
    gathered = (max(layer, embedding) + layer) * value_bytes if degrees.zero and degrees.replicas > 1 else 0.0
    if degrees.zero and degrees.expert < degrees.world:
        gathered += architecture.num_experts * architecture.expert * value_bytes / degrees.expert
    if isinstance(attention, Latent):
        per_query, per_key = attention.nope + attention.rotary + attention.value, attention.nope + attention.value
    else:
        per_query, per_key = 2 * attention.head_dim, 0  # grouped keys are read where they lie
    keys = context * attention.heads * per_key * value_bytes // tensor
    scores = chunk * attention.index_heads * context * 4
    tiled = attention.num_indexers or degrees.server
    slices = min(tensor, degrees.expert_slices)
    routed = chunk * architecture.experts_per_token * (2 * hidden + 3 * architecture.expert_hidden) // slices
    return Transients(
        gathered=int(gathered),
        attention=min(TILES_BYTES, max(keys, scores)) if tiled else keys,
        mask=0 if degrees.server else min(MASK_BYTES, chunk * context),
        activations=chunk * (4 * hidden + 2 * attention.heads * per_query // tensor) * value_bytes,
        dispatch=routed * value_bytes,
        logits=3 * slots * architecture.vocabulary * 4,
    )


def room(architecture: Architecture, teacher: Teacher, degrees: Degrees, usable: int | None, planning: Planning) -> Room:
    """The budget of one GPU under the recipe's engine, for requests of up to the model's positions."""
    dtype = teacher.engine.dtype
    context = architecture.max_positions
    slots = getattr(teacher.engine, "batch_size", 0) or ceil(getattr(teacher.engine, "concurrency", 1) / degrees.replicas)
    return Room(
        usable,
        cut_weights(architecture.parts, degrees, WEIGHT_BYTES[dtype]),
        extra_bytes(architecture, degrees, dtype),
        transient_bytes(
            architecture, degrees, dtype, chunk=min(planning.prefill_chunk_tokens, context), context=context, slots=slots
        ),
    )


def cache_dtype(teacher: Teacher) -> str:
    """The cache's dtype: as stated, else what the engine computes in (a server computes fp8 and int4 weights in bf16)."""
    computed = teacher.engine.dtype if teacher.engine.dtype in ("fp32", "bf16") else "bf16"
    return getattr(teacher.engine, "kv_dtype", None) or computed


def cache(architecture: Architecture, teacher: Teacher, degrees: Degrees, budget: int | None) -> Cache:
    """budget: bytes per GPU (Room.cache)."""
    per_value = WEIGHT_BYTES[cache_dtype(teacher)]
    if degrees.kv_sharded:
        node = None if budget is None else budget * degrees.ranks_per_node
        return Cache(degrees.nodes, node, architecture.cache_values() * per_value)
    return Cache(degrees.replicas, budget, architecture.cache_values(degrees.tensor) * per_value)
