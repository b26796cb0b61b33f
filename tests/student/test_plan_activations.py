"""Activations: the formulas against the sum of what autograd keeps."""

import weakref
from collections.abc import Callable

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from peft import PeftModel
from transformers import AutoModelForCausalLM

from configs.training import Lora, Train
from student.lora import attach
from student.planning.activations import Activations, activations
from student.planning.adapter import adapter_of
from student.planning.shape import read_shape
from tests.student.plan_models import tiny_config
from train.attention import use_documents

LENGTHS = (37, 90, 1, 64)
ROW = sum(LENGTHS)
LINEAR = torch.nn.functional.linear
VALUE_BYTES = {"fp32": 4, "bf16": 2}


class Kept:
    """A tensor that the backward pass will ask for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.fixture(params=[2, 3], ids=["ZeRO-2", "ZeRO-3"])
def stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """DeepSpeed replaces torch's linear function with its own when a model is partitioned, for good."""
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap if request.param == 3 else LINEAR)
    return int(request.param)


def kept_bytes(forward: Callable[[], torch.Tensor], model: PeftModel) -> int:
    """Of storages that live after the forward pass because its backward pass needs them; parameters are not counted."""
    kept: list[weakref.ref[Kept]] = []
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> Kept:
        found = Kept(tensor)
        kept.append(weakref.ref(found))
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.tensor):
        output = forward()
    alive = [found.tensor.untyped_storage() for reference in kept if (found := reference()) is not None]
    assert output.requires_grad
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive if storage.data_ptr() not in own}.values())


def measured(family: str, lora: Lora, train: Train, *, layers: int, kv_heads: int) -> tuple[int, Activations]:
    config = tiny_config(family, layers=layers, kv_heads=kv_heads)
    model = AutoModelForCausalLM.from_config(config)
    use_documents(model)
    adapted = attach(model, lora, seed=0).to({"fp32": torch.float32, "bf16": torch.bfloat16}[train.dtype]).train()
    if train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, positions = torch.zeros(1, ROW, dtype=torch.int64), torch.cat([torch.arange(length) for length in LENGTHS])[None]
    body = model.get_decoder()
    found = kept_bytes(lambda: body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state, adapted)
    shape = read_shape(config.to_dict(), "tiny")
    return found, activations(shape, adapter_of(shape, lora), train, ROW)


def settings(dtype: str, *, stage: int = 2, again: bool = False) -> Train:
    return Train.model_validate(
        {"zero_stage": stage, "dtype": dtype, "max_tokens_per_row": ROW, "activation_checkpointing": again, "liger": False}
    )


def around(planned: Activations) -> int:
    """Beside the layers, in the model's body: cosines and sines, the last norm."""
    return planned.rotary - 25 * ROW  # ids, targets, positions and the choice of positions are nobody's saved tensors


@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_packed_row_keeps_what_the_formula_says_to_the_byte(stage: int, family: str, dtype: str, kv_heads: int) -> None:
    found, planned = measured(family, Lora(rank=3), settings(dtype, stage=stage), layers=3, kv_heads=kv_heads)
    assert found == planned.layers + around(planned)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layers_that_are_computed_again_keep_one_hidden_state_each(dtype: str) -> None:
    found, planned = measured("qwen3", Lora(rank=3), settings(dtype, again=True), layers=3, kv_heads=2)
    rotary = 2 * ROW * 10 * VALUE_BYTES[dtype]  # held by the checkpoint's own closure, out of the hooks' sight
    assert found == planned.hidden + around(planned) - rotary


@pytest.mark.parametrize(
    "lora", [Lora(rank=3, targets=("q_proj", "v_proj")), Lora(rank=3, targets=("q_proj", "o_proj", "down_proj"))], ids=str
)
def test_fewer_targets_keep_fewer_inputs(stage: int, lora: Lora) -> None:
    found, planned = measured("llama", lora, settings("fp32", stage=stage), layers=3, kv_heads=2)
    assert found == planned.layers + around(planned)


def test_with_dropout_zero_3_keeps_what_is_before_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference: a CPU's masks are wider than a GPU's."""
    kept = []
    for stage, linear in ((2, LINEAR), (3, zero3_linear_wrap)):
        monkeypatch.setattr(torch.nn.functional, "linear", linear)
        kept.append(measured("llama", Lora(rank=3, dropout=0.1), settings("bf16", stage=stage), layers=3, kv_heads=2))
    (found, planned), (found_3, planned_3) = kept
    assert found_3 - found == planned_3.layers - planned.layers > 0


def test_dora_keeps_both_outputs_of_a_layer_beside() -> None:
    found, planned = measured("llama", Lora(rank=3, dora=True), settings("fp32"), layers=3, kv_heads=2)
    assert found == pytest.approx(
        planned.layers + around(planned), rel=0.02
    )  # magnitudes: a vector a layer, per row and not token


def test_ranks_that_share_a_row_keep_a_slice_each_until_key_heads_are_copied() -> None:
    shape = read_shape(tiny_config("llama").to_dict(), "tiny")  # 6 heads, 2 for keys, 6 wide
    one, two, six = (
        activations(
            shape, adapter_of(shape, Lora(rank=3)), settings("bf16").model_copy(update={"sequence_parallel": degree}), 192
        )
        for degree in (1, 2, 6)
    )
    assert two.layers * 2 == one.layers
    assert (
        six.layers * 6 - one.layers == 3 * 192 * 2 * 2 * (6 - 2) * 6
    )  # layers, tokens, bytes, keys and values, copied heads, width
