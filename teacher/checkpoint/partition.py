"""Which numbers of which tensor a rank holds: the arithmetic that AutoEP, AutoTP and ZeRO do with processes, done without.

A checkpoint's tensor becomes a target: a tensor of the sharded engine, under the engine's name, with the source rows it is
made of. Everything is a matrix here, all dimensions but the last folded into rows, so that a rank's part is three cuts:
rows (experts, output features), columns (input features), and of what is left, row after row, one flat range (ZeRO).

Pure: no torch, no files. That DeepSpeed really holds this on every rank is a test (tests/distributed/test_prepared.py).
"""

import math
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from configs.errors import UnusableInput
from teacher.families import FAMILIES, HEAD, Family

TOP = -1
"""Unit of the tensors outside any decoder layer: embeddings, final norm, head."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees of parallelism that a set of shards is made for. world: all ranks. expert, tensor: as in the recipe.
    zero_stage: 3 cuts every parameter over its group of ranks, 0 leaves it whole on each."""

    world: int
    expert: int = 1
    tensor: int = 1
    zero_stage: Literal[0, 3] = 3

    def __str__(self) -> str:
        return f"ep{self.expert}-tp{self.tensor}-zero{self.zero_stage}-{self.world}ranks"


Cut = Literal["whole", "replaced", "columns", "rows", "experts", "buffer"]
"""How a tensor is spread. whole: ZeRO over all ranks. replaced: whole, but AutoEP made a new parameter of it, which ZeRO cuts
over the data-parallel group alone. columns: output features over the tensor group (column parallel). rows: input features
(row parallel). experts: the leading dimension over the expert group. buffer: on every rank, whole, in float32."""


class Rows(NamedTuple):
    """Consecutive rows [first, last) of a source tensor."""

    source: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the engine before it is cut. sources: its rows, in order; together they are all of them."""

    name: str
    shape: tuple[int, ...]
    cut: Cut
    sources: tuple[Rows, ...]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def unit(self) -> int:
        """Index of the decoder layer it belongs to, or TOP."""
        found = re.search(r"\.layers\.(\d+)\.", self.name)
        return int(found[1]) if found else TOP


class Part(NamedTuple):
    """What one rank holds of a target: rows [row, row_end), columns [column, column_end), and of that block, row after row,
    the elements [first, last). length: elements stored; those past last - first are ZeRO's padding."""

    row: int
    row_end: int
    column: int
    column_end: int
    first: int
    last: int
    length: int


