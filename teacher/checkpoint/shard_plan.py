"""What prepared shards will hold, file by file, before a byte of weights is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from configs import schema
from configs.errors import UnusableInput
from teacher.checkpoint.configuration import read_configuration, usable
from teacher.checkpoint.empty_model import empty_model, named_tensors, tied_names
from teacher.checkpoint.files import Checkpoint, open_checkpoint, scale_name
from teacher.checkpoint.manifest import Dtype
from teacher.checkpoint.partition import TOP, Layout, Part, Target, part_of, targets_of
from teacher.checkpoint.shards import Stored
from teacher.folders import model_folder
from teacher.runner import DTYPES

SHARDS = "shards"


class Piece(NamedTuple):
    """One target in one file, cut as `part` says."""

    target: Target
    part: Part
    stored: Stored


class ShardFile(NamedTuple):
    """One file to make: what some ranks hold of one unit (a decoder layer, or what is outside of them)."""

    name: str
    unit: int
    pieces: tuple[Piece, ...]
    ranks: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.stored.num_bytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Everything that is decided before a byte of weights is read. ignored: tensors of the checkpoint that the model does
    not have, such as GLM's layer for multi-token prediction."""

    checkpoint: Checkpoint
    model_type: str
    layout: Layout
    dtype: Dtype
    targets: tuple[Target, ...]
    files: tuple[ShardFile, ...]
    ranks: tuple[tuple[str, ...], ...]
    ignored: tuple[str, ...]

    @property
    def bytes_per_rank(self) -> list[int]:
        sizes = {file.name: file.num_bytes for file in self.files}
        return [sum(sizes[name] for name in names) for names in self.ranks]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def layout_of(teacher: schema.Teacher) -> tuple[Layout, Dtype]:
    """Raises UnusableInput for an engine that loads no shards."""
    if not isinstance(teacher.engine, schema.DeepSpeedEngine):
        raise UnusableInput(
            f"teacher.engine {teacher.engine.type}: only the deepspeed engine loads shards; the others read the checkpoint itself"
        )
    layout = teacher.layout
    return Layout(teacher.world, teacher.expert_parallel, layout.tensor_parallel, layout.zero_stage), teacher.engine.dtype


def default_output(teacher: schema.Teacher, layout: Layout, dtype: Dtype) -> Path:
    """teacher.engine.prepared, or a folder beside the model named after the layout."""
    if isinstance(teacher.engine, schema.DeepSpeedEngine) and teacher.engine.prepared:
        return Path(teacher.engine.prepared)
    folder = Path("runs/embedded") if teacher.model == "embedded" else model_folder(teacher.model)
    return folder.with_name(f"{folder.name}-{layout}-{dtype}")


def plan_shards(folder: Path, layout: Layout, dtype: Dtype) -> ShardPlan:
    """The files of every rank, from config.json and the headers of the checkpoint.

    Raises:
        UnusableInput: an unusable config.json, an incomplete checkpoint, or one that does not have what its config.json
            describes.
    """
    config, block = read_configuration(folder)
    checkpoint = open_checkpoint(folder, block)
    with usable(folder):
        model = empty_model(config, DTYPES[dtype])
    _check_heads(config, layout)
    targets = targets_of(config.model_type, named_tensors(model), checkpoint.entries, layout, tied_names(model))
    for target in targets:
        _check_shapes(target, checkpoint)
    files, ranks = _assign(targets, layout, DTYPES[dtype])
    used = {rows.source for target in targets for rows in target.sources}
    ignored = tuple(sorted(checkpoint.entries.keys() - used - {scale_name(name) for name in used}))
    return ShardPlan(checkpoint, config.model_type, layout, dtype, tuple(targets), tuple(files), ranks, ignored)


def _check_heads(config: object, layout: Layout) -> None:
    heads = int(getattr(config, "num_key_value_heads", 0) or getattr(config, "num_attention_heads", 1))
    if heads % layout.tensor:
        raise UnusableInput(f"layout.tensor_parallel {layout.tensor}: does not divide the model's {heads} key-value heads")


def _check_shapes(target: Target, checkpoint: Checkpoint) -> None:
    for rows in target.sources:
        entry = checkpoint.entries[rows.source]
        num_rows, num_columns = entry.matrix
        if num_columns != target.columns or rows.last > num_rows or (len(target.sources) == 1 and num_rows != target.rows):
            raise UnusableInput(
                f"{entry.file}: {rows.source} is {list(entry.shape)}, which does not fit {target.name} {list(target.shape)}; "
                "is this config.json the checkpoint's own?"
            )


def _assign(targets: Sequence[Target], layout: Layout, dtype: torch.dtype) -> tuple[list[ShardFile], tuple[tuple[str, ...], ...]]:
    """One file for each unit and distinct content: ranks that hold the same numbers share it."""
    units: dict[int, list[Target]] = {}
    for target in targets:
        units.setdefault(target.unit, []).append(target)
    files: list[ShardFile] = []
    ranks: list[list[str]] = [[] for _ in range(layout.world)]
    for unit, members in units.items():
        holders: dict[tuple[Part, ...], list[int]] = {}
        for rank in range(layout.world):
            holders.setdefault(tuple(part_of(target, layout, rank) for target in members), []).append(rank)
        for parts, sharing in holders.items():
            name = f"{SHARDS}/{'top' if unit == TOP else f'layer-{unit:04d}'}-{sharing[0]:05d}.safetensors"
            pieces = [
                Piece(target, part, _stored(target, part, layout, dtype)) for target, part in zip(members, parts, strict=True)
            ]
            pieces.sort(key=lambda piece: -piece.stored.dtype.itemsize)  # stable; keeps every tensor aligned
            files.append(ShardFile(name, unit, tuple(pieces), tuple(sharing)))
            for rank in sharing:
                ranks[rank].append(name)
    return files, tuple(tuple(names) for names in ranks)


def _stored(target: Target, part: Part, layout: Layout, dtype: torch.dtype) -> Stored:
    if target.cut == "buffer":
        return Stored(target.name, torch.float32, target.shape)
    if layout.zero_stage == 3:
        return Stored(target.name, dtype, (part.length,))
    rows, columns = part.row_end - part.row, part.column_end - part.column
    inner = target.shape[1:-1]
    shape = (rows // math.prod(inner), *inner, columns) if len(target.shape) > 1 else (rows,)
    return Stored(target.name, dtype, shape)
