"""The arithmetic that a training step needs, and the share of the devices' peak that it reached (MFU, Chowdhery et al. 2022).

What is needed, not what was done: activations computed again for a checkpointed backward pass are not counted.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from configs.devices import DEVICES


class Work(NamedTuple):
    """Of one step over all ranks. tokens: in its rows. supervised: of those, that reach the head. attended: sum over documents of
    length squared."""

    tokens: int
    supervised: int
    attended: int


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """frozen, trained: weights of linear layers by whether they get a gradient, without the head. head: its weights. attention:
    of all layers, heads x width of a head."""

    frozen: int
    trained: int
    head: int
    attention: int

    def flops(self, work: Work) -> float:
        """Forward 2 a weight and token, the input's gradient 2, a trained weight's own gradient 2 more. Causal attention's two
        products take 2 x length^2 x width forward (half of the square), and twice that backward."""
        linear = work.tokens * (4 * self.frozen + 6 * self.trained)
        return linear + 4.0 * work.supervised * self.head + 6.0 * work.attended * self.attention


def arithmetic_of(model: nn.Module, causal_lm: PreTrainedModel) -> Arithmetic:
    """Of a model as it is about to be trained, before ZeRO-3 partitions it."""
    head, config = causal_lm.get_output_embeddings(), causal_lm.config.get_text_config()
    assert isinstance(head, nn.Module)
    inside_head = {id(parameter) for parameter in head.parameters()}
    linear = {id(layer.weight): layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)}
    body = [weight for key, weight in linear.items() if key not in inside_head]
    frozen = sum(weight.numel() for weight in body if not weight.requires_grad)
    trained = sum(weight.numel() for weight in body if weight.requires_grad)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * width
    return Arithmetic(frozen, trained, sum(parameter.numel() for parameter in head.parameters()), attention)


def peak_flops(dtype: str) -> float | None:
    """Of this rank's device, dense; None for a CPU and for a GPU whose data sheet is not at hand."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    return next((device.flops(dtype) for kind, device in DEVICES.items() if kind in name), None)
