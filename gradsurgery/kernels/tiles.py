"""What the kernels share: sizes of tiles, precision, and the products of two tall tiles."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# of values, for addresses in a table
KINDS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Tile(NamedTuple):
    """How large a share of a product one program takes."""

    rows: int
    columns: int
    depth: int  # of the sum, per step
    warps: int
    stages: int  # steps whose loads are on their way


def large(dtype: torch.dtype) -> Tile:
    """For a product that fills a GPU: 64 KiB of float32 sums in registers, 96 KiB of operands."""
    if dtype == torch.float64:
        return Tile(64, 64, 16, 4, 3)
    if dtype == torch.float32:  # thrice the matrix instructions, and each operand split in two
        return Tile(128, 64, 16, 8, 4)
    return Tile(128, 128, 64, 8, 3)


def small(dtype: torch.dtype) -> Tile:
    """For few rows: more programs, less of each in vain."""
    return Tile(64, 64, 32 if dtype.itemsize == 2 else 16, 4, 4)


def options(warps: int, stages: int) -> dict[str, int | bool]:
    """Of a launch; a product and a sum may be one rounding, whatever a version's default."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply: float32 by three products of tf32, unless torch may use one."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def on(tensor: Tensor) -> torch.cuda.device_of:
    """Launches go to the device of a tensor, whatever the current one is."""
    return torch.cuda.device_of(tensor)


def cdiv(count: int, size: int) -> int:
    return -(-count // size)


# the interpreter multiplies the bits of bfloat16 values as if they were integers, and rounds to it
# by truncation
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def one_of(tensors, k, KIND: tl.constexpr):
    """The k-th of some tensors, by the table of their addresses."""
    address = tl.load(tensors + k).to(tl.pointer_type(KIND))
    return tl.multiple_of(address, 16)


@triton.jit
def multiply(left, right, total, PRECISION: tl.constexpr):
    """total + left right"""
    tl.static_assert(left.dtype == right.dtype)
    if INTERPRETED and left.dtype == tl.bfloat16:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 or float64 rounded to a dtype, to nearest."""
    if dtype == tl.bfloat16 or dtype == tl.float16:
        value = value.to(tl.float32)
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def products(
    x,  # [M, 1] pointers to the first value of each row; rows have stride 1
    y,  # [1, N]
    x_inside,  # [M, 1]
    y_inside,  # [1, N]
    width,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inner products of rows with rows, [M, N], in float32, of float64 in float64."""
    sums = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((x.shape[0], y.shape[1]), sums)
    for k in range(0, width, DEPTH):
        at = k + tl.arange(0, DEPTH)
        left = tl.load(x + at[None, :], mask=x_inside & (at[None, :] < width), other=0)
        right = tl.load(y + at[:, None], mask=y_inside & (at[:, None] < width), other=0)
        total = multiply(left, right, total, PRECISION)
    return total


@triton.jit
def largest_of(tile):
    """The largest finite size in each row, [M, N] -> [M]."""
    size = tl.abs(tile.to(tl.float32))
    return tl.max(tl.where(size < float("inf"), size, 0.0), axis=1)


@triton.jit
def power_of_two(size):
    """One near a size, to divide by without rounding; 1 of zero."""
    exponent = tl.floor(tl.log2(tl.where(size > 0, size, 1.0)))
    return tl.exp2(tl.minimum(tl.maximum(exponent, -126.0), 126.0))
