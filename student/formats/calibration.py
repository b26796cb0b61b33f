"""What the linear layers of a student are given when it reads its own traces, one decoder layer at a time.

A decoder layer sees what the layers before it, already rounded, make of the traces: that is what it will see when served.

Held at once, besides the model: a copy of one decoder layer, its Hessians, and every token's hidden state. With 128 traces of
2,048 tokens (262,144) in float32:
                       7B (hidden 4,096, MLP 11,008, 32 layers)      13B (5,120, 13,824, 40 layers)
    one layer          202 M weights, 0.8 GB                         317 M, 1.3 GB
    seven Hessians     6 x 67 MB + 485 MB = 0.9 GB                   6 x 105 MB + 764 MB = 1.4 GB
    hidden states      262,144 x 4,096 x 4 = 4.3 GB                  5.4 GB
Per token and layer 2 x 2 x 202 M for two passes and 2 x (6 x 4,096^2 + 11,008^2) for the products: 1.25 GFLOP at 7B, 40 GFLOP
over all layers, 10.5 PFLOP for 262,144 tokens: 90 minutes at 2 TFLOP/s, which 64 CPU cores reach (13B: 20.6 PFLOP, 3 hours).

T tokens of one conversation    I inputs of a linear layer    O outputs    D hidden size
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from configs.errors import UnusableInput

Rounding = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""(name of the linear layer, weight_OI, hessian_II) to what stands in its place, [O, I]."""


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Their name in the model, and themselves. Raises UnusableInput where this is no plain stack of decoder layers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.get_text_config().num_hidden_layers:
            return name, module
    raise UnusableInput(f"export: {type(model).__name__} has no list of decoder layers to calibrate; export merged instead")


@torch.no_grad()
def round_layer_by_layer(
    model: PreTrainedModel, conversations: Sequence[Sequence[int]], wanted: Mapping[str, nn.Linear], rounding: Rounding
) -> None:
    """`rounding` was called for every linear layer in `wanted` (all of them inside decoder layers), in the model's order, each
    with the Hessian of what it is given when all before it are rounded. `model` stays as it is.

    hessian_II: float32, the sum of x x^T over every token of every conversation.
    Raises UnusableInput where there is no token to calibrate on, or an id that the embedding has no row for.
    """
    inputs = [ids for ids in conversations if len(ids)]
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, operator]
    if not inputs:
        raise UnusableInput("export: no training conversation to calibrate on; expected at least one in the dataset, or int8")
    if (largest := max(max(ids) for ids in inputs)) >= rows:
        raise UnusableInput(f"export: calibration holds id {largest}, the embedding {rows} rows; use the base's own tokenizer")
    prefix, layers = decoder_layers(model)
    hidden_1TD, arguments = _first_inputs(model, layers, inputs)
    for index, layer in enumerate(layers):
        rounded = copy.deepcopy(layer).eval()
        inside = {
            name: module
            for name, module in rounded.named_modules()
            if isinstance(module, nn.Linear) and f"{prefix}.{index}.{name}" in wanted
        }
        hessians = _hessians(rounded, inside, hidden_1TD, arguments[index])
        for name, module in inside.items():
            module.weight.data = rounding(f"{prefix}.{index}.{name}", module.weight.data, hessians.pop(name))
        for at, given in enumerate(arguments[index]):
            hidden_1TD[at] = _hidden(rounded(hidden_1TD[at], **given))


def _first_inputs(
    model: PreTrainedModel, layers: nn.ModuleList, conversations: Sequence[Sequence[int]]
) -> tuple[list[torch.Tensor], list[list[dict[str, Any]]]]:
    """(the embedded conversations; of each layer, what else the model gives it with each: positions, a mask of its kind). The
    model runs with layers that hand on what they get, which costs no more than its embedding."""
    embedded: list[torch.Tensor] = []
    arguments: list[list[dict[str, Any]]] = [[] for _ in layers]

    def handing_on(index: int) -> Callable[..., torch.Tensor]:
        def forward(hidden_1TD: torch.Tensor, **given: Any) -> torch.Tensor:
            if index == 0:
                embedded.append(hidden_1TD)
            arguments[index].append(given)
            return hidden_1TD

        return forward

    try:
        for index, layer in enumerate(layers):
            layer.__dict__["forward"] = handing_on(index)
        for ids in conversations:
            model.base_model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)  # the class's own again
    return embedded, arguments


def _hessians(
    layer: nn.Module, linears: Mapping[str, nn.Linear], hidden_1TD: Sequence[torch.Tensor], arguments: Sequence[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """float32 [I, I] of each linear layer."""
    sums = {name: torch.zeros(linear.in_features, linear.in_features) for name, linear in linears.items()}

    def adding(sum_II: torch.Tensor) -> Callable[..., None]:
        def add(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            inputs_TI = given[0].flatten(0, -2).float()
            sum_II.addmm_(inputs_TI.T, inputs_TI)

        return add

    handles = [linear.register_forward_pre_hook(adding(sums[name])) for name, linear in linears.items()]
    try:
        for one, given in zip(hidden_1TD, arguments, strict=True):
            layer(one, **given)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _hidden(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Some families' decoder layers return a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]
