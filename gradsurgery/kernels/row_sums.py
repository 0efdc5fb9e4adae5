"""Rows of what is broadcast, as biases and the weights of norms: Σ_t value (factor - mean) rstd.

A program sums the tokens of one block for some columns, and nobody waits for another: the order of
a sum is fixed. Several parameters take one launch, by a table of where their values are.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.tiles import KINDS, cdiv, narrow, on, one_of, options

TILE = 4096  # bytes of sums of a program: with 64-bit addresses of four tensors, half its registers
LINE = 64  # columns of it, where neighbors in memory are
FEW = 8  # where tokens are


@triton.jit
def row_sums_kernel(
    table,  # [4, planes] addresses of values, factors, means, rstds
    planes,
    out,  # [planes, n, width]
    strides,  # of each of the four: (block, token, column)
    tokens,
    width,
    each,  # columns in a row that share a mean and a rstd
    VALUES: tl.constexpr,  # dtypes; None of what there is not
    FACTORS: tl.constexpr,
    MEANS: tl.constexpr,
    RSTDS: tl.constexpr,
    SUMS: tl.constexpr,  # of the sums
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(width, COLUMNS)
    block, plane = (tl.program_id(0) // across).to(tl.int64), tl.program_id(1)
    column = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    shared = column // each
    values = one_of(table, plane, VALUES) + block * strides[0][0] + column * strides[0][2]
    if FACTORS is not None:
        factors = one_of(table + planes, plane, FACTORS)
        factors += block * strides[1][0] + column * strides[1][2]
    if MEANS is not None:
        means = one_of(table + 2 * planes, plane, MEANS)
        means += block * strides[2][0] + shared * strides[2][2]
    if RSTDS is not None:
        rstds = one_of(table + 3 * planes, plane, RSTDS)
        rstds += block * strides[3][0] + shared * strides[3][2]
    total = tl.zeros((TOKENS, COLUMNS), SUMS)
    for k in range(0, tokens, TOKENS):
        token = k + tl.arange(0, TOKENS)[:, None].to(tl.int64)
        inside = (token < tokens) & (column < width)
        value = tl.load(values + token * strides[0][1], mask=inside, other=0).to(SUMS)
        if FACTORS is not None:
            factor = tl.load(factors + token * strides[1][1], mask=inside, other=0).to(SUMS)
            if MEANS is not None:
                factor -= tl.load(means + token * strides[2][1], mask=inside, other=0).to(SUMS)
            if RSTDS is not None:
                factor *= tl.load(rstds + token * strides[3][1], mask=inside, other=0).to(SUMS)
            value *= factor
        total += value
    to = out + (plane.to(tl.int64) * (tl.num_programs(0) // across) + block) * width + column
    sums = tl.sum(total, axis=0)[None, :]
    tl.store(to, narrow(sums, out.dtype.element_ty), mask=column < width)


def row_sums(
    tensors: Sequence[Tensor | None], each: int, dtype: torch.dtype, table: Tensor
) -> Tensor:
    """The sums of several parameters, [planes, n, C], in one launch.

    Args:
        tensors: values, factors, means, rstds of one, as `ops.row_sums.Summand` has them.
        each: columns in a row that share a mean and a rstd.
        dtype: of the result.
        table: [4, planes] int64, where those of each parameter are, laid out as these; multiples of
            16.
    """
    values = tensors[0]
    assert values is not None
    (n, tokens, width), planes = values.shape, table.shape[1]
    out = values.new_empty(planes, n, width, dtype=dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    # a warp reads in one piece whichever are neighbors in memory
    most = FEW if values.stride(1) == 1 != values.stride(2) else LINE
    columns = min(most, triton.next_power_of_2(width))
    rows = min(TILE // sums.itemsize // columns, triton.next_power_of_2(tokens))
    strides = tuple((0, 0, 0) if each is None else each.stride() for each in tensors)
    with on(values):
        row_sums_kernel[(n * cdiv(width, columns), planes)](
            table,
            planes,
            out,
            strides,
            tokens,
            width,
            each,
            *(None if tensor is None else KINDS[tensor.dtype] for tensor in tensors),
            KINDS[sums],
            rows,
            columns,
            **options(4, 1),
        )
    return out
