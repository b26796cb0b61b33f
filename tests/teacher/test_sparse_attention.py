"""Absorbed, gathered attention against transformers' own expanded and masked one: outputs, logits, tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import teacher.sparse_attention
import teacher.tiles
from teacher.cache import SlotCache
from teacher.local_engine import load_model
from teacher.sparse_attention import (
    IMPLEMENTATION,
    History,
    Projection,
    absorbed_attention,
    attention_for,
    expanded_attention,
    gathering_is_cheaper,
    install,
)
from tests.teacher.models import GLM, VOCAB
from tests.teacher.test_indexer import Largest

ROWS, LENGTH = 3, 40  # index_topk is 16: the first steps select everything, the later ones choose
FORMS = {"gathered": 0, "expanded": 10**9}  # prices of a gathered element that force a form on prefill
TILES = {"whole": 1 << 24, "tiled": 3000}

Attend = Callable[[Tensor, Projection, History, float], Tensor]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(6, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def stock(glm_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(glm_folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def expected(stock: PreTrainedModel, ids: Tensor) -> Tensor:
    """[B, T, V] of one stock forward pass."""
    with torch.no_grad():
        return stock(ids).logits


@pytest.fixture(scope="module")
def model(glm_folder: Path) -> PreTrainedModel:
    loaded = load_model(glm_folder, "fp32", torch.device("cpu"))
    assert loaded.config._attn_implementation == IMPLEMENTATION
    return loaded


def force(monkeypatch: pytest.MonkeyPatch, form: str, tile: str) -> None:
    monkeypatch.setattr(teacher.sparse_attention, "CPU_GATHER_PRICE", FORMS[form])
    monkeypatch.setattr(teacher.tiles, "CPU_TILE_BYTES", TILES[tile])


def forward(model: PreTrainedModel, cache: SlotCache, ids: Tensor, start: int) -> Tensor:
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


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
def test_logits_equal_stock_attention_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, ids: Tensor, expected: Tensor, chunk: int, form: str, tile: str
) -> None:
    force(monkeypatch, form, tile)
    cache = SlotCache(ROWS, 3, torch.device("cpu"))
    parts = [forward(model, cache, ids[:, start : start + chunk], start) for start in range(0, LENGTH, chunk)]
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-4)  # 2e-5 measured: sums in another order


def test_the_model_without_a_cache_equals_stock_attention(model: PreTrainedModel, ids: Tensor, expected: Tensor) -> None:
    """The dummy pass of a waiting rank, and anyone who calls the model directly with a mask."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(ROWS, 1, -1, -1)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, expected, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_left_padded_batches_generate_stocks_tokens(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, stock: PreTrainedModel, ids: Tensor, form: str
) -> None:
    """Both through transformers' own `generate` and cache; prompts of 40, 31 and 3 tokens, index_topk 16."""
    force(monkeypatch, form, "tiled")
    padding = torch.tensor([0, 9, 37])
    mask = torch.arange(LENGTH) >= padding[:, None]
    asked = {"input_ids": ids.where(mask, 0), "attention_mask": mask.long(), "do_sample": False, "max_new_tokens": 40}
    found, wanted = (each.generate(**asked, pad_token_id=0) for each in (model, stock))  # type: ignore[operator]
    assert torch.equal(found, wanted)


def build(config: dict[str, object], attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"initializer_range": 0.2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, **sizes), attn_implementation=attention).eval()
    if attention == IMPLEMENTATION:
        install(made)
    return made


@pytest.mark.parametrize("types", [["full", "shared", "shared", "full"], ["full", "full", "shared", "shared"]])
def test_shared_layers_read_what_the_last_full_layer_selected(ids: Tensor, types: list[str]) -> None:
    config = GLM | {"num_hidden_layers": 4, "indexer_types": types}
    ours, stock = build(config, IMPLEMENTATION), build(config, "sdpa")
    seen: list[Tensor] = []
    for layer in ours.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, stock(ids).logits, atol=1e-4)
    for layer, kind in enumerate(types):
        assert (seen[layer] is seen[layer - 1]) == (kind == "shared")
        assert (ours.model.layers[layer].self_attn.indexer is None) == (kind == "shared")


def random_case(rows: int, queries: int, columns: int, picked: int) -> tuple[Tensor, Projection, History]:
    """Two heads, dims 12 + 8 and 12, 16 latents; the cache view starts at row 1 of a wider buffer, as SlotCache's do."""
    torch.manual_seed(columns)
    query, weight = torch.randn(rows, 2, queries, 20), torch.randn(2, 24, 16) / 4
    latents, rotary = (torch.randn(rows + 2, columns + 5, dim)[1 : rows + 1, :columns] for dim in (16, 8))
    mask = torch.rand(rows, queries, columns) < 0.7
    indices = torch.rand(rows, queries, columns).topk(picked).indices.int()
    return query, Projection(*weight.split([12, 12], dim=1)), History(latents, rotary, mask, indices)


