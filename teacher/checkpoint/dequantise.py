"""FP8 weights with a scale for each block become ordinary numbers, bit for bit as transformers makes them."""

import torch
from torch import Tensor


def dequantise_rows(
    quantised_RC: Tensor, scale_IJ: Tensor, first_row: int, height: int, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Rows of a stack of FP8 matrices times the scales of their blocks: [R, C] in `dtype`.

    quantised_RC: rows first_row, first_row + 1, ... of the stack. scale_IJ: float32, the matrices' grids one over the other.
    height: rows of one matrix. block: rows and columns that share a scale; the last block of a matrix may be smaller, as in
    a `kv_a_proj_with_mqa` of 576 rows. transformers 5.23 takes the block from the two shapes instead: it refuses 576 rows
    on a grid of 5, and on one of 2 for 192 rows would silently use blocks of 96.

    The product is taken in float32 and rounded once.
    """
    num_rows, num_columns = quantised_RC.shape
    grids_per_matrix = -(-height // block[0])
    row_R = torch.arange(first_row, first_row + num_rows)
    grid_R = row_R // height * grids_per_matrix + row_R % height // block[0]
    scale_RC = scale_IJ[grid_R].repeat_interleave(block[1], dim=1)[:, :num_columns]
    return quantised_RC.float().mul_(scale_RC).to(dtype)
