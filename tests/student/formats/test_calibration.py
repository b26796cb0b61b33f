import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from configs.errors import UnusableInput
from student.formats.calibration import decoder_layers, round_layer_by_layer
from student.formats.compressed import linear_layers
from tests.student.formats.models import make_model

CONVERSATIONS = [[5, 9, 3, 3, 60, 2, 17, 40, 41, 42, 43, 8], [1], [], [30, 31, 32, 33, 34, 35, 36]]
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip


def small(family: str, **others: object) -> PreTrainedModel:
    return make_model(AutoConfig.for_model(family, **SMALL, **others))


@torch.no_grad()
def hessians_by_hand(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The whole model, every conversation, every token: the sum of x x^T."""
    sums = {name: torch.zeros(linear.in_features, linear.in_features).double() for name, linear in linear_layers(model).items()}

    def noting(name: str) -> object:
        def note(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            for token_I in given[0][0].double():
                sums[name] += torch.outer(token_I, token_I)

        return note

    handles = [linear.register_forward_pre_hook(noting(name)) for name, linear in linear_layers(model).items()]  # type: ignore[arg-type]
    for ids in CONVERSATIONS:
        if ids:
            model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize(
    ("family", "others"),
    [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 4})],
    ids=["llama", "qwen2", "qwen3", "sliding window"],
)
def test_every_hessian_is_that_of_the_whole_model_at_work(family: str, others: dict[str, object]) -> None:
    model, seen = small(family, **others), dict[str, torch.Tensor]()

    def unchanged(name: str, weight_OI: torch.Tensor, hessian_II: torch.Tensor) -> torch.Tensor:
        seen[name] = hessian_II
        return weight_OI

    round_layer_by_layer(model, CONVERSATIONS, linear_layers(model), unchanged)
    expected = hessians_by_hand(model)
    assert list(seen) == list(expected) and len(seen) == 21
    for name, hessian_II in expected.items():
        # float32 sums of 20 products against float64
        assert torch.allclose(seen[name].double(), hessian_II, rtol=1e-4, atol=1e-5 * float(hessian_II.abs().max())), name


def test_later_layers_see_what_the_rounded_ones_make_of_the_traces() -> None:
    model, seen = small("llama"), dict[str, torch.Tensor]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def halved(name: str, weight_OI: torch.Tensor, hessian_II: torch.Tensor) -> torch.Tensor:
        seen[name] = hessian_II
        return weight_OI / 2

    round_layer_by_layer(model, CONVERSATIONS, linear_layers(model), halved)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(model)[1])
    with torch.no_grad():
        for name, linear in linear_layers(model).items():
            if ".layers.2." not in name:
                linear.weight.div_(2)
    expected = hessians_by_hand(model)
    for name, hessian_II in expected.items():
        if name.endswith("layers.2.self_attn.q_proj") or name.endswith("layers.0.self_attn.q_proj"):
            assert torch.allclose(seen[name].double(), hessian_II, rtol=1e-4, atol=1e-5 * float(hessian_II.abs().max())), name


@pytest.mark.parametrize("nothing", [[], [[], []]], ids=["no conversation", "empty conversations"])
def test_nothing_to_calibrate_on_is_one_clear_line(nothing: list[list[int]]) -> None:
    model = small("llama")
    with pytest.raises(UnusableInput, match="no training conversation to calibrate on"):
        round_layer_by_layer(model, nothing, linear_layers(model), lambda name, weight_OI, hessian_II: weight_OI)


def test_an_id_that_the_embedding_has_no_row_for_is_one_clear_line() -> None:
    model = small("llama")
    with pytest.raises(UnusableInput, match="calibration holds id 64, the embedding 64 rows"):
        round_layer_by_layer(model, [[1, 64]], linear_layers(model), lambda name, weight_OI, hessian_II: weight_OI)


def test_a_model_is_left_as_it_was_when_rounding_fails() -> None:
    model = small("qwen3")

    def failing(name: str, weight_OI: torch.Tensor, hessian_II: torch.Tensor) -> torch.Tensor:
        raise UnusableInput("no")

    ids = torch.tensor([CONVERSATIONS[0]])
    expected = model(input_ids=ids).logits
    with pytest.raises(UnusableInput):
        round_layer_by_layer(model, CONVERSATIONS, linear_layers(model), failing)
    assert torch.equal(model(input_ids=ids).logits, expected)
