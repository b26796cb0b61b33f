"""Weights on a grid: the nearest point, and GPTQ, which lets later columns make up for what earlier ones were rounded by.

O rows (outputs of a linear layer)    I columns (its inputs)    G groups of columns that share a scale, of each row
"""

from typing import NamedTuple

import torch

DAMPING = 0.01
"""Of the mean of the Hessian's diagonal, added to all of it. What GPTQ's authors use."""
BLOCK = 128
"""Columns that are compensated one by one before the rest of the row is, in one product."""


class Grid(NamedTuple):
    """The values that a quotient weight / scale may take: whole numbers, or float8_e4m3's. largest: what a group's largest weight
    is divided by to get its scale; half a step beyond an integer grid's upper end, as every compressed-tensors checkpoint has
    it (0.111 against 0.118 of relative error with 7, on normal weights in groups of 128)."""

    low: float
    high: float
    largest: float
    is_float8: bool = False

    def nearest(self, quotient: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype. Ties go to the even neighbour."""
        inside = quotient.clamp(self.low, self.high)
        return inside.to(torch.float8_e4m3fn).to(inside.dtype) if self.is_float8 else inside.round()


INT4 = Grid(-8.0, 7.0, 7.5)
INT8 = Grid(-128.0, 127.0, 127.5)
FP8 = Grid(-448.0, 448.0, 448.0, is_float8=True)


def scales_of(weight_OI: torch.Tensor, group: int, grid: Grid) -> torch.Tensor:
    """bfloat16 [O, G], never 0. group: columns of one scale; divides I.

    Rounded to bf16 before anything is divided by it: the scale that was used is the scale that is stored. A group of zeros, or
    of values whose scale bf16 cannot hold, has scale 1 and comes out as zeros.
    """
    largest_OG = weight_OI.unflatten(1, (-1, group)).abs().amax(dim=2)
    scale_OG = (largest_OG / grid.largest).to(torch.bfloat16)
    return torch.where(scale_OG == 0.0, torch.ones_like(scale_OG), scale_OG)


def round_to_nearest(weight_OI: torch.Tensor, scale_OG: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[O, I] in the weight's dtype: every weight at the nearest point of its group's grid."""
    scale_OI = _per_column(scale_OG, weight_OI)
    return grid.nearest(weight_OI / scale_OI) * scale_OI


def compensate(weight_OI: torch.Tensor, hessian_II: torch.Tensor, scale_OG: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[O, I] in the weight's dtype: points of the grid for which |X (W - Q)^T|^2 is small, hessian_II being X^T X.

    Columns are taken by falling diagonal of the Hessian, so that what matters most is rounded while most others can still
    make up for it; scales are those of the weights as they were, so no column's group moves and nothing but the values is
    stored (what is called `actorder: weight`). A column that no input ever reaches has only the damping on its diagonal: it is
    rounded to nearest, and nothing is done for its sake.

    In float64, with which the factor of a damped matrix always exists. Memory: 3 matrices of I x I x 8 bytes, 2.9 GB at
    11,008 columns (the down projection of a 7B student) and 4.6 GB at 13,824 (13B).
    Source: Frantar et al., GPTQ, ICLR 2023, algorithm 1.
    """
    mean = float(hessian_II.diagonal().double().mean())
    if mean == 0.0:
        return round_to_nearest(weight_OI, scale_OG, grid)
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
    factor_II = _inverse_factor(hessian_II, order_I, DAMPING * mean).to(weight_OI.dtype)
    left_IO = weight_OI.T[order_I]  # rows are the weight's columns, each in one piece
    scale_IO = _per_column(scale_OG, weight_OI).T[order_I]
    for start in range(0, len(left_IO), BLOCK):
        end = min(start + BLOCK, len(left_IO))
        errors_BO = torch.empty_like(left_IO[start:end])
        for at in range(start, end):
            rounded_O = grid.nearest(left_IO[at] / scale_IO[at]) * scale_IO[at]
            error_O = (left_IO[at] - rounded_O) / factor_II[at, at]
            left_IO[at] = rounded_O
            left_IO[at + 1 : end].addr_(factor_II[at, at + 1 : end], error_O, alpha=-1)
            errors_BO[at - start] = error_O
        left_IO[end:].addmm_(factor_II[start:end, end:].T, errors_BO, alpha=-1)
    found_IO = torch.empty_like(left_IO)
    found_IO[order_I] = left_IO
    return found_IO.T.contiguous()


def output_error(weight_OI: torch.Tensor, rounded_OI: torch.Tensor, hessian_II: torch.Tensor) -> float:
    """|X (W - Q)^T|^2: the squared error of the layer's outputs over all the inputs that the Hessian was made of."""
    difference_OI = (weight_OI - rounded_OI).to(hessian_II.dtype)
    return float(((difference_OI @ hessian_II) * difference_OI).sum(dtype=torch.float64))


def _inverse_factor(hessian_II: torch.Tensor, order_I: torch.Tensor, damping: float) -> torch.Tensor:
    """float64 [I, I]: U, upper triangular, with U^T U = (H + damping)^-1, columns in the given order. Taken from the end, H's own
    Cholesky factor is U^-1, so that the inverse need not be made and factored again."""
    backwards_I = order_I.flip(0)
    damped_II = hessian_II[backwards_I][:, backwards_I].double()
    damped_II.diagonal().add_(damping)
    lower_II = torch.linalg.cholesky(damped_II)
    del damped_II
    unit_II = torch.eye(len(lower_II), dtype=lower_II.dtype)
    return torch.linalg.solve_triangular(lower_II, unit_II, upper=False).flip(0, 1)


def _per_column(scale_OG: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """[O, I] in the weight's dtype."""
    return scale_OG.to(weight_OI.dtype).repeat_interleave(weight_OI.shape[1] // scale_OG.shape[1], dim=1)
