"""The causal language model of a configuration without its weights: names and shapes, on torch's meta device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from teacher.checkpoint.partition import Tensor
from teacher.sparse_attention import attention_for, install


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """As teacher/runner.py reads it, but on the meta device: no memory, no values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=attention_for(config.model_type),
            experts_implementation="grouped_mm" if getattr(config, "num_local_experts", None) else None,
        )
    install(model)
    return model


class EmptyIsMeta(TorchFunctionMode):
    """Modules made inside have their parameters on the meta device. torch.device("meta") would also take in the probe that
    AutoEP sends through an activation function to compare its values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def named_tensors(model: PreTrainedModel) -> list[Tensor]:
    """Parameters and persistent buffers: what a checkpoint holds."""
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    buffers = [Tensor(name, tuple(buffer.shape), True) for name, buffer in model.named_buffers() if name not in computed]
    return [*(Tensor(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()), *buffers]


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names under which a tensor of another name is used once more."""
    return set(getattr(model, "all_tied_weights_keys", {}) or {})


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers that no checkpoint holds get their values, by transformers' own rules (rotary frequencies), in float32."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in _computed(module)):
            for name in module._non_persistent_buffers_set:
                buffer = module._buffers[name]
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, dtype=torch.float32, device=device)
            model._init_weights(module)


def _computed(module: nn.Module) -> list[torch.Tensor]:
    named = module._buffers.items()
    return [buffer for name, buffer in named if name in module._non_persistent_buffers_set and buffer is not None]
