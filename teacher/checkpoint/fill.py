"""A model on the meta device gets its values, tensor by tensor."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import UnusableInput

Adopt = Callable[[str, nn.Parameter, Tensor], nn.Parameter]
"""(name, the empty parameter, what this rank holds of it) -> the parameter to put in its place."""


class Place(NamedTuple):
    """Where a tensor hangs: under `leaf` of `owner`. The same module may hang in a model twice."""

    name: str
    owner: nn.Module
    leaf: str


def fill(module: nn.Module, held: dict[str, Tensor], device: torch.device, adopt: Adopt) -> None:
    """Every parameter and buffer of `module` has its values; `held` is empty afterwards. A persistent buffer is taken as it
    is held; one that no checkpoint has (AutoEP's token counters) starts at zero on `device`.

    Raises:
        UnusableInput: `held` is not what the model is made of: another release prepared it.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied: one parameter, several places
    for place, parameter in list(_empty_parameters(module)):
        if parameter not in made:
            made[parameter] = adopt(place.name, parameter, _take(held, place.name))
        place.owner._parameters[place.leaf] = made[parameter]
    for place, buffer in list(_empty_buffers(module)):
        if place.leaf in place.owner._non_persistent_buffers_set:
            place.owner._buffers[place.leaf] = torch.zeros_like(buffer, device=device)
        elif place.owner._buffers[place.leaf] is buffer:
            place.owner._buffers[place.leaf] = _take(held, place.name)
    if held:
        raise UnusableInput(
            f"prepared shards hold {next(iter(held))}, which the model does not have; run tracestill prepare CONFIG again"
        )


def like(empty: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter of `values` with all that has been noted on `empty`: AutoEP and AutoTP mark parameters with attributes."""
    parameter = nn.Parameter(values, requires_grad=empty.requires_grad)
    for name, noted in vars(empty).items():
        setattr(parameter, name, noted)
    return parameter


def _take(held: dict[str, Tensor], name: str) -> Tensor:
    if name not in held:
        raise UnusableInput(f"prepared shards have no {name}; run tracestill prepare CONFIG again, with this release")
    return held.pop(name)


def _empty_parameters(module: nn.Module) -> Iterator[tuple[Place, nn.Parameter]]:
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                yield Place(f"{prefix}.{leaf}".lstrip("."), owner, leaf), parameter


def _empty_buffers(module: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_meta:
                yield Place(f"{prefix}.{leaf}".lstrip("."), owner, leaf), buffer
