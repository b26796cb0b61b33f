import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.errors import UnusableInput
from configs.schema import Lora
from data.chat import IGNORE_INDEX, Encoded, encode_conversation, pad_batch
from student.lora import attach, fold_small_layers, trainable
from student.model import load_base
from tests.train.fixtures import conversation, save_tiny_base, tiny_tokenizer
from train.losses import SupervisedLoss, check_head, chunked_cross_entropy, select_supervised


def test_loss_of_hand_computed_logits() -> None:
    hidden_ND = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    weight_VD = torch.eye(2)
    loss = chunked_cross_entropy(hidden_ND, weight_VD, torch.tensor([0, 1]))
    # position 0: two equal logits, ln 2. position 1: odds 3 to 1 against the target, ln 4.
    assert loss.item() == pytest.approx(math.log(2.0) + math.log(4.0), abs=1e-6)


def test_position_predicts_the_next_label_and_only_where_it_is_trained() -> None:
    hidden_BTD = torch.arange(8.0).reshape(1, 4, 2)
    labels_BT = torch.tensor([[5, IGNORE_INDEX, 7, IGNORE_INDEX]])
    selected = select_supervised(hidden_BTD, labels_BT)
    assert selected.targets_N.tolist() == [7]  # the 5 at position 0 has no prediction
    assert selected.hidden_ND.tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunked_loss_and_gradient_equal_a_float64_reference(chunk: int) -> None:
    torch.manual_seed(0)
    hidden_ND = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight_VD, targets_N = torch.randn(11, 5, dtype=torch.float64), torch.randint(11, (7,))
    reference = torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.T, targets_N, reduction="sum")
    (expected,) = torch.autograd.grad(reference * 0.37, hidden_ND)
    loss = chunked_cross_entropy(hidden_ND, weight_VD, targets_N, chunk)
    (found,) = torch.autograd.grad(loss * 0.37, hidden_ND)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, reference, rtol=1e-13, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_trainable_head_is_refused() -> None:
    with pytest.raises(AssertionError, match="head is trainable"):
        chunked_cross_entropy(torch.ones(1, 2), torch.ones(3, 2, requires_grad=True), torch.tensor([0]))


@pytest.fixture(scope="module")
def rows() -> list[Encoded]:
    tokenizer = tiny_tokenizer()
    talks = [("1+1?", "1 and 1", "2"), ("spell cat backwards please", "c a t", "tac"), ("?", "", "no")]
    return [
        encode_conversation(tokenizer, [{k: v for k, v in m.items() if v is not None} for m in conversation(*talk)])
        for talk in talks
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_base(tmp_path_factory.mktemp("base")))


def adapted_loss(base: str, *, fold: bool = False) -> SupervisedLoss:
    model = attach(load_base(base, "fp32"), Lora(rank=16, alpha=16), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:  # at zero, lora_A would have no gradient to compare
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    if fold:
        assert fold_small_layers(model) == 14  # seven linear layers in each of two blocks
    return SupervisedLoss(model)


@pytest.mark.parametrize("fold", [False, True])
def test_padded_batch_has_the_gradients_of_its_rows_alone(base: str, rows: list[Encoded], fold: bool) -> None:
    """Reference: each row by itself, no padding, Hugging Face's own loss over the whole vocabulary, no folding."""
    reference, loss = adapted_loss(base), adapted_loss(base, fold=fold)
    expected_sum = 0.0
    for row in rows:
        ids_BT, labels_BT = pad_batch([row], 0)
        count = sum(row.mask[1:])
        mean = reference.causal_lm(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
        (mean * count).backward()
        expected_sum += mean.item() * count
    found = loss(*pad_batch(rows, 0))
    found.backward()
    assert found.item() == pytest.approx(expected_sum, rel=1e-5)
    expected = {name: parameter.grad for name, parameter in trainable(reference.model).items()}
    for name, parameter in trainable(loss.model).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        # float32 sums in another order: 2e-6 of the largest entry was the worst seen
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=2e-5)


def test_padding_never_contributes_to_loss(base: str, rows: list[Encoded]) -> None:
    loss = adapted_loss(base)
    ids_BT, labels_BT = pad_batch(rows, 0)
    scrambled_BT = ids_BT.clone()
    for index, row in enumerate(rows):
        scrambled_BT[index, len(row.ids) :] = 65
    torch.testing.assert_close(loss(ids_BT, labels_BT), loss(scrambled_BT, labels_BT), rtol=0, atol=0)


def test_stop_token_is_trained_and_the_prompt_is_not(rows: list[Encoded]) -> None:
    stop = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    for row in rows:
        ids_BT, labels_BT = pad_batch([row], 0)
        targets_N = select_supervised(ids_BT[..., None].float(), labels_BT).targets_N
        assert targets_N[-1] == stop
        assert targets_N.tolist().count(stop) == 1  # the user's own end of turn stays masked
        assert len(targets_N) < len(row.ids) - 1


def test_batch_without_supervised_token_has_zero_loss_and_a_backward_pass(base: str) -> None:
    loss = adapted_loss(base)
    value = loss(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORE_INDEX))
    value.backward()
    assert value.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trainable(loss.model).values())


def test_model_with_a_soft_cap_is_refused_with_both_losses_named(rows: list[Encoded]) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2", vocab_size=264, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=0.5,
    )  # fmt: skip
    loss = SupervisedLoss(AutoModelForCausalLM.from_config(config).requires_grad_(False))
    with pytest.raises(UnusableInput, match="expected a plain linear head"):
        check_head(loss, *pad_batch(rows, 0))


def test_plain_head_passes_the_check_in_both_precisions(base: str, rows: list[Encoded]) -> None:
    check_head(SupervisedLoss(load_base(base, "fp32").requires_grad_(False)), *pad_batch(rows, 0))
    check_head(SupervisedLoss(load_base(base, "bf16").requires_grad_(False)), *pad_batch(rows, 0))
