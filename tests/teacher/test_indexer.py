"""The tiled indexer against transformers' own: the same columns; and no large tensor on the way."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GlmMoeDsaConfig
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaIndexer, GlmMoeDsaRotaryEmbedding

import teacher.tiles
from teacher.indexer import index_scores, select, top_columns
from tests.teacher.models import GLM


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside the context returned in storage of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        is_view = any(alias.alias_info and not alias.alias_info.is_write for alias in func._schema.returns)
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and not is_view:
                self.num_bytes = max(self.num_bytes, tensor.numel() * tensor.element_size())
        return result


class Inputs(NamedTuple):
    """One call of the indexer: `prefix` columns are in the cache already. mask_BST hides left padding and the future."""

    hidden_BTX: Tensor
    residual_BTX: Tensor
    mask_BST: Tensor
    prefix: int


CONFIG = GlmMoeDsaConfig(**{key: value for key, value in GLM.items() if key != "model_type"})


def make_indexer(dtype: torch.dtype = torch.float32) -> GlmMoeDsaIndexer:
    torch.manual_seed(0)
    indexer = GlmMoeDsaIndexer(CONFIG, 0)
    for parameter in indexer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return indexer.to(dtype)


def make_inputs(num_rows: int, num_queries: int, num_columns: int) -> Inputs:
    prefix = num_columns - num_queries
    padding_B1 = 3 * torch.arange(num_rows)[:, None]
    position_S1 = torch.arange(prefix, num_columns)[:, None]
    columns_T = torch.arange(num_columns)
    mask_BST = (columns_T <= position_S1) & (columns_T >= padding_B1)[:, None]
    hidden_BTX = torch.randn(num_rows, num_columns, CONFIG.hidden_size)
    return Inputs(hidden_BTX, torch.randn(num_rows, num_columns, CONFIG.q_lora_rank), mask_BST, prefix)


def run(indexer: GlmMoeDsaIndexer, inputs: Inputs, *, ours: bool) -> Tensor:
    """The selection of the last queries, the first `prefix` tokens having been fed before."""
    cache, dtype = DynamicCache(config=CONFIG), indexer.wk.weight.dtype
    rotary = GlmMoeDsaRotaryEmbedding(CONFIG)
    chosen = torch.empty(0)
    for start, stop in ((0, inputs.prefix), (inputs.prefix, inputs.hidden_BTX.shape[1])):
        if start == stop:
            continue
        hidden, residual = inputs.hidden_BTX[:, start:stop].to(dtype), inputs.residual_BTX[:, start:stop].to(dtype)
        positions = torch.arange(start, stop)[None]
        mask = inputs.mask_BST if stop > inputs.prefix else torch.ones(len(hidden), stop - start, stop, dtype=torch.bool)
        forward = select if ours else GlmMoeDsaIndexer.forward
        chosen = forward(indexer, hidden, residual, rotary(hidden, positions), mask, positions, cache)
    return chosen.long()


def readable(chosen_BSK: Tensor, mask_BST: Tensor) -> Tensor:
    """bool [B, S, T]: selected and not masked, which is what attention sees."""
    return torch.zeros_like(mask_BST).scatter(-1, chosen_BSK, True) & mask_BST


@pytest.mark.parametrize("tile", [1 << 24, 4096, 1])
@pytest.mark.parametrize(
    ("rows", "queries", "columns"), [(1, 1, 40), (3, 1, 40), (3, 9, 40), (2, 40, 40), (1, 3, 17), (2, 5, 12)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_selection_is_stocks_whatever_the_tile(
    monkeypatch: pytest.MonkeyPatch, tile: int, rows: int, queries: int, columns: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(teacher.tiles, "CPU_TILE_BYTES", tile)
    indexer, inputs = make_indexer(dtype), make_inputs(rows, queries, columns)
    ours, stock = run(indexer, inputs, ours=True), run(indexer, inputs, ours=False)
    assert ours.shape == stock.shape and ours.shape[-1] == min(CONFIG.index_topk, columns)
    assert torch.equal(readable(ours, inputs.mask_BST), readable(stock, inputs.mask_BST))


@pytest.mark.parametrize("columns", [40, 1100])  # topk partitions below 64 x 16 columns and heap-sorts above
def test_tied_columns_are_chosen_as_stock_chooses_them(columns: int) -> None:
    indexer, inputs = make_indexer(), make_inputs(1, 3, columns)
    torch.nn.init.zeros_(indexer.weights_proj.weight)
    ours, stock = run(indexer, inputs, ours=True), run(indexer, inputs, ours=False)
    assert torch.equal(ours.sort(-1).values, stock.sort(-1).values)


def test_a_masked_column_is_selected_only_when_too_few_others_exist() -> None:
    inputs = make_inputs(3, 30, 40)
    chosen = run(make_indexer(), inputs, ours=True)
    num_readable = readable(chosen, inputs.mask_BST).sum(-1)
    assert torch.equal(num_readable, inputs.mask_BST.sum(-1).clamp(max=CONFIG.index_topk))


def test_index_scores_are_the_formula_written_out() -> None:
    queries, keys, weights = torch.randn(2, 3, 32, 16), torch.randn(2, 50, 16), torch.randn(2, 3, 32)
    expected = (weights[..., None] * torch.einsum("bshd,btd->bsht", queries, keys).relu()).sum(2)
    for count in (1, 3):  # one query goes another way than several
        found = index_scores(queries[:, :count], weights[:, :count], keys, limit=2000)
        assert torch.allclose(found, expected[:, :count], atol=1e-4)  # sums of 32 terms of about 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "queries"), [(1, 256), (4, 64), (8, 1)])
def test_no_tensor_exceeds_the_tile_where_stock_holds_all_heads(
    monkeypatch: pytest.MonkeyPatch, rows: int, queries: int, dtype: torch.dtype
) -> None:
    """Stock would hold rows x queries x 32 x 2,048 float32: 67 MB for the first two."""
    columns, limit = 2048, 1 << 18
    monkeypatch.setattr(teacher.tiles, "CPU_TILE_BYTES", limit)
    queries_BSHD, keys_BTD = torch.randn(rows, queries, 32, 16).to(dtype), torch.randn(rows, columns, 16).to(dtype)
    mask = torch.ones(rows, queries, columns, dtype=torch.bool)
    with Largest() as largest:
        top_columns(queries_BSHD, torch.randn(rows, queries, 32), keys_BTD, mask, 16)
    assert limit // 4 < largest.num_bytes <= limit
