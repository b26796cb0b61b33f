"""What an attention layer keeps per token, reads per step and computes: latent attention with or without an indexer, and
grouped-query attention. Numbers of values and floating-point operations; bytes are the caller's."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with a sparse indexer on `num_indexers` layers when
    there are any (DeepSeek-V3.2). All heads share one latent a token, so tensor parallelism cannot cut the cache.

    query_down: parameters of the projections into latents, which no rank can cut either.
    """

    heads: int
    latent: int
    rotary: int
    nope: int
    value: int
    query_down: int = 0
    num_indexers: int = 0
    index_heads: int = 0
    index_dim: int = 0
    index_topk: int = 0

    def cache_values(self, layers: int, tensor_parallel: int = 1) -> int:
        return layers * (self.latent + self.rotary) + self.num_indexers * self.index_dim

    def values_read(self, layers: int, tokens: int, tensor_parallel: int = 1) -> int:
        """Cache values one decode step reads of a request of that length: selected latents, and every indexer key."""
        selected = min(tokens, self.index_topk) if self.num_indexers else tokens
        return layers * selected * (self.latent + self.rotary) + self.num_indexers * tokens * self.index_dim

    def decode_flops(self, layers: int, tokens: int) -> int:
        """Of one query in the absorbed form: scores over latent + rotary, the sum over latents; the indexer aside."""
        selected = min(tokens, self.index_topk) if self.num_indexers else tokens
        return 2 * layers * self.heads * selected * (2 * self.latent + self.rotary)

    def prefill_flops(self, layers: int, tokens: int) -> float:
        """Of a causal prompt. Query i sees i tokens expanded, at nope + rotary + value multiplications a head, or its
        index_topk selected ones as latents, at 2 latent + rotary: whichever is less. GLM-5.2 breaks even at i = 4,352."""
        expanded, absorbed = self.nope + self.rotary + self.value, 2 * self.latent + self.rotary
        switch = self.index_topk * absorbed // expanded if self.num_indexers else tokens
        first = min(tokens, switch)
        per_head = expanded * first * first / 2 + (tokens - first) * self.index_topk * absorbed
        return 2.0 * layers * self.heads * per_head

    def index_flops(self, pairs: float) -> float:
        """Scores of every indexer for that many (query, token) pairs; each rank of a tensor-parallel group does them all."""
        return 2.0 * self.num_indexers * self.index_heads * self.index_dim * pairs


@dataclass(frozen=True, slots=True)
class Grouped:
    """Grouped-query attention: keys and values of `kv_heads` heads a token, cut by tensor parallelism down to one."""

    heads: int
    kv_heads: int
    head_dim: int
    num_indexers: int = 0
    index_heads: int = 0
    query_down: int = 0

    def cache_values(self, layers: int, tensor_parallel: int = 1) -> int:
        return 2 * layers * max(1, self.kv_heads // tensor_parallel) * self.head_dim

    def values_read(self, layers: int, tokens: int, tensor_parallel: int = 1) -> int:
        return tokens * self.cache_values(layers, tensor_parallel)

    def decode_flops(self, layers: int, tokens: int) -> int:
        return 4 * layers * self.heads * self.head_dim * tokens

    def prefill_flops(self, layers: int, tokens: int) -> float:
        return 2.0 * layers * self.heads * self.head_dim * tokens * tokens

    def index_flops(self, pairs: float) -> float:
        return 0.0
