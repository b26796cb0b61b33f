"""A Hugging Face checkpoint read a few rows at a time: headers first, then exactly the bytes that are asked for.

Files are read into buffers, never mapped: pages of a map count as this process's memory.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from configs.errors import UnusableInput
from teacher.checkpoint.dequantise import dequantise_rows
from teacher.checkpoint.partition import Rows

CHUNK_BYTES = 8 << 20
"""Bytes in float32 of the rows that are in memory at once. A chunk exists at most as FP8, float32, scales and result together."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
INDEX = "model.safetensors.index.json"
DEFAULT_BLOCK = (128, 128)


class Entry(NamedTuple):
    """One tensor of a safetensors file. start: its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns), all dimensions but the last folded into rows; a vector is one column."""
        return (math.prod(self.shape[:-1]), self.shape[-1]) if len(self.shape) > 1 else (math.prod(self.shape), 1)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, none of them read.

    Raises:
        UnusableInput: not a safetensors file, or one that ends before its last tensor does.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, said) for name, said in header.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableInput(f"{path}: not a whole safetensors file ({error}); download it again") from error
    end = max((entry.start + entry.num_bytes for entry in entries.values()), default=8 + length)
    if end != size:
        raise UnusableInput(f"{path}: {size} bytes, expected {end} by its header; download it again")
    return entries


def _entry(path: Path, data: int, said: Mapping[str, object]) -> Entry:
    first, last = said["data_offsets"]  # type: ignore[misc]
    return Entry(path, str(said["dtype"]), tuple(said["shape"]), data + first, last - first)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder. block: rows and columns that share a scale in FP8 weights."""

    folder: Path
    entries: dict[str, Entry]
    block: tuple[int, int] = DEFAULT_BLOCK

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})

    def read(self, rows: Rows, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The rows in `dtype`, [up to as many as CHUNK_BYTES hold, columns] at a time."""
        entry = self.entries[rows.source]
        num_columns = entry.matrix[1]
        step = max(1, CHUNK_BYTES // (4 * num_columns))
        scale = self._scale(rows.source) if entry.dtype == "F8_E4M3" else None
        for first in range(rows.first, rows.last, step):
            raw = read_rows(entry, first, min(first + step, rows.last))
            height = entry.shape[-2] if len(entry.shape) > 1 else entry.matrix[0]
            yield raw.to(dtype) if scale is None else dequantise_rows(raw, scale, first, height, self.block, dtype)

    def _scale(self, name: str) -> torch.Tensor:
        entry = self.entries[scale_name(name)]
        return read_rows(entry, 0, entry.matrix[0]).float()


def scale_name(name: str) -> str:
    return f"{name}_scale_inv"


def read_rows(entry: Entry, first: int, last: int) -> torch.Tensor:
    """Rows [first, last) as the file has them, [rows, columns]."""
    dtype, num_columns = DTYPES[entry.dtype], entry.matrix[1]
    buffer = torch.empty((last - first, num_columns), dtype=dtype)
    with entry.file.open("rb", buffering=0) as file:
        read_exactly(file.fileno(), buffer.view(torch.uint8), entry.start + first * num_columns * dtype.itemsize)
    return buffer


def read_exactly(descriptor: int, bytes_N: torch.Tensor, offset: int) -> None:
    """Fills a contiguous uint8 tensor from `offset` on. Raises EOFError where the file ends before it is full."""
    view = bytes_of(bytes_N.view(-1))
    done = 0
    while done < len(view):  # one call reads at most 2 GiB
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise EOFError(f"file ends at byte {offset + done}")
        done += count


def bytes_of(bytes_N: torch.Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor itself, not a copy."""
    return memoryview(bytes_N.numpy())  # type: ignore[arg-type]  # numpy's stubs hide __buffer__ before Python 3.12


def open_checkpoint(folder: Path, block: tuple[int, int] = DEFAULT_BLOCK) -> Checkpoint:
    """The checkpoint's tensors, from the headers of its files alone.

    Raises:
        UnusableInput: a file that the index names is missing or broken, or a tensor of a dtype that cannot be prepared.
    """
    entries: dict[str, Entry] = {}
    for path in _files(folder):
        for name, entry in read_header(path).items():
            entries[name] = entry
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise UnusableInput(f"{entry.file}: {name} is {entry.dtype}; expected {', '.join(DTYPES)}; convert the checkpoint")
        if entry.dtype == "F8_E4M3":
            _check_scale(name, entry, entries, block)
    return Checkpoint(folder, entries, block)


def _files(folder: Path) -> list[Path]:
    """Those that the index names, or all when there is no index."""
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableInput(f"{index}: not a safetensors index ({error}); download it again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UnusableInput(f"{folder / missing[0]}: missing, though {INDEX} names it ({len(missing)} files are); download it")
    return [folder / name for name in names]


def _check_scale(name: str, entry: Entry, entries: Mapping[str, Entry], block: tuple[int, int]) -> None:
    scale = entries.get(scale_name(name))
    if scale is None or len(entry.shape) < 2:
        raise UnusableInput(f"{entry.file}: {name} is FP8 without {scale_name(name)}; expected one scale for each block")
    rows, columns = entry.shape[-2:]
    expected = (*entry.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if scale.shape != expected or scale.dtype not in ("F32", "BF16"):
        raise UnusableInput(
            f"{scale.file}: {scale_name(name)} is {scale.dtype} {list(scale.shape)}, expected F32 {list(expected)} "
            f"for blocks of {block[0]} x {block[1]} (config.json, quantization_config.weight_block_size)"
        )
