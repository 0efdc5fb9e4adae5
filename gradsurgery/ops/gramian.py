"""Gramian of a Jacobian: G = J Jᵀ."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.ops._backend import _C, backend_of, call, register, runs_cuda, runs_triton
from gradsurgery.ops._inputs import (
    Rows,
    as_blocks,
    check_finite,
    check_per,
    flat,
    seems_finite,
    shown,
)

CHUNK = 1 << 20  # columns the reference converts to float64 at a time
TILES = (16, 32, 64)  # rows of Triton's: one more would take a tile of twice as many
FEW_ROWS = 17  # of 16 bits: up to these CUDA C++ reads once, on tensor cores, one more included


def gramian(
    rows: Rows, *, per: Literal["model", "tensor"] = "model", precise: bool = False
) -> Tensor:
    """Inner products of the rows of a Jacobian.

    G = J Jᵀ

    Args:
        rows: J, [m, n] or a sequence of [m, *p.shape] taken as one Jacobian.
        per: "model" sums over all columns; "tensor" keeps one Gramian per tensor.
        precise: float64 arithmetic throughout. By default 32- and 16-bit rows are multiplied in
            float32 within slices of some thousand columns and summed in float64 across them:
            some 1e-8 of the norms, 1e-6 at worst (equal values).

    Returns:
        [m, m], or [len(rows), m, m] per tensor; float64.

    Raises:
        InputError: rows that are not one Jacobian.
        NonFiniteError: a row with NaN or infinity; the message names row and tensor. A GPU waits
            for this check.

    Products are float64 numbers: those of float64 rows of norms under 1e-154 lose digits, and under
    1e-162 they are zero. Scale such rows up. Of other dtypes, all rows are in range.
    """
    check_per(per)
    if not isinstance(precise, bool):
        raise InputError(f"precise must be True or False, got {shown(precise)}")
    return call("gramian", as_blocks(rows), per == "tensor", precise)


def gramian_reference(
    rows: Sequence[Tensor], per_tensor: bool = False, precise: bool = True
) -> Tensor:
    grams = []
    for block in flat(rows):
        gram = block.new_zeros(block.shape[0], block.shape[0], dtype=torch.float64)
        for chunk in block.split(CHUNK, dim=1):
            chunk = chunk.double()
            gram += chunk @ chunk.mT
        grams.append(gram)
    out = torch.stack(grams)
    out = out if per_tensor else out.sum(0)
    check_finite(out.diagonal(dim1=-2, dim2=-1), rows, "rows")
    return out


def gramian_native(
    rows: Sequence[Tensor], per_tensor: bool = False, precise: bool = False
) -> Tensor:
    blocks = flat(rows)
    if per_tensor:
        out = torch.stack([gramian_of([[block]], precise) for block in blocks])
    else:
        out = gramian_of([blocks], precise)
    if not (out.is_cpu and seems_finite(out)):
        check_finite(out.diagonal(dim1=-2, dim2=-1), rows, "rows")
    return out


def gramian_unchecked(blocks: Sequence[Tensor], precise: bool = False) -> Tensor:
    """[m, m] over blocks [m, n_k], where the caller looks for what is not finite."""
    return gramian_of_parts([blocks], precise)


def gramian_of_parts(
    parts: Sequence[Sequence[Tensor]], precise: bool = False, repeat: bool = True
) -> Tensor:
    """The same over the rows of all parts, one below the other; a part is blocks [m_s, n_k].

    `repeat`: as for `gramian_of`.
    """
    if backend_of("gramian", parts[0][0].device.type) != "torch":
        return gramian_of(parts, precise, repeat)
    wide = [torch.cat(blocks).double() for blocks in zip(*parts, strict=True)]
    return torch.stack([block @ block.mT for block in wide]).sum(0)


def gramian_of(sources: Sequence[Sequence[Tensor]], precise: bool, repeat: bool = True) -> Tensor:
    """[m, m] over the rows of all sources; a source is the blocks [m_s, n_k] of some rows.

    By the kernels for their device: C++, CUDA C++ or Triton, which multiplies many rows of 16 bits
    on tensor cores.

    Args:
        repeat: a GPU makes products that left float32's range again, in float64. Otherwise the
            caller looks at the squared norms: launches for what is hardly ever there are saved.
    """
    m, first = sum(source[0].shape[0] for source in sources), sources[0][0]
    out = first.new_empty(m, m, dtype=torch.float64)
    if runs_triton(first, among=m > FEW_ROWS and first.itemsize == 2):
        from gradsurgery.kernels.gramian import gramian

        one_more = sources[-1][0].shape[0] == 1 and m - 1 in TILES
        if not one_more or runs_triton(first):
            return gramian(sources, precise, repeat)
        out[:-1, :-1] = gramian(sources[:-1], precise, repeat)
        _C.gramian_border_cuda(sources, out, out.new_empty(_C.gramian_scratch(m)))
        return out
    if runs_cuda(out):
        scratch = out.new_empty(_C.gramian_scratch(m))
        _C.gramian_cuda(sources, out, scratch, precise, repeat)
    else:
        _C.gramian_cpu(sources, out, precise, torch.get_num_threads())
    return out


def _fake(rows: Sequence[Tensor], per_tensor: bool = False, precise: bool = False) -> Tensor:
    m = rows[0].shape[0]
    shape = (len(rows), m, m) if per_tensor else (m, m)
    return rows[0].new_empty(shape, dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    rows, ctx.per_tensor, _ = inputs
    ctx.save_for_backward(*rows)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    # dJ = (dG + dGᵀ) J
    grad = grad + grad.mT
    grads = grad if ctx.per_tensor else [grad] * len(ctx.saved_tensors)
    rows = [
        (g.to(row.dtype) @ row.flatten(1)).view(row.shape)
        if row.dim() > 1
        else g.to(row.dtype) @ row
        for g, row in zip(grads, ctx.saved_tensors, strict=True)
    ]
    return rows, None, None


IMPLEMENTATIONS = {
    ("torch", "any"): gramian_reference,
    ("native", "cpu"): gramian_native,
    ("native", "cuda"): gramian_native,
    ("triton", "cuda"): gramian_native,
}

register(
    "gramian",
    "(Tensor[] rows, bool per_tensor, bool precise) -> Tensor",
    IMPLEMENTATIONS,
    device_of=lambda rows, *_: rows[0].device,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
