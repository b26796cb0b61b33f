"""Head and loss in chunks against the whole [N, V] at once, and the module around them against Hugging Face's own loss.

Shape suffixes: T tokens of a packed row, N supervised positions, C positions of a chunk, D hidden width, V vocabulary, K kept.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from configs.errors import UnusableInput
from configs.training import CrossEntropy, ForwardKl, Lora, Objective, ReverseKl
from data.chat import IGNORE_INDEX, Encoded, encode_conversation
from student.adapter_files import trainable
from student.lora import attach, fold_small_layers
from student.model import load_base
from tests.train.fixtures import conversation, save_tiny_base, tiny_tokenizer
from train.batches import Batch
from train.losses import (
    Product,
    SupervisedLoss,
    check_head,
    chunked_loss,
    head_products,
    head_weights,
    select_supervised,
    unwrapped_head,
)
from train.objectives import ChunkLoss, chunk_loss
from train.objectives.targets import TeacherTargets

N, D, V, K = 7, 5, 11, 3
CE = chunk_loss(CrossEntropy())
EVERY = [CrossEntropy(), ForwardKl(temperature=2.0), ReverseKl(weight=0.3), ForwardKl(weight=1.0, temperature=3.0)]
NAMES = ["cross_entropy", "forward_kl", "reverse_kl", "forward_kl_alone"]


def packed(documents: Sequence[Encoded]) -> Batch:
    """One after the other; token by token, as slowly as it gets."""
    ids, targets, positions = [], [], []
    for document in documents:
        mask = document.mask
        for index, token in enumerate(document.ids):
            is_trained = index + 1 < len(document.ids) and mask[index + 1]
            ids.append(token)
            targets.append(document.ids[index + 1] if is_trained else IGNORE_INDEX)
            positions.append(index)
    return Batch(torch.tensor([ids]), torch.tensor([targets]), torch.tensor([positions]))


def teacher_of(logits_NV: torch.Tensor, k: int, temperature: float) -> TeacherTargets:
    best = (logits_NV.double() / temperature).log_softmax(-1).topk(k, -1)
    has_N = torch.arange(len(logits_NV)) % 4 != 3
    return TeacherTargets(best.indices, best.values.to(logits_NV.dtype), has_N)


def random_teacher(count: int, vocabulary: int, k: int, temperature: float = 1.0) -> TeacherTargets:
    generator = torch.Generator().manual_seed(7)
    return teacher_of(torch.randn(count, vocabulary, generator=generator, dtype=torch.float64) * 3, k, temperature)


def temperature_of(objective: Objective) -> float:
    return 1.0 if isinstance(objective, CrossEntropy) else objective.temperature


# --- chunks ------------------------------------------------------------------------------------------------------


def test_loss_of_hand_computed_logits() -> None:
    products = [Product(torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]]), torch.eye(2))]
    # position 0: two equal logits, ln 2. position 1: odds 3 to 1 against the target, ln 4.
    assert chunked_loss(products, torch.tensor([0, 1]), CE).item() == pytest.approx(math.log(2.0) + math.log(4.0), abs=1e-6)


def test_position_predicts_its_target_and_only_where_it_is_trained() -> None:
    hidden_1TD = torch.arange(8.0).reshape(1, 4, 2)
    selected = select_supervised(hidden_1TD, torch.tensor([[IGNORE_INDEX, 7, IGNORE_INDEX, 5]]))
    assert selected.targets_N.tolist() == [7, 5]
    assert selected.hidden_ND.tolist() == [[2.0, 3.0], [6.0, 7.0]]


class _Whole(torch.autograd.Function):
    """The objective over all logits at once, which tests/train/test_objectives.py holds against dense sums."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor, teacher: TeacherTargets, objective: Objective) -> Any:
        ctx.gradient_NV = logits_NV.clone()
        function, temperature = chunk_loss(objective)
        return function(ctx.gradient_NV.div_(temperature), targets_N, teacher, gradient=True)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        return ctx.gradient_NV * grad_output, None, None, None


def whole_loss(
    products: Sequence[Product], targets_N: torch.Tensor, teacher: TeacherTargets, objective: Objective
) -> torch.Tensor:
    logits_NV = torch.stack([inputs_ND @ weight_VD.T for inputs_ND, weight_VD in products]).sum(0)
    if isinstance(objective, CrossEntropy):
        return torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
    return _Whole.apply(logits_NV, targets_N, teacher, objective)  # type: ignore[no-any-return]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("objective", EVERY, ids=NAMES)
