"""Large products in tiles: never more than a stated number of bytes of them at once.

The functions that loop over tiles give the numbers that one call would give, up to the order of sums inside a GEMM.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_BYTES = 1 << 28
"""Most bytes of one intermediate tensor on a GPU, 256 MiB. An attention layer holds at most four of them at a time: 1 GiB."""
CPU_TILE_BYTES = 1 << 24
"""The same on a CPU. malloc maps blocks above 32 MiB afresh and the kernel zeroes their pages: gathering 36 MiB takes 2.5 ms a
query, 18 MiB 0.3 ms."""


def tile_bytes(device: torch.device) -> int:
    return CPU_TILE_BYTES if device.type == "cpu" else TILE_BYTES


def spans(total: int, bytes_each: int, limit: int, most: int | None = None) -> Iterator[slice]:
    """Slices that cover range(total) in order, each of as many items as `limit` bytes hold (at least one, at most `most`)."""
    length = max(1, min(limit // max(1, bytes_each), most or total))
    for start in range(0, total, length):
        yield slice(start, min(total, start + length))


def float32_bmm(left_BMK: Tensor, right_BKN: Tensor) -> Tensor:
    """[B, M, N] float32, also of half-precision factors: their products are exact, and the sums are float32.

    CUDA does that in one GEMM (not run here: no GPU). The CPU has no such kernel, so its factors are converted: pass tiles,
    not a history.
    """
    if left_BMK.dtype == torch.float32:
        return torch.bmm(left_BMK, right_BKN)
    if left_BMK.is_cuda:
        return torch.bmm(left_BMK, right_BKN, out_dtype=torch.float32)
    return torch.bmm(left_BMK.float(), right_BKN.float())
