"""A packed row gives what its documents give alone, or nothing at all: what cannot be isolated is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from configs.errors import UnusableInput
from train.attention import (
    DOCUMENTS,
    LastDocuments,
    attend,
    attend_documents,
    check_isolation,
    documents_of,
    use_documents,
)

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama without grouped heads": {"model_type": "llama", "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 with a window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 20},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral with a window": {"model_type": "mistral", "sliding_window": 5},
}
LENGTHS = [7, 1, 20, 12]


def tiny_model(shape: str = "llama", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = SIZES | SHAPES[shape] | changes
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)  # type: ignore
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # at transformers' std of 0.02 two layers of 32 are nearly the identity, and leaks small
        parameter.data = torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 1.0)
    return model


def documents_to_try(lengths: list[int] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (length,), generator=generator) for length in lengths]


def positions_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def packed(model: PreTrainedModel, documents: list[torch.Tensor], **inputs: Any) -> torch.Tensor:
    settings = {"use_cache": False} | inputs
    return model(torch.cat(documents)[None], position_ids=positions_of([len(one) for one in documents]), **settings).logits[0]


# --- against the slow, obvious ways ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_row_has_the_logits_of_its_documents_alone_as_transformers_computes_them(shape: str) -> None:
    documents = documents_to_try()
    reference = tiny_model(shape).double()
    reference.set_attn_implementation("eager")
    expected = torch.cat([reference(one[None], use_cache=False).logits[0] for one in documents])
    model = tiny_model(shape).double()
    use_documents(model)
    difference = (packed(model, documents) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-6, difference  # eager takes its softmax in float32


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_a_packed_row_are_those_of_its_documents_alone(shape: str) -> None:
    documents = documents_to_try()
    model, alone = tiny_model(shape).double(), tiny_model(shape).double()
    for one in (model, alone):
        use_documents(one)
    packed(model, documents).square().sum().backward()
    for one in documents:
        alone(one[None], use_cache=False).logits.square().sum().backward()
    for (name, found), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert found.grad is not None and expected.grad is not None
        assert torch.allclose(found.grad, expected.grad, rtol=1e-6, atol=1e-8 * expected.grad.abs().max().item()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("heads", [(4, 4, 16, 16), (6, 2, 20, 20), (3, 1, 33, 8)])
def test_a_document_is_attended_to_the_last_bit_as_if_it_were_alone(dtype: torch.dtype, heads: tuple[int, int, int, int]) -> None:
    queries, keys, width, value_width = heads
    torch.manual_seed(2)
    query, key, value = (
        torch.randn(1, count, sum(LENGTHS), size, dtype=dtype)
        for count, size in ((queries, width), (keys, width), (keys, value_width))
    )
    row = attend(query, key, value, documents_of(positions_of(LENGTHS)))
    assert row.shape == (1, sum(LENGTHS), queries, value_width) and row.dtype == dtype
    start = 0
    for length in LENGTHS:
        q, k, v = (tensor[:, :, start : start + length] for tensor in (query, key, value))
        alone = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=queries != keys)
        assert torch.equal(row[:, start : start + length], alone.transpose(1, 2))
        start += length


@pytest.mark.parametrize("window", [1, 3, 8, 40])
def test_a_window_inside_a_document_is_the_masked_square(window: int) -> None:
    torch.manual_seed(3)
    query, key, value = (torch.randn(1, heads, 40, 8, dtype=torch.float64) for heads in (4, 2, 2))
    found = attend(query, key, value, documents_of(positions_of([40])), window=window)
    behind = torch.arange(40)[:, None] - torch.arange(40)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ key.mT / 8**0.5).masked_fill((behind < 0) | (behind >= window), -torch.inf)
    assert torch.allclose(found, (scores.softmax(-1) @ value).transpose(1, 2), atol=1e-12)


def test_memory_follows_the_documents_and_not_the_square_of_the_row() -> None:
    length, count = 64, 32
    query, key, value = (torch.randn(1, 2, length * count, 16, requires_grad=True) for _ in range(3))
    largest = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(query, key, value, documents_of(positions_of([length] * count))).sum().backward()
    assert largest <= query.numel()  # a mask of the row would have 2,048 x 2,048


# --- boundaries --------------------------------------------------------------------------------------------------


def test_boundaries_are_where_positions_start_again() -> None:
    documents = documents_of(positions_of(LENGTHS))
    assert documents.lengths == LENGTHS
    assert documents.bounds_M1.tolist() == [0, 7, 8, 28, 40] and documents.bounds_M1.dtype == torch.int32


@pytest.mark.parametrize("positions", [torch.tensor([[3, 4, 0, 1]]), torch.zeros(2, 4), torch.arange(4)])
def test_a_row_whose_boundaries_cannot_be_read_is_refused(positions: torch.Tensor) -> None:
    with pytest.raises(UnusableInput):
        documents_of(positions)


def counted() -> tuple[LastDocuments, list[int]]:
    asked: list[int] = []
    return LastDocuments(lambda row: asked.append(1) or documents_of(row)), asked


def test_boundaries_are_found_once_for_all_layers_and_anew_for_every_row() -> None:
    last, asked = counted()
    row = positions_of([4, 4])
    assert last(row) is last(row) and len(asked) == 1
    assert last(positions_of([2, 6])).lengths == [2, 6] and len(asked) == 2


def test_a_buffer_that_was_written_to_is_another_row() -> None:
    last, _ = counted()
    row = positions_of([4, 4])
    last(row)
    row.copy_(positions_of([2, 6]))
    assert last(row).lengths == [2, 6]


def test_activation_checkpointing_computes_again_with_the_same_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("train.attention.documents_of", lambda row: asked.append(1) or documents_of(row))
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny_model().train()
        use_documents(model)
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        asked.clear()
        packed(model, documents_to_try()).square().sum().backward()
        assert len(asked) == 1, is_checkpointed
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# --- what is refused ---------------------------------------------------------------------------------------------


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UnusableInput) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("mask", [torch.ones(1, 40, dtype=torch.int64), torch.ones(1, 1, 40, 40, dtype=torch.bool)])
def test_any_mask_is_refused_though_it_hides_nothing(mask: torch.Tensor) -> None:
    model = tiny_model()
    use_documents(model)
    assert "expected none" in refused(lambda: packed(model, documents_to_try(), attention_mask=mask))


def test_generating_with_a_cache_is_refused() -> None:
    model = tiny_model()
    use_documents(model)
    first = model(torch.tensor([[1, 2, 3]]), use_cache=True)
    assert "sdpa" in refused(lambda: model(torch.tensor([[4]]), past_key_values=first.past_key_values, use_cache=True))


@pytest.mark.parametrize("terms", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}, {"is_causal": False}])
def test_a_term_that_would_be_ignored_is_refused(terms: dict[str, Any]) -> None:
    row, documents = torch.zeros(1, 4, 40, 8), documents_of(positions_of(LENGTHS))
    module = torch.nn.Identity()
    assert "Identity asks for" in refused(lambda: attend_documents(module, row, row, row, None, documents=documents, **terms))


def test_a_model_with_attention_dropout_is_refused() -> None:
    assert "attention_dropout 0.1" in refused(lambda: use_documents(tiny_model(attention_dropout=0.1)))


def test_layers_that_carry_state_or_attend_in_chunks_are_refused() -> None:
    model = tiny_model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert "chunked_attention" in refused(lambda: use_documents(model))


# --- the probe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_probe_passes_where_documents_are_apart(shape: str, dtype: torch.dtype) -> None:
    model = tiny_model(shape).to(dtype).train()  # type: ignore
    use_documents(model)
    check_isolation(model, [ids.tolist() for ids in documents_to_try([30, 40])])
    assert model.training


def whole_row_causal(*arguments: Any, **settings: Any) -> object:
    return sdpa_attention_forward(*arguments, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_probe_names_an_implementation_that_leaks(shape: str, dtype: torch.dtype) -> None:
    model = tiny_model(shape).to(dtype)  # type: ignore
    AttentionInterface.register("leaking", whole_row_causal)
    AttentionMaskInterface.register("leaking", lambda **_: None)
    model.set_attn_implementation("leaking")
    assert "attention leaking of" in refused(lambda: check_isolation(model, [ids.tolist() for ids in documents_to_try([30, 40])]))


@pytest.mark.parametrize("inputs", [{"attention_mask": torch.ones(1, 70, dtype=torch.int64)}, {"use_cache": True}])
def test_sdpa_leaks_with_a_mask_or_a_cache_and_the_probe_sees_it(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    documents = documents_to_try([30, 40])
    model = tiny_model()
    forward = model.forward

    def with_inputs(**given: Any) -> object:
        length = given["input_ids"].shape[1]
        changed = {name: value[:, :length] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        return forward(**{**given, **changed})

    monkeypatch.setattr(model, "forward", with_inputs)
    assert "attention sdpa of llama" in refused(lambda: check_isolation(model, [ids.tolist() for ids in documents]))


def test_the_probe_makes_a_pair_of_a_single_document() -> None:
    model = tiny_model()
    use_documents(model)
    assert check_isolation(model, [documents_to_try([9])[0].tolist()]) < 1e-5


def test_use_documents_switches_the_model_by_name() -> None:
    model = tiny_model()
    use_documents(model)
    assert model.config._attn_implementation == DOCUMENTS


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128), (6, 2, 40)])
def test_the_flash_kernel_attends_as_the_processor_does(heads: tuple[int, int, int], window: int | None) -> None:
    queries, keys, width = heads
    torch.manual_seed(4)
    tensors = [torch.randn(1, count, sum(LENGTHS), width, dtype=torch.bfloat16) for count in (queries, keys, keys)]
    on_gpu = [tensor.cuda().requires_grad_() for tensor in tensors]
    on_cpu = [tensor.float().requires_grad_() for tensor in tensors]
    found = attend(*on_gpu, documents_of(positions_of(LENGTHS).cuda()), window=window)  # type: ignore
    expected = attend(*on_cpu, documents_of(positions_of(LENGTHS)), window=window)  # type: ignore
    assert torch.allclose(found.cpu().float(), expected, atol=2e-2)  # bf16 in and out
    found.float().square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert one.grad is not None and other.grad is not None
        assert (one.grad.cpu().float() - other.grad).norm() < 2e-2 * other.grad.norm()
