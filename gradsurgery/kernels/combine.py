"""Weighted sums of rows that exist, U = W J, in float64: every column is read once."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.kernels.gramian import gramian
from gradsurgery.kernels.tiles import cdiv, narrow, on, options

OUTS = 4  # rows of W in one pass
COLUMNS = 512  # of a program


@triton.jit
def combine_kernel(
    sources,  # tensors [m_s, n], one below the other
    strides,  # (row, column) of each
    counts,  # m_s
    columns,  # n
    weights,  # [p, m] float64
    m,
    outs,  # tensors [n]
    out_strides,
    OUTS: tl.constexpr,  # a power of two, at least len(outs)
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    out = tl.arange(0, OUTS)
    total = tl.zeros((OUTS, COLUMNS), tl.float64)
    weight_of = weights + out * m
    for s in tl.static_range(len(sources)):
        row = sources[s] + column * strides[s][1]
        for _ in range(counts[s]):
            value = tl.load(row, mask=inside, other=0).to(tl.float64)
            weight = tl.load(weight_of, mask=out < len(outs), other=0)
            total += weight[:, None] * value[None, :]
            row += strides[s][0]
            weight_of += 1
    for r in tl.static_range(len(outs)):
        value = tl.sum(tl.where((out == r)[:, None], total, 0), axis=0)
        to = outs[r] + column * out_strides[r]
        tl.store(to, narrow(value, outs[r].dtype.element_ty), mask=inside)


def combine_into(
    sources: Sequence[Sequence[Tensor]],
    weights: Tensor,
    outs: Sequence[Sequence[Tensor]],
    cross: Tensor | None = None,
    gram: Tensor | None = None,
) -> None:
    """As `gradsurgery.ops.combine.combine_into`, and like it on a GPU: in float64, not checked."""
    weights, m = weights.contiguous(), weights.shape[1]
    _check_overlap(sources, outs)
    for k, blocks in enumerate(zip(*sources, strict=True)):
        columns = blocks[0].shape[1]
        every = [row for out in outs for row in out[k].unbind()]
        if columns == 0:
            continue
        for start in range(0, len(every), OUTS):
            some = tuple(every[start : start + OUTS])
            with on(weights):
                combine_kernel[(cdiv(columns, COLUMNS),)](
                    blocks,
                    tuple(block.stride() for block in blocks),
                    tuple(block.shape[0] for block in blocks),
                    columns,
                    weights[start:],
                    m,
                    some,
                    tuple(out.stride(0) for out in some),
                    triton.next_power_of_2(len(some)),
                    COLUMNS,
                    **options(4, 3),
                )
    if cross is not None or gram is not None:
        products = gramian([*sources, *outs])
        if cross is not None:
            cross.copy_(products[m:, :m])
        if gram is not None:
            gram.copy_(products[m:, m:])


def _check_overlap(sources: Sequence[Sequence[Tensor]], outs: Sequence[Sequence[Tensor]]) -> None:
    # a later pass would read what an earlier one wrote
    count = sum(out[0].shape[0] for out in outs)
    owned = {block.untyped_storage().data_ptr() for source in sources for block in source}
    if count > OUTS and any(b.untyped_storage().data_ptr() in owned for out in outs for b in out):
        raise InputError(f"outs that are rows must be four at most, got {count}")