def attend_slowly(query_BHSD: Tensor, projection: Projection, history: History, scaling: float) -> Tensor:
    """One query, one head, one readable column at a time."""
    rows, heads, queries, _ = query_BHSD.shape
    output = torch.zeros(rows, queries, heads, projection.value_HVC.shape[1])
    for row in range(rows):
        for query in range(queries):
            columns = [c for c in history.indices_BSK[row, query].tolist() if history.mask_BST[row, query, c]]
            latents, rotary = history.latents_BTC[row, columns], history.rotary_BTR[row, columns]
            for head in range(heads):
                keys = torch.cat([latents @ projection.key_HNC[head].T, rotary], dim=-1)
                weights = (keys @ query_BHSD[row, head, query] * scaling).softmax(0)
                output[row, query, head] = weights @ (latents @ projection.value_HVC[head].T)
    return output


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("rows", "queries", "columns", "picked"), [(1, 1, 30, 8), (4, 1, 30, 8), (2, 9, 50, 20), (4, 1, 30, 30)])
def test_both_forms_equal_attention_written_out(
    monkeypatch: pytest.MonkeyPatch, tile: str, rows: int, queries: int, columns: int, picked: int
) -> None:
    force(monkeypatch, "gathered", tile)
    query, projection, history = random_case(rows, queries, columns, picked)
    expected = attend_slowly(query, projection, history, 0.25)
    for attend in (absorbed_attention, expanded_attention):
        assert torch.allclose(attend(query, projection, history, 0.25), expected, atol=1e-5)


@pytest.mark.parametrize("attend", [absorbed_attention, expanded_attention])
def test_a_query_that_may_look_nowhere_stays_finite(attend: Attend) -> None:
    """Left padding: its latents are cached, and 0 times NaN would be NaN in every later token."""
    query, projection, history = random_case(2, 4, 30, 8)
    history.mask_BST[0, :2] = False
    assert attend(query, projection, history, 0.25).isfinite().all()


@pytest.mark.parametrize(("form", "columns"), [("gathered", 4096), ("expanded", 512)])
def test_prefill_holds_no_tensor_above_the_tile(monkeypatch: pytest.MonkeyPatch, form: str, columns: int) -> None:
    """Expanding 4,096 columns for two heads would be 1.4 MB, the scores of 64 queries 2 MB."""
    limit = 1 << 16
    monkeypatch.setattr(teacher.tiles, "CPU_TILE_BYTES", limit)
    query, projection, history = random_case(1, 64, columns, 64)
    history = history._replace(mask_BST=torch.ones(1, 64, columns, dtype=torch.bool))
    attend = absorbed_attention if form == "gathered" else expanded_attention
    with Largest() as largest:
        attend(query, projection, history, 0.25)
    assert limit // 4 < largest.num_bytes <= limit


def choice(num_heads: int, num_queries: int, num_columns: int, device: str) -> bool:
    """gathering_is_cheaper at GLM-5.2's dimensions; tensors without memory."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def shaped(*shape: int) -> Tensor:
        return torch.empty(1, dtype=dtype, device=device).expand(*shape)

    projection = Projection(shaped(num_heads, 192, 512), shaped(num_heads, 256, 512))
    latents, rotary = shaped(1, num_columns, 512), shaped(1, num_columns, 64)
    history = History(latents, rotary, shaped(1, num_queries, num_columns), shaped(1, num_queries, 2048))
    return gathering_is_cheaper(shaped(1, num_heads, num_queries, 256), projection, history)


@pytest.mark.parametrize(
    ("num_heads", "num_queries", "device", "break_even"),
    [
        # S H (X C) + S K (H 1088 + 32 x 576) = 2,048 x (14.68 M + 2,048 x 88,064) over H X C + S H 512 = 14.68 M + 67.11 M
        (64, 2048, "cpu", 4884),
        (64, 8192, "cpu", 5644),
        (64, 8192, "meta", 31858),  # any device but a CPU is priced as a GPU
        (8, 8192, "meta", 190651),  # where one head's expansion, 1,408 bytes a column in bf16, fills the tile of 256 MiB
        (64, 1, "cpu", 2049),
    ],
)
def test_prefill_gathers_above_the_break_even_and_expands_below(
    num_heads: int, num_queries: int, device: str, break_even: int
) -> None:
    assert choice(num_heads, num_queries, break_even, device)
    assert break_even == 2049 or not choice(num_heads, num_queries, break_even - 1, device)


@pytest.mark.parametrize(
    ("changes", "bound_95", "bound_max"),
    [({"first_k_dense_replace": 3, "index_topk": 64}, 0.08, 0.4), ({}, 0.12, float("inf"))],
    ids=["nothing-to-choose", "selection-and-experts"],
)
def test_bf16_decodes_within_a_bound_of_stocks_bf16(
    ids: Tensor, changes: dict[str, object], bound_95: float, bound_max: float
) -> None:
    """Logits with a standard deviation of 1.2. Without choices ours differ from stock's by 0.04 at the 95th percentile and by 0.3
    at most. Where a rounding swaps an expert or a selected column, single logits move by 1, for either of the two: hence the
    second bound is on the percentile, and on the mean error against float32, which is stock's within a third."""
    exact, stock, ours = (build(GLM | changes, attention) for attention in ("sdpa", "sdpa", IMPLEMENTATION))
    for model in (stock, ours):
        model.bfloat16()
    cache = SlotCache(ROWS, 3, torch.device("cpu"))
    with torch.no_grad():
        exact_BTV, stock_BTV = exact(ids).logits, stock(ids).logits.float()
    our_BTV = torch.cat([forward(ours, cache, ids[:, start : start + 1], start) for start in range(LENGTH)], dim=1).float()
    difference = (our_BTV - stock_BTV).abs()
    assert difference.quantile(0.95) <= bound_95 and difference.max() <= bound_max
    assert (our_BTV - exact_BTV).abs().mean() <= 4 / 3 * (stock_BTV - exact_BTV).abs().mean()


def test_other_architectures_keep_their_attention() -> None:
    assert attention_for("qwen3") == "sdpa"
