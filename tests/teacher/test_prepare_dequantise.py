"""FP8 blocks become numbers as transformers makes them, bit for bit; ragged blocks, which it cannot, as the definition says."""

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from teacher.checkpoint.dequantise import dequantise_rows

BLOCK = (128, 128)


def quantised(*shape: int) -> tuple[Tensor, Tensor]:
    """Random FP8 values and float32 scales that are no powers of two."""
    torch.manual_seed(0)
    grid = (*shape[:-2], -(-shape[-2] // BLOCK[0]), -(-shape[-1] // BLOCK[1]))
    return torch.randn(shape).mul_(100).to(torch.float8_e4m3fn), torch.rand(grid).mul_(3e-3).add_(1e-4)


def dequantise(quantised: Tensor, scale: Tensor, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
    rows_RC = quantised.view(-1, quantised.shape[-1])[first:last]
    return dequantise_rows(rows_RC, scale.reshape(-1, scale.shape[-1]), first, quantised.shape[-2], BLOCK, dtype)


@pytest.mark.parametrize("shape", [(256, 384), (3, 256, 128), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_equals_transformers_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values, scale = quantised(*shape)
    expected = Fp8Dequantize(None)._dequantize_one(values, scale, dtype)
    assert torch.equal(dequantise(values, scale, dtype).view(shape), expected)


def test_any_run_of_rows_of_a_stack_gives_the_same_numbers() -> None:
    values, scale = quantised(3, 256, 128)
    whole = dequantise(values, scale, torch.bfloat16)
    for first, last in ((0, 5), (100, 300), (255, 257), (700, 768)):
        assert torch.equal(dequantise(values, scale, torch.bfloat16, first, last), whole[first:last])


@pytest.mark.parametrize("shape", [(192, 200), (2, 320, 130)])
def test_the_last_block_may_be_smaller(shape: tuple[int, ...]) -> None:
    values, scale = quantised(*shape)
    got = dequantise(values, scale, torch.float32).view(shape)
    matrices, grids = values.view(-1, *shape[-2:]), scale.view(-1, *scale.shape[-2:])
    for matrix, grid, found in zip(matrices, grids, got.view(-1, *shape[-2:]), strict=True):
        for row in range(0, shape[-2], 37):
            for column in range(0, shape[-1], 23):
                assert found[row, column] == matrix[row, column].float() * grid[row // 128, column // 128]


def test_transformers_would_take_the_wrong_block_for_192_rows() -> None:
    """Its block is rows over grid rows, 96 here. When this fails it reads the block from the configuration: say so above."""
    values, scale = quantised(192, 128)
    theirs = Fp8Dequantize(None)._dequantize_one(values, scale, torch.float32)
    assert not torch.equal(theirs, dequantise(values, scale, torch.float32))