@pytest.mark.parametrize("trained", ["frozen", "whole", "adapter", "adapter alone"])
def test_chunks_have_the_loss_and_gradients_of_the_whole(chunk: int, objective: Objective, trained: str) -> None:
    torch.manual_seed(0)
    hidden_ND, low_NR = (torch.randn(N, width, dtype=torch.float64, requires_grad=True) for width in (D, 2))
    weight_VD, high_VR = (torch.randn(V, width, dtype=torch.float64) for width in (D, 2))
    products = [Product(hidden_ND, weight_VD.requires_grad_(trained == "whole"))]
    if "adapter" in trained:
        products.append(Product(low_NR, high_VR.requires_grad_()))
    if trained == "adapter alone":
        hidden_ND.requires_grad_(False)
    targets_N, teacher = torch.randint(V, (N,)), random_teacher(N, V, K, temperature_of(objective))
    leaves = [tensor for product in products for tensor in product if tensor.requires_grad]
    reference = whole_loss(products, targets_N, teacher, objective)
    expected = torch.autograd.grad(reference * 0.37, leaves)
    loss = chunked_loss(products, targets_N, chunk_loss(objective), teacher, chunk)
    found = torch.autograd.grad(loss * 0.37, leaves)
    assert loss.dtype == torch.float64 and len(found) == {"frozen": 1, "whole": 2, "adapter": 3, "adapter alone": 2}[trained]
    torch.testing.assert_close(loss, reference, rtol=1e-13, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_gradients_of_a_trained_bfloat16_head_are_added_up_in_float32() -> None:
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(400, D), torch.randn(V, D)
    targets_N = torch.randint(V, (400,))
    half = Product(hidden_ND.bfloat16().requires_grad_(), weight_VD.bfloat16().requires_grad_())
    exact = Product(*(tensor.detach().double().requires_grad_() for tensor in half))
    found = torch.autograd.grad(chunked_loss([half], targets_N, CE, chunk=4), half)
    expected = torch.autograd.grad(chunked_loss([exact], targets_N, CE), exact)
    for one, other in zip(found, expected, strict=True):
        # one rounding to bfloat16 is 2^-8; a sum of 100 chunks in bfloat16 was off by 0.08
        assert (one.double() - other).norm() < 2**-7 * other.norm()
        assert one.dtype == torch.bfloat16


@pytest.mark.parametrize("objective", EVERY, ids=NAMES)
def test_bfloat16_logits_are_widened_before_anything_is_done_with_them(objective: Objective) -> None:
    """As PEFT has it on a bfloat16 head: an adapter in float32 beside it. Reference: the same numbers in float64."""
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(N, D).bfloat16(), torch.randn(V, D).bfloat16()
    products = [Product(hidden_ND, weight_VD), Product(torch.randn(N, 2), torch.randn(V, 2, requires_grad=True))]
    exact = [Product(*(tensor.detach().double() for tensor in product)) for product in products]
    targets_N, teacher = torch.randint(V, (N,)), random_teacher(N, V, K, temperature_of(objective))
    found = chunked_loss(products, targets_N, chunk_loss(objective), teacher, chunk=3)
    expected = chunked_loss(exact, targets_N, chunk_loss(objective), teacher)
    # the product itself comes in bfloat16, 2^-9 of a logit of some 5; float32 from there on
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=5e-3)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave, on the forward and the backward pass; width: of those whose last
    dimension it is."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.width, self.elements = width, 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor) and (self.width is None or one.shape[-1:] == (self.width,)):
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.parametrize("objective", EVERY, ids=NAMES)
@pytest.mark.parametrize("is_trained", [False, True])
def test_no_tensor_is_larger_than_a_chunk_of_logits(objective: Objective, is_trained: bool) -> None:
    positions, vocabulary, chunk = 96, 1000, 8
    hidden_ND, weight_VD = torch.randn(positions, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=is_trained)
    teacher = random_teacher(positions, vocabulary, 6, temperature_of(objective))
    with LargestTensor() as seen:
        chunked_loss([Product(hidden_ND, weight_VD)], torch.arange(positions), chunk_loss(objective), teacher, chunk).backward()
    assert weight_VD.numel() <= seen.elements <= chunk * vocabulary < positions * vocabulary


