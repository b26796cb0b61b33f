"""Bytes on one GPU: weights by part, what comes on top of them, and the room that is left for the cache.

`weights` and what it leaves are the published table's arithmetic, every dense matrix cut as far as the layout says. What
the table leaves out is counted beside it, as `Extra` (weights.py) and `Transients`, and comes off the cache's budget.
"""

from math import ceil
from typing import NamedTuple

from configs.devices import WEIGHT_BYTES
from configs.planning import Planning
from configs.sampling import Sampling
from configs.schema import HttpEngine, Teacher
from teacher.planning.architecture import Architecture, Latent, Parts
from teacher.planning.degrees import Degrees
from teacher.planning.weights import Extra, cut_weights, extra_bytes

TILES_BYTES = 1 << 30
"""Bound of the tiles that sparse attention works in at a time: index scores, then selected or expanded keys."""
MASK_BYTES = 1 << 30
"""Bound of a prefill pass's mask, one byte for each pair of a token and a column (decode.Limits.prefill_pairs)."""
ANY_SAMPLING = Sampling(temperature=1.0, top_p=0.5)
"""Of all samplings one that holds the most: it sorts the vocabulary."""


class Transients(NamedTuple):
    """Bytes that live for one pass. gathered: ZeRO-3's largest whole unit (a decoder layer, or the embedding) and the next
    one. attention: expanded keys of the context, or with an indexer the tiles of float32 scores [queries, heads, tokens] and
    of keys. mask: of a prefill pass. activations: residual stream, queries and attention output of it. dispatch: tokens
    sent to experts and back with the experts' hidden layer, at even load. logits: of all slots, with what choosing tokens by
    them holds (`sampling_bytes`)."""

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


def transient_bytes(
    architecture: Architecture, degrees: Degrees, dtype: str, sampling: Sampling, *, chunk: int, context: int, slots: int
) -> Transients:
    """chunk: prompt tokens of a pass. context: columns it looks at. slots: rows that decode together on a rank."""
    attention, hidden, tensor = architecture.attention, architecture.hidden, degrees.tensor
    value_bytes = 4 if dtype == "fp32" else 2
    layer, embedding = _layer_parameters(architecture, tensor), architecture.vocabulary * hidden
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
        logits=sampling_bytes(slots, architecture.vocabulary, dtype, sampling, server=degrees.server),
    )


def sampling_bytes(rows: int, vocabulary: int, dtype: str, sampling: Sampling, *, server: bool = False) -> int:
    """Logits [rows, vocabulary] of that dtype, and what sampling.sample holds at its peak beside them. Bytes for each logit,
    measured on a CPU: greedy 4; by the whole distribution 33 (float64 softmax, running sums and their copies); cut off by
    top-p, top-k or min-p 50 (sorted values and their order too), and 8 of one row while the sort is at it. 4 more for the copy
    without forbidden ids, and 4 for one in float32 when the logits are not. 64 rows of GLM-5.2 in bf16: 596 MB. A server's
    sampler is not ours: float32, three times."""
    if server:
        return 3 * rows * vocabulary * 4
    truncates = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
    is_sorted = sampling.temperature > 0 and truncates
    held = 4 if sampling.temperature == 0 else 50 if truncates else 33
    logits = 4 if dtype == "fp32" else 2 + 4
    return vocabulary * (rows * (logits + 4 + held) + (8 if is_sorted else 0))


def _layer_parameters(architecture: Architecture, tensor: int) -> float:
    """Dense parameters that one tensor-parallel rank uses of the largest decoder layer."""
    parts, attention = architecture.parts, architecture.attention
    whole = (
        attention.query_down + parts.indexer / max(1, attention.num_indexers) + parts.router / max(1, architecture.sparse_layers)
    )
    return architecture.layer_dense / tensor + whole * (1 - 1 / tensor)


def room(
    architecture: Architecture, teacher: Teacher, degrees: Degrees, usable: int | None, planning: Planning, sampling: Sampling
) -> Room:
    """The budget of one GPU under the recipe's engine, for requests of up to the model's positions."""
    dtype = teacher.engine.dtype
    context = architecture.max_positions
    slots = getattr(teacher.engine, "batch_size", 0) or ceil(getattr(teacher.engine, "concurrency", 1) / degrees.replicas)
    return Room(
        usable,
        cut_weights(architecture.parts, degrees, WEIGHT_BYTES[dtype]),
        extra_bytes(architecture, degrees, dtype),
        transient_bytes(
            architecture,
            degrees,
            dtype,
            sampling,
            chunk=min(planning.prefill_chunk_tokens, context),
            context=context,
            slots=slots,
        ),
    )


def admitted_bytes(
    architecture: Architecture, teacher: Teacher, degrees: Degrees, usable: int | None, left: int | None
) -> int | None:
    """Bytes of one GPU that requests are let in by. left: what the plan leaves (Room.cache). Our engines open before they see
    a recipe's sampling or plan, so they leave room for any; and engine.cache_bytes caps it, on a CPU too."""
    if isinstance(teacher.engine, HttpEngine):
        return left
    own = room(architecture, teacher, degrees, usable, Planning(), ANY_SAMPLING).cache
    bounds = [bound for bound in (left, own, teacher.engine.cache_bytes) if bound is not None]
    return min(bounds, default=None)


def cache_dtype(teacher: Teacher) -> str:
    """The cache's dtype: as stated, else what the engine computes in (a server computes fp8 and int4 weights in bf16)."""
    computed = teacher.engine.dtype if teacher.engine.dtype in ("fp32", "bf16") else "bf16"
    return getattr(teacher.engine, "kv_dtype", None) or computed


def cache(architecture: Architecture, teacher: Teacher, degrees: Degrees, budget: int | None) -> Cache:
    """budget: bytes per GPU (`admitted_bytes`)."""
    per_value = WEIGHT_BYTES[cache_dtype(teacher)]
    if degrees.kv_sharded:
        node = None if budget is None else budget * degrees.ranks_per_node
        return Cache(degrees.nodes, node, architecture.cache_values() * per_value)
    return Cache(degrees.replicas, budget, architecture.cache_values(degrees.tensor) * per_value)