def part_of(target: Target, layout: Layout, rank: int) -> Part:
    """The part of `target` on `rank`. Ranks of a tensor-parallel or expert-parallel group are consecutive; the groups that
    ZeRO cuts over are strided across them."""
    row, row_end, column, column_end = 0, target.rows, 0, target.columns
    match target.cut:
        case "columns":
            row, row_end = _share(target.rows, layout.tensor, rank % layout.tensor)
        case "rows":
            column, column_end = _share(target.columns, layout.tensor, rank % layout.tensor)
        case "experts":
            row, row_end = _share(target.rows, layout.expert, rank % layout.expert)
    numel = (row_end - row) * (column_end - column)
    group, index = zero_group(target.cut, layout, rank)
    length = -(-numel // group)
    return Part(row, row_end, column, column_end, min(index * length, numel), min((index + 1) * length, numel), length)


def zero_group(cut: Cut, layout: Layout, rank: int) -> tuple[int, int]:
    """(size, index of `rank`) of the group of ranks over which ZeRO cuts such a tensor; (1, 0) where it does not."""
    if layout.zero_stage == 0 or cut == "buffer":
        return 1, 0
    shared = {"whole": 1, "experts": layout.expert}.get(cut, layout.tensor)
    return layout.world // shared, rank // shared


def _share(total: int, ranks: int, index: int) -> tuple[int, int]:
    """[first, last) of near-even shares; the first ones take the remainder."""
    small, extra = divmod(total, ranks)
    first = index * small + min(index, extra)
    return first, first + small + (index < extra)


# --- from a model's tensors to targets -----------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A parameter or persistent buffer of the model as transformers names it."""

    name: str
    shape: tuple[int, ...]
    is_buffer: bool = False


class Spelling(NamedTuple):
    """What a checkpoint calls one layer's experts. block: their module; gate, up, down: the three matrices of an expert."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


# Where published checkpoints differ from the default; by `model_type`.
SPELLINGS = {"mixtral": Spelling("block_sparse_moe", "w1", "w3", "w2")}


def targets_of(
    model_type: str, tensors: Sequence[Tensor], in_checkpoint: Container[str], layout: Layout, tied: Iterable[str] = ()
) -> list[Target]:
    """The engine's tensors under `layout`, with the checkpoint tensors each is made of; unit by unit, model order inside.

    in_checkpoint: names that the checkpoint has; it may keep experts one by one (as published) or fused (transformers 5).
    tied: names that share another tensor's values; they are no targets of their own.

    Raises:
        UnusableInput: a tensor that the model needs is not in the checkpoint, or tensor parallelism of tied embeddings.
    """
    family = FAMILIES.get(model_type)
    spelling = SPELLINGS.get(model_type, Spelling())
    tied = set(tied)
    if tied and layout.tensor > 1:
        raise UnusableInput("layout.tensor_parallel: this model ties its embeddings, which AutoTP unties; set it to 1")
    sparse = {tensor.name.rpartition(".experts.")[0] for tensor in tensors if ".experts." in tensor.name}
    found: list[Target] = []
    for tensor in tensors:
        if tensor.name in tied:
            continue
        block, _, leaf = tensor.name.rpartition(".experts.")
        if block:
            found.extend(_experts(block, leaf, tensor.shape, spelling, in_checkpoint, layout))
        else:
            found.append(_plain(tensor, family, spelling, sparse, in_checkpoint, layout))
    missing = [rows.source for target in found for rows in target.sources if rows.source not in in_checkpoint]
    if missing:
        raise UnusableInput(
            f"the checkpoint has no {missing[0]} ({len(missing)} tensors missing); expected what config.json describes "
            f"({model_type}); restore the missing files, or mend config.json"
        )
    return sorted(found, key=lambda target: target.unit)


def _plain(
    tensor: Tensor, family: Family | None, spelling: Spelling, sparse: set[str], in_checkpoint: Container[str], layout: Layout
) -> Target:
    """A tensor that is no routed expert. AutoEP moves the router of a sparse block."""
    source, name = tensor.name, tensor.name
    block, is_router, leaf = tensor.name.rpartition(".gate.")
    is_router_here = bool(is_router) and block in sparse
    if is_router_here:
        respelled = f"{block.removesuffix('mlp')}{spelling.block}.gate.{leaf}"
        source = respelled if respelled in in_checkpoint else source
        if layout.expert > 1:
            name = f"{block}.router.{leaf}" if tensor.is_buffer else f"{block}.router.gate.{leaf}"
    cut: Cut = "buffer" if tensor.is_buffer else "whole"
    if not tensor.is_buffer and layout.tensor > 1:
        cut = "replaced" if is_router_here and layout.expert > 1 else _sliced(tensor.name, family)
    rows = math.prod(tensor.shape[:-1]) if len(tensor.shape) > 1 else math.prod(tensor.shape)
    return Target(name, tensor.shape, cut, (Rows(source, 0, rows),))


def _sliced(name: str, family: Family | None) -> Cut:
    """How AutoTP spreads the parameter; a bias goes with its matrix, but row parallelism leaves it whole."""
    weight = name.removesuffix("bias") + "weight" if name.endswith(".bias") else name
    if family is None or any(re.match(pattern, weight) for pattern in family.whole):
        return "whole"
    if any(re.match(pattern, weight) for pattern in (*family.column, HEAD)):
        return "columns"
    if any(re.match(pattern, weight) for pattern in family.row):
        return "rows" if name == weight else "replaced"
    return "whole"


def _experts(
    block: str, leaf: str, shape: tuple[int, ...], spelling: Spelling, in_checkpoint: Container[str], layout: Layout
) -> Iterator[Target]:
    """One fused expert tensor, [E, 2F, H] (gate over up) or [E, H, F]. AutoEP keeps gate and up apart, as w1 and w3."""
    num_experts, height, _ = shape
    halves = ((spelling.gate, "w1"), (spelling.up, "w3")) if leaf == "gate_up_proj" else ((spelling.down, "w2"),)
    height //= len(halves)
    fused = f"{block}.experts.{leaf}"
    source_block = f"{block.removesuffix('mlp')}{spelling.block}"

    def rows_of(expert: int, half: int) -> Rows:
        if fused in in_checkpoint:
            first = (expert * len(halves) + half) * height
            return Rows(fused, first, first + height)
        return Rows(f"{source_block}.experts.{expert}.{halves[half][0]}.weight", 0, height)

    if layout.expert == 1:
        both = tuple(rows_of(expert, half) for expert in range(num_experts) for half in range(len(halves)))
        yield Target(fused, shape, "whole", both)
        return
    for half, (_, name) in enumerate(halves):
        rows = tuple(rows_of(expert, half) for expert in range(num_experts))
        yield Target(f"{block}.experts.{name}", (num_experts, height, shape[2]), "experts", rows)
