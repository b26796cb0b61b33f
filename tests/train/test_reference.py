"""The reference is exact, and slow; what it says of a gradient is what the loss itself does."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from configs.errors import UnusableInput
from configs.training import CrossEntropy, ForwardKl, Objective, ReverseKl
from data.chat import IGNORE_INDEX
from student.adapter_files import trainable
from tests.train.rank_worker import ROWS, VOCABULARY, packed_rows
from train.batches import Batch
from train.reference import document_loss, documents_in, in_float64, reference_gradients


def tiny_model(model_type: str = "qwen3") -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def mean_loss(exact: nn.Module, rows: list[Batch], objective: Objective) -> float:
    documents = list(documents_in(rows))
    tokens = sum(int((one.targets_1T != IGNORE_INDEX).sum()) for one in documents)
    with torch.no_grad():
        nats = [document_loss(exact(input_ids=one.ids_1T).logits[0], one, objective).item() for one in documents]
    return sum(nats) / tokens


@pytest.mark.parametrize("objective", [CrossEntropy(), ForwardKl(weight=0.7, temperature=2.0), ReverseKl(weight=1.0)])
def test_gradients_are_the_slope_of_the_loss(objective: Objective) -> None:
    """Central differences: a float32 computation anywhere would be noise of 1e-7 / 1e-5, a hundredth of the slope."""
    rows = packed_rows(with_teacher=True)[2:4]
    reference = reference_gradients(tiny_model(), rows, objective)
    exact, step = in_float64(tiny_model()), 1e-5
    assert reference.loss == pytest.approx(mean_loss(exact, rows, objective), rel=1e-12)
    generator, parameters = torch.Generator().manual_seed(3), trainable(exact)
    for _ in range(3):
        directions = {name: torch.randn(one.shape, generator=generator, dtype=torch.float64) for name, one in parameters.items()}
        losses = []
        for shift in (step, -2 * step):
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter += shift * directions[name]
            losses.append(mean_loss(exact, rows, objective))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter += step * directions[name]
        expected = sum((reference.gradients[name] * direction).sum().item() for name, direction in directions.items())
        # what is left is the loss's third derivative x step^2, in 8,000 random directions at once
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected, rel=1e-5)


def test_double_alone_is_not_float64() -> None:
    """Rotary angles and norms stay in float32: why in_float64 is more than a cast."""
    ids_1T = packed_rows()[1].ids_1T
    cast, exact = tiny_model().double().eval(), in_float64(tiny_model())
    difference = (cast(input_ids=ids_1T).logits - exact(input_ids=ids_1T).logits).abs().max()
    assert 1e-9 < difference < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_exact_copy_is_the_same_model(model_type: str) -> None:
    model, ids_1T = tiny_model(model_type).eval(), packed_rows()[0].ids_1T
    found, expected = in_float64(model)(input_ids=ids_1T).logits, model(input_ids=ids_1T).logits
    assert found.dtype == torch.float64 and expected.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_norm_of_another_kind_is_refused() -> None:
    config = AutoConfig.for_model(
        "gemma", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    with pytest.raises(UnusableInput, match="GemmaRMSNorm is not the usual one"):
        in_float64(AutoModelForCausalLM.from_config(config))


def test_the_model_is_left_as_it_is() -> None:
    model = tiny_model().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    reference_gradients(model, packed_rows(), CrossEntropy())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_documents_of_packed_rows_are_all_there_with_their_teachers_rows() -> None:
    rows = packed_rows(with_teacher=True)
    documents = list(documents_in(rows))
    assert [one.ids_1T.shape[1] for one in documents] == [length for row in ROWS for length in row]
    assert all(one.position_ids_1T.tolist() == [list(range(one.ids_1T.shape[1]))] for one in documents)
    for part in (0, 1):
        assert torch.equal(torch.cat([one[part] for one in documents], 1), torch.cat([row[part] for row in rows], 1))  # type: ignore
    for part in (0, 1, 2):
        taught = torch.cat([one.teacher[part] for one in documents if one.teacher is not None])
        assert torch.equal(taught, torch.cat([row.teacher[part] for row in rows if row.teacher is not None]))
