"""What a model is given before it is trained, and what is said where it is given nothing."""

import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from configs.errors import UnusableInput
from configs.training import Train
from train.kernels import apply_liger, prepare_model, why_not


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_the_log_says_why_liger_was_not_applied(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert not apply_liger(tiny_model(), is_wanted=False)
    assert caplog.messages == ["liger kernels: not applied, train.liger is false"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_liger_is_not_applied() -> None:
    assert why_not("llama", is_wanted=True) == "no CUDA device"


def test_liger_gets_the_instance_and_leaves_the_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which needs Triton and a GPU."""
    given: dict[str, Any] = {}
    package = ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = lambda **settings: given.update(settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr("train.kernels.why_not", lambda *_, **__: None)
    model = tiny_model()
    assert apply_liger(model, is_wanted=True)
    assert given.pop("model") is model
    assert given == {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


def test_activation_checkpointing_is_not_reentrant() -> None:
    model = tiny_model()
    prepare_model(model, Train(activation_checkpointing=True, liger=False))
    assert model.is_gradient_checkpointing
    layer = model.get_decoder().layers[0]  # type: ignore
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}  # type: ignore


def test_a_model_that_cannot_checkpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UnusableInput, match="activation_checkpointing: type llama cannot"):
        prepare_model(model, Train(activation_checkpointing=True, liger=False))


@pytest.mark.gpu
@pytest.mark.skipif(why_not("llama", is_wanted=True) is not None, reason="needs a GPU and liger-kernel")
def test_liger_changes_gradients_by_rounding_only() -> None:
    ids_1T = torch.arange(50)[None].cuda()
    gradients = []
    for is_wanted in (False, True):
        model = tiny_model().cuda()  # type: ignore
        apply_liger(model, is_wanted=is_wanted)
        model(input_ids=ids_1T, labels=ids_1T).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert found is not None and expected is not None
        assert (found - expected).norm() < 1e-4 * expected.norm(), name
