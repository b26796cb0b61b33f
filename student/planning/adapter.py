"""What LoRA trains of a student: which modules it is on, and every trained tensor's size."""

from collections import Counter
from typing import NamedTuple

from configs.errors import UnusableInput
from configs.training import Lora
from student.planning.shape import Module, Shape


class Adapter(NamedTuple):
    """targets: modules with a low-rank product beside them. saved: trained whole, as a copy beside the frozen original.
    tensors: how many trained tensors there are of each number of elements."""

    lora: Lora
    targets: tuple[Module, ...]
    saved: tuple[Module, ...]
    tensors: Counter[int]

    @property
    def parameters(self) -> int:
        return sum(size * count for size, count in self.tensors.items())

    @property
    def layers(self) -> int:
        """Modules with an adapter."""
        return sum(module.count for module in self.targets)

    def is_on(self, *names: str) -> int:
        """How many of these modules have an adapter."""
        return sum(any(target.is_called(name) for target in self.targets) for name in names)


def adapter_of(shape: Shape, lora: Lora) -> Adapter:
    """As student.lora.attach puts it on: each target has A of [rank, inputs] and B of [outputs, rank], with DoRA a magnitude of
    [outputs].

    Raises:
        UnusableInput: a name that no module has, or one of a head and an embedding that share a tensor.
    """
    saved = _named(shape, lora.modules_to_save, "student.lora.modules_to_save")
    _refuse_namesakes(shape, lora.modules_to_save)
    if lora.targets == "all-linear":
        targets = tuple(module for module in shape.modules if module.kind == "linear" and module not in saved)
    else:
        targets = _named(shape, lora.targets, "student.lora.targets")
        for module in targets:
            if module.kind == "norm":
                raise UnusableInput(f"student.lora.targets: {module.name} is no linear layer and no embedding; leave it out")
    if shape.head.shared:
        _refuse_half(targets, saved)
    tensors: Counter[int] = Counter()
    for module in targets:
        for size in (lora.rank * module.inputs, module.outputs * lora.rank, *((module.outputs,) if lora.dora else ())):
            tensors[size] += module.count
    for module in saved:
        if not module.shared:
            for size in module.sizes:
                tensors[size] += module.count
    return Adapter(lora, targets, saved, tensors)


def _refuse_half(targets: tuple[Module, ...], saved: tuple[Module, ...]) -> None:
    adapted, whole = (sum(module.kind in ("head", "embedding") for module in modules) for modules in (targets, saved))
    if adapted or whole == 1:
        setting = "targets" if adapted else "modules_to_save"
        raise UnusableInput(
            f"student.lora.{setting}: lm_head and embed_tokens share one tensor (tie_word_embeddings); expected both in "
            "student.lora.modules_to_save, or neither"
        )


def _refuse_namesakes(shape: Shape, names: tuple[str, ...]) -> None:
    """As student.lora.refuse_namesakes: PEFT goes by the letters that a name ends in."""
    for name in names:
        others = {module.name.rpartition(".")[2] for module in shape.modules if module.name.endswith(name)} - {*names}
        if others:
            raise UnusableInput(
                f"student.lora.modules_to_save: {name} would train {', '.join(sorted(others))} too, whose names end so; name "
                f"them all, or leave {name} out"
            )


def _named(shape: Shape, names: tuple[str, ...], where: str) -> tuple[Module, ...]:
    for name in names:
        if not any(module.is_called(name) for module in shape.modules):
            known = ", ".join(module.name.rpartition(".")[2] for module in shape.modules)
            raise UnusableInput(f"{where}: no module is called {name}; expected one of {known}")
    return tuple(module for module in shape.modules if any(module.is_called(name) for name in names))


def frozen_tensors(shape: Shape) -> Counter[int]:
    """The base's own tensors, by number of elements; the originals of modules_to_save are among them."""
    tensors: Counter[int] = Counter()
    for module in shape.modules:
        for size in module.sizes if not module.shared else ():
            tensors[size] += module.count
    return tensors
