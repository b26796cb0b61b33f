"""Absorbed, gathered attention against transformers' own expanded and masked one, logits against logits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from teacher.cache import SlotCache
from teacher.local_engine import load_model
from teacher.sparse_attention import IMPLEMENTATION
from tests.teacher.models import VOCAB

ROWS, LENGTH = 3, 40  # index_topk is 16: the first steps select everything, the later ones choose


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(6, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(glm_folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """[B, T, V] of one stock forward pass."""
    model = AutoModelForCausalLM.from_pretrained(glm_folder, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def model(glm_folder: Path) -> PreTrainedModel:
    loaded = load_model(glm_folder, "fp32", torch.device("cpu"))
    assert loaded.config._attn_implementation == IMPLEMENTATION
    return loaded


def forward(model: PreTrainedModel, cache: SlotCache, ids: torch.Tensor, start: int) -> torch.Tensor:
    rows, tokens = ids.shape
    positions = torch.arange(start, start + tokens).expand(rows, -1)
    mask = torch.arange(start + tokens) <= positions[:, :, None]
    if tokens == 1:
        cache.select_next(positions, start + 1)
    else:
        cache.select_span(slice(0, rows), start, start + tokens)
    with torch.no_grad():
        return model(
            input_ids=ids, position_ids=positions, attention_mask=mask[:, None], past_key_values=cache, use_cache=True
        ).logits


@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
def test_logits_equal_stock_attention_in_any_chunks(
    model: PreTrainedModel, ids: torch.Tensor, expected: torch.Tensor, chunk: int
) -> None:
    cache = SlotCache(ROWS, 3, torch.device("cpu"))
    parts = [forward(model, cache, ids[:, start : start + chunk], start) for start in range(0, LENGTH, chunk)]
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-4)  # 2e-5 measured: sums in another order


def test_the_model_without_a_cache_equals_stock_attention(
    model: PreTrainedModel, ids: torch.Tensor, expected: torch.Tensor
) -> None:
    """The dummy pass of a waiting rank, and anyone who calls the model directly with a mask."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(ROWS, 1, -1, -1)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, expected, atol=1e-4)
