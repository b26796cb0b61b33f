"""Ranks that share each row (Ulysses, Jacobs et al. 2023): a slice of its tokens each; in attention, all tokens of some heads.

DeepSpeed's UlyssesSPAttentionHF exchanges slices for heads and back. What it wraps is attention document by document, with
boundaries from the gathered position_ids: around sdpa or flex it sets every mask to None, and then documents of a packed row
see each other without a word (tests/train/test_ranks.py shows both).

Ranks r x degree to (r + 1) x degree - 1 share a row: neighbours, so inside a node wherever the degree divides its ranks.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from configs.errors import UnusableInput
from train.attention import Documents, LastDocuments, documents_of, given_positions

SHARED_DOCUMENTS = "tracestill_shared_documents"


class Exchange(Protocol):
    """DeepSpeed's wrapper around attend_documents, which hands `documents` on to it untouched."""

    def __call__(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, *, position_ids: torch.Tensor, documents: Documents, **others: object,
    ) -> tuple[torch.Tensor, None]: ...  # fmt: skip


class SharedAttention:
    """Attention for a slice of a row: exchanged, attended document by document, exchanged back.

    The documents are found once a pass from positions gathered over the group.
    """

    def __init__(self, exchange: Exchange, group: dist.ProcessGroup) -> None:
        self.exchange = exchange
        self.documents = LastDocuments(lambda position_ids: documents_of(gathered(position_ids, group)))

    def __call__(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, *, position_ids: torch.Tensor | None = None, **others: object,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        positions = given_positions(module, position_ids)
        # The exchange writes its own ratio of heads here where it copies key heads, and never back: generating would be wrong.
        ratio = module.num_key_value_groups
        try:
            return self.exchange(
                module, query, key, value, attention_mask, position_ids=positions, documents=self.documents(positions), **others
            )
        finally:
            module.num_key_value_groups = ratio


def gathered(slice_1T: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The whole row of which each rank of the group has an equal slice."""
    slices = [torch.empty_like(slice_1T) for _ in range(dist.get_world_size(group))]
    dist.all_gather(slices, slice_1T.contiguous(), group=group)
    return torch.cat(slices, dim=1)


def group_of(rank: int, size: int, degree: int) -> dist.ProcessGroup:
    """The ranks that share rows with `rank`. Every rank of the world calls it: making a group is a collective."""
    groups = [dist.new_group(range(first, first + degree)) for first in range(0, size, degree)]
    return groups[rank // degree]  # type: ignore


def refuse_uneven_heads(config: PreTrainedConfig, degree: int) -> None:
    """Raises UnusableInput for a model whose heads cannot be dealt out evenly; fewer key heads than ranks are copied."""
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    if queries % degree or (keys % degree and degree % keys):
        raise UnusableInput(
            f"train.sequence_parallel {degree}: {queries} attention heads and {keys} key-value heads cannot be dealt out evenly; "
            f"expected a divisor of {queries} that divides {keys} or is a multiple of it"
        )
