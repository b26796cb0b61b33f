"""The files of prepared shards: written a piece at a time, read and verified into the memory where they stay.

Each is a safetensors file whose data starts on a 64-byte boundary, widest dtype first, so that a rank reads it with one call
into one buffer and its tensors are views of that buffer: no copy, no second pass. Its metadata say for which ranks of which
layout it is.
"""

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from configs.errors import UnusableInput
from data.store import fsync_folder
from teacher.checkpoint.files import bytes_of, read_exactly
from teacher.checkpoint.manifest import FileSum, Manifest
from teacher.checkpoint.partition import Layout

ALIGNMENT = 64
READ_BYTES = 4 << 20
"""Read, then hashed while still in the processor's cache."""

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
METADATA = "__metadata__"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stored(NamedTuple):
    """One tensor of a shard file: flat where ZeRO cuts it, in its own shape where not."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Shard(NamedTuple):
    """A verified file. label: as `label_of` made it."""

    label: dict[str, str]
    tensors: dict[str, Tensor]


def label_of(layout: Layout, ranks: Iterable[int]) -> dict[str, str]:
    """What a shard file says of itself; safetensors' metadata are text."""
    return {"layout": str(layout), "ranks": " ".join(map(str, ranks))}


def header_of(tensors: Iterable[Stored], label: Mapping[str, str]) -> bytes:
    """The safetensors header, padded with spaces so that the data is aligned."""
    header: dict[str, object] = {METADATA: dict(label)}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """A shard file in the making, under a temporary name that only `commit` makes final. Left without it, it is gone."""

    def __init__(self, path: Path, tensors: Sequence[Stored], label: Mapping[str, str]) -> None:
        header = header_of(tensors, label)
        self.path = path
        self.expected = len(header) + sum(tensor.num_bytes for tensor in tensors)
        self.temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
        self.digest, self.num_bytes = hashlib.sha256(), 0
        self.file = self.temporary.open("wb", buffering=0)
        self._write(memoryview(header))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def append(self, values: Tensor) -> None:
        """The next numbers of the file, in the order of its header."""
        self._write(bytes_of(values.contiguous().view(-1).view(torch.uint8)))

    def commit(self) -> FileSum:
        """The file is whole and durable under its final name."""
        assert self.num_bytes == self.expected, f"{self.path.name}: {self.num_bytes} bytes written, planned {self.expected}"
        os.fsync(self.file.fileno())
        self.temporary.replace(self.path)
        fsync_folder(self.path.parent)
        return FileSum(self.num_bytes, self.digest.hexdigest())

    def _write(self, content: memoryview) -> None:
        self.digest.update(content)
        self.num_bytes += len(content)
        while content:
            try:
                content = content[self.file.write(content) :]
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                raise UnusableInput(
                    f"{self.path.parent}: {error.strerror} after {self.num_bytes - len(content)} of {self.expected} bytes of "
                    f"{self.path.name}; make room and give the same command: finished files are kept"
                ) from error


def read_shard(path: Path, expected: FileSum, device: torch.device) -> Shard:
    """The tensors of one file on `device`, verified before any of them is handed out.

    Raises:
        UnusableInput: the file is missing, or its bytes are not those that were prepared.
    """
    remedy = "copy it again, or delete it and run: tracestill prepare CONFIG"
    if not path.is_file() or path.stat().st_size != expected.num_bytes:
        found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
        raise UnusableInput(f"{path}: {found}, expected {expected.num_bytes} bytes by the manifest; {remedy}")
    buffer_N = torch.empty(expected.num_bytes, dtype=torch.uint8)
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for first in range(0, expected.num_bytes, READ_BYTES):
            piece = buffer_N[first : first + READ_BYTES]
            read_exactly(file.fileno(), piece, first)
            digest.update(bytes_of(piece))
    if digest.hexdigest() != expected.sha256:
        raise UnusableInput(
            f"{path}: sha256 {digest.hexdigest()[:12]}, expected {expected.sha256[:12]} by the manifest; {remedy}"
        )
    return _views(buffer_N, device)


def _views(buffer_N: Tensor, device: torch.device) -> Shard:
    length = int.from_bytes(buffer_N[:8].numpy().tobytes(), "little")
    header = json.loads(buffer_N[8 : 8 + length].numpy().tobytes())
    label = header.pop(METADATA, {})
    data = buffer_N[8 + length :].to(device)
    found = {}
    for name, said in header.items():
        first, last = said["data_offsets"]
        found[name] = data[first:last].view(DTYPES[said["dtype"]]).view(said["shape"])
    return Shard(label, found)


def read_rank(folder: Path, manifest: Manifest, rank: int, device: torch.device, num_threads: int = 1) -> dict[str, Tensor]:
    """Everything that `rank` holds, by the engine's names. Only this rank's files are opened. num_threads: files read and
    hashed at once (a core hashes 1 to 2 GB/s).

    Raises:
        UnusableInput: as `read_shard`, or a file that says it is for other ranks or another layout.
    """
    found: dict[str, Tensor] = {}
    sums: Mapping[str, FileSum] = manifest.files
    with ThreadPoolExecutor(num_threads) as pool:
        shards = pool.map(lambda name: read_shard(folder / name, sums[name], device), manifest.ranks[rank])
        for name, shard in zip(manifest.ranks[rank], shards, strict=True):
            _check_label(folder / name, shard.label, manifest.layout, rank)
            found |= shard.tensors
    return found


def _check_label(path: Path, label: Mapping[str, str], layout: Layout, rank: int) -> None:
    if label.get("layout") != str(layout) or str(rank) not in label.get("ranks", "").split():
        raise UnusableInput(
            f"{path}: made for ranks {label.get('ranks')} of {label.get('layout')}, expected rank {rank} of {layout}; "
            "run tracestill prepare CONFIG again"
        )
