"""Weighted sum of the rows of a Jacobian: update = wᵀ J."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.ops._backend import _C, backend_of, call, register, runs_cuda, runs_triton
from gradsurgery.ops._inputs import (
    Rows,
    as_blocks,
    check_dense,
    check_weights_finite,
    flat,
    raise_not_finite,
)

CHUNK = 1 << 20  # columns the reference converts to float64 at a time


def combine(rows: Rows, weights: Tensor) -> Tensor | list[Tensor]:
    """Weighted sum of the rows of a Jacobian, accumulated in float64.

    update = wᵀ J

    Args:
        rows: J, [m, n] or a sequence of L blocks [m, *p.shape].
        weights: w, [m], or [L, m] for one set of weights per block.

    Returns:
        [n], or a list of L tensors [*p.shape]; dtype of the rows.

    Raises:
        InputError: shapes, dtypes or devices that do not fit; weights that are not finite.
        NonFiniteError: a row with NaN or infinity; the message names row and tensor (CPU; on a
            GPU it propagates, for want of a host sync).
    """
    blocks = as_blocks(rows)
    m, device = blocks[0].shape[0], blocks[0].device
    check_dense(weights, "weights")
    if weights.shape not in ((m,), (len(blocks), m)):
        raise InputError(
            f"weights must be [{m}] or [{len(blocks)}, {m}] to match rows, "
            f"got {list(weights.shape)}"
        )
    if not weights.dtype.is_floating_point:
        raise InputError(f"weights must be floating point, got {weights.dtype}")
    if weights.device != device:
        raise InputError(f"weights is on {weights.device}, rows is on {device}")
    update = call("combine", blocks, weights.double())
    return update[0] if isinstance(rows, Tensor) else update


def combine_reference(rows: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    weights = weights.expand(len(rows), -1)
    update = []
    for block, w in zip(flat(rows), weights, strict=True):
        chunks = [w @ chunk.double() for chunk in block.split(CHUNK, dim=1)]
        update.append((torch.cat(chunks) if chunks else block.new_zeros(0)).to(block.dtype))
    finite = all(bool(u.isfinite().all()) for u in update)
    return _checked(
        [u.view(b.shape[1:]) for u, b in zip(update, rows, strict=True)], finite, rows, weights
    )


def combine_native(rows: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    update = [block.new_empty(size=block.shape[1:]) for block in rows]
    blocks, outs = flat(rows), [u.view(1, -1) for u in update]
    if weights.dim() == 1:
        finite = combine_into([blocks], weights[None], [outs])
    else:
        finite = True
        for block, w, out in zip(blocks, weights, outs, strict=True):
            finite &= combine_into([[block]], w[None], [[out]])
    return _checked(update, finite, rows, weights)


def combine_unchecked(parts: Sequence[Sequence[Tensor]], weights: Tensor) -> list[Tensor]:
    """wᵀ J over the rows of all parts, one below the other; a part is L blocks [m_s, n_k].

    Weights [1, m] for all blocks, or [L, m]. What is not finite propagates.
    """
    weights, first = weights.double(), parts[0]
    if backend_of("combine", first[0].device.type) == "torch":
        rows = [torch.cat(blocks).double() for blocks in zip(*parts, strict=True)]
        every = weights.expand(len(rows), -1)
        sums = [w @ r for w, r in zip(every, rows, strict=True)]
        return [s.to(block.dtype) for s, block in zip(sums, first, strict=True)]
    sums = [block.new_empty(1, block.shape[1]) for block in first]
    if len(weights) == 1:
        combine_into(parts, weights, [sums])
    else:
        for k, (w, out) in enumerate(zip(weights, sums, strict=True)):
            combine_into([[part[k]] for part in parts], w[None], [[out]])
    return sums


def combine_into(
    sources: Sequence[Sequence[Tensor]],
    weights: Tensor,
    outs: Sequence[Sequence[Tensor]],
    cross: Tensor | None = None,
    gram: Tensor | None = None,
    precise: bool = True,
) -> bool:
    """outs = weights [p, m] times the m rows of all sources; False if a value is not finite.

    On request the same pass yields the products of the outs with the rows, `cross` [p, m], and
    with one another, `gram` [p, p]; float64. Outs may be the rows themselves. `precise` sums 32-
    and 16-bit rows in float64, otherwise in float32. A GPU always sums in float64, and answers
    True, for want of a host sync: what is not finite propagates.
    """
    weights = weights.contiguous()
    if runs_triton(weights):
        from gradsurgery.kernels import combine as kernels

        kernels.combine_into(sources, weights, outs, cross, gram)
        return True
    if runs_cuda(weights):
        products = cross is not None or gram is not None
        scratch = weights.new_empty(_C.gramian_scratch(sum(weights.shape))) if products else None
        _C.combine_cuda(sources, weights, outs, cross, gram, scratch)
        return True
    return _C.combine_cpu(sources, weights, outs, cross, gram, precise, torch.get_num_threads())


def _checked(
    update: list[Tensor], finite: bool, rows: Sequence[Tensor], weights: Tensor
) -> list[Tensor]:
    on_cpu = not weights.is_cuda  # values of empty blocks show nothing of their weights
    if not finite or (on_cpu and any(block.numel() == 0 for block in rows)):
        check_weights_finite(weights)
    if not finite:
        raise_not_finite(rows, "rows", f"the update overflows {rows[0].dtype}")
    return update


def _fake(rows: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    return [row.new_empty(row.shape[1:]) for row in rows]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    rows, weights = inputs
    ctx.save_for_backward(weights, *rows)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple:
    weights, *rows = ctx.saved_tensors
    per_block = weights.expand(len(rows), -1)
    # dJ = w duᵀ, dw = J du
    d_rows = [
        w.to(g.dtype).view(-1, *[1] * g.dim()) * g for w, g in zip(per_block, grads, strict=True)
    ]
    d_weights = torch.stack(
        [
            (row.flatten(1) if row.dim() > 1 else row[:, None]) @ g.flatten()
            for row, g in zip(rows, grads, strict=True)
        ]
    ).double()
    return d_rows, d_weights if weights.dim() == 2 else d_weights.sum(0)


IMPLEMENTATIONS = {
    ("torch", "any"): combine_reference,
    ("native", "cpu"): combine_native,
    ("native", "cuda"): combine_native,
    ("triton", "cuda"): combine_native,
}

register(
    "combine",
    "(Tensor[] rows, Tensor weights) -> Tensor[]",
    IMPLEMENTATIONS,
    device_of=lambda rows, _: rows[0].device,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