def test_without_gradients_none_is_computed() -> None:
    hidden_ND, weight_VD = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    asked: list[bool] = []

    def asking(
        logits_CV: torch.Tensor, targets_C: torch.Tensor, teacher: TeacherTargets | None, *, gradient: bool
    ) -> torch.Tensor:
        asked.append(gradient)
        return CE.function(logits_CV, targets_C, teacher, gradient=gradient)

    with torch.no_grad():
        products = [Product(hidden_ND, weight_VD)]
        loss = chunked_loss(products, torch.zeros(N, dtype=torch.long), ChunkLoss(asking, 1.0), random_teacher(N, V, K))
    assert asked == [False] and not loss.requires_grad


def test_teacher_targets_of_another_row_are_refused() -> None:
    with pytest.raises(AssertionError, match="6 targets of 7 positions"):
        chunked_loss([Product(torch.ones(N, D), torch.ones(V, D))], torch.zeros(N, dtype=torch.long), CE, random_teacher(6, V, K))


# --- the module --------------------------------------------------------------------------------------------------


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


def wake(model: torch.nn.Module) -> None:
    """lora_B as after some training: at zero, lora_A would have no gradient to compare."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def adapted_loss(base: str, objective: Objective | None = None, *, fold: bool = False) -> SupervisedLoss:
    model = attach(load_base(base, "fp32"), Lora(rank=16, alpha=16), seed=0)
    wake(model)
    if fold:
        assert fold_small_layers(model) == 14  # seven linear layers in each of two blocks
    return SupervisedLoss(model, objective or CrossEntropy())


def loss_with_trained_head(base: str, kind: str, objective: Objective | None = None) -> SupervisedLoss:
    linear = ["q_proj", "down_proj"]
    config = LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM",
        target_modules=[*linear, "lm_head"] if kind != "modules_to_save" else linear,
        modules_to_save=["lm_head"] if kind == "modules_to_save" else None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(load_base(base, "fp32"), config)
    wake(model)
    return SupervisedLoss(model, objective or CrossEntropy())


def own_logits(loss: SupervisedLoss, row: Batch) -> torch.Tensor:
    """[N, V], by the model itself."""
    return loss.causal_lm(input_ids=row.ids_1T, position_ids=row.position_ids_1T, use_cache=False).logits[
        row.targets_1T != IGNORE_INDEX
    ]


def check_gradients(loss: SupervisedLoss, reference: SupervisedLoss) -> None:
    expected = {name: parameter.grad for name, parameter in trainable(reference.model).items()}
    for name, parameter in trainable(loss.model).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        # float32 sums in another order: 2e-6 of the largest entry was the worst seen
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("fold", [False, True])
def test_packed_row_has_the_gradients_of_its_documents_alone(base: str, rows: list[Encoded], fold: bool) -> None:
    """Reference: each document by itself, Hugging Face's own loss over the whole vocabulary, no folding."""
    reference, loss = adapted_loss(base), adapted_loss(base, fold=fold)
    expected_sum = 0.0
    for row in rows:
        labels = [token if is_trained else IGNORE_INDEX for token, is_trained in zip(row.ids, row.mask, strict=True)]
        mean = reference.causal_lm(input_ids=torch.tensor([row.ids]), labels=torch.tensor([labels]), use_cache=False).loss
        (mean * sum(row.mask[1:])).backward()
        expected_sum += mean.item() * sum(row.mask[1:])
    found = loss(*packed(rows))
    found.backward()
    assert found.item() == pytest.approx(expected_sum, rel=1e-5)
    check_gradients(loss, reference)


@pytest.mark.parametrize("kind", ["modules_to_save", "lora"])
@pytest.mark.parametrize("objective", EVERY, ids=NAMES)
def test_trained_head_has_the_gradients_of_the_models_own_logits(
    base: str, rows: list[Encoded], kind: str, objective: Objective
) -> None:
    reference, loss = (loss_with_trained_head(base, kind, objective) for _ in range(2))
    row = packed(rows)
    logits_NV, targets_N = own_logits(reference, row), row.targets_1T[row.targets_1T != IGNORE_INDEX]
    teacher = random_teacher(len(targets_N), logits_NV.shape[-1], K, temperature_of(objective))
    whole_loss([Product(logits_NV, torch.eye(logits_NV.shape[-1]))], targets_N, teacher, objective).backward()
    loss(*row[:3], teacher).backward()
    check_gradients(loss, reference)
    assert any("lm_head" in name for name in trainable(loss.model))


@pytest.mark.parametrize("kind", ["modules_to_save", "lora"])
def test_weights_that_zero3_must_gather_are_those_the_loss_reads(base: str, kind: str) -> None:
    head = loss_with_trained_head(base, kind).head
    read = [weight for _, weight in head_products(head, torch.zeros(2, 32))]
    assert [id(weight) for weight in head_weights(head)] == [id(weight) for weight in read]
    assert len(read) == {"modules_to_save": 1, "lora": 2}[kind] and read[-1].requires_grad


def test_head_of_a_disabled_adapter_is_the_bases(base: str) -> None:
    plain = load_base(base, "fp32").get_output_embeddings().weight  # type: ignore
    for kind in ("modules_to_save", "lora"):
        loss = loss_with_trained_head(base, kind)
        with loss.model.disable_adapter():  # type: ignore[operator]
            [weight] = head_weights(loss.head)
            assert torch.equal(weight, plain) and not weight.requires_grad


def test_dora_and_a_bias_on_the_head_are_refused(base: str) -> None:
    config = LoraConfig(r=4, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(UnusableInput, match="DoRA on the head"):
        head_weights(SupervisedLoss(get_peft_model(load_base(base, "fp32"), config), CrossEntropy()).head)
    with pytest.raises(UnusableInput, match="linear layer without bias"):
        head_weights(unwrapped_head(torch.nn.Linear(2, 3)))


def test_stop_token_is_trained_and_the_prompt_is_not(rows: list[Encoded]) -> None:
    stop = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    for row in rows:
        ids_1T, targets_1T, _, _ = packed([row])
        targets_N = select_supervised(ids_1T[..., None].float(), targets_1T).targets_N
        assert targets_N[-1] == stop
        assert targets_N.tolist().count(stop) == 1  # the user's own end of turn stays masked
        assert len(targets_N) < len(row.ids) - 1


@pytest.mark.parametrize("kind", ["frozen", "modules_to_save", "lora"])
def test_row_without_supervised_token_has_zero_loss_and_a_backward_pass(base: str, kind: str) -> None:
    loss = adapted_loss(base) if kind == "frozen" else loss_with_trained_head(base, kind)
    value = loss(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORE_INDEX), torch.zeros(1, 1, dtype=torch.long))
    value.backward()
    assert value.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trainable(loss.model).values())


def test_evaluation_without_a_teacher_is_cross_entropy_whatever_the_objective(base: str, rows: list[Encoded]) -> None:
    with torch.no_grad():
        assert adapted_loss(base, ForwardKl())(*packed(rows)) == adapted_loss(base)(*packed(rows))


def gemma(**settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2", vocab_size=264, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.5, **settings,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).requires_grad_(False)


@pytest.mark.parametrize("objective", EVERY, ids=NAMES)
def test_model_with_a_soft_cap_is_refused_with_both_losses_named(rows: list[Encoded], objective: Objective) -> None:
    with pytest.raises(UnusableInput, match="expected a plain linear head"):
        check_head(SupervisedLoss(gemma(final_logit_softcapping=0.5), objective), packed(rows))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_plain_head_passes_the_check(base: str, rows: list[Encoded], dtype: str) -> None:
    check_head(SupervisedLoss(load_base(base, dtype).requires_grad_(False), CrossEntropy()), packed(rows))  # type: ignore


def test_check_of_a_long_row_asks_for_few_logits(base: str, rows: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.losses.CHECKED_POSITIONS", 5)
    row = packed([*rows, *rows])
    assert (row.targets_1T != IGNORE_INDEX).sum() == 54
    loss = SupervisedLoss(load_base(base, "fp32").requires_grad_(False), CrossEntropy())
    with LargestTensor(width=264) as seen:
        check_head(loss, row)
    assert seen.elements == 32 * 264, "nothing is larger than the head itself"
