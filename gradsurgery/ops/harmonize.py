"""Conflict-aware editing of two gradients: each loses what opposes the other."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gradsurgery.errors import NonFiniteError
from gradsurgery.ops._backend import register
from gradsurgery.ops._inputs import (
    Rows,
    as_vector,
    check_alike,
    check_finite,
    check_per,
    one_of,
)
from gradsurgery.ops._range import factors, times
from gradsurgery.ops.combine import combine_into
from gradsurgery.ops.gramian import gramian_of

EDITED = {"forget": slice(0, 1), "retain": slice(1, 2), "both": slice(0, 2)}  # of (f, r)
MODES = tuple(EDITED)
Mode = Literal["forget", "retain", "both"]


def harmonize(
    forget_grad: Rows,
    retain_grad: Rows,
    *,
    mode: Mode = "forget",
    per: Literal["model", "tensor"] = "model",
) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor]]:
    """Make two gradients that conflict orthogonal to each other.

    f ← f - min(0, f·r / |r|²) r   and   r ← r - min(0, f·r / |f|²) f

    Both are gradients of losses to be lowered. Where f·r >= 0 nothing changes; a zero gradient
    projects nothing.

    Args:
        forget_grad: f, [n], or a sequence of [*p.shape].
        retain_grad: r, the same shapes.
        mode: which gradient is edited, "forget", "retain", or "both", each then by the other's
            original, which is PCGrad for two losses.
        per: "model" decides by the whole gradients; "tensor" by each pair of tensors.

    Returns:
        (f, r), like the inputs; a gradient that the mode leaves alone is returned itself.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
        NonFiniteError: NaN or infinity, or a result that overflows the dtype (CPU; on a GPU it
            propagates, for want of a host sync).

    Gradient Surgery for Multi-Task Learning, Yu et al. 2020 (arXiv:2001.06782), Algorithm 1.
    """
    forget, retain = as_vector(forget_grad, "forget_grad"), as_vector(retain_grad, "retain_grad")
    shapes = [tensor.shape for tensor in forget]
    check_alike(retain, "retain_grad", shapes, forget[0], "forget_grad")
    one_of("mode", mode, MODES)
    check_per(per)
    new_forget, new_retain = torch.ops.gradsurgery.harmonize(forget, retain, mode, per == "tensor")
    out = [
        (new or [original])[0] if isinstance(original, Tensor) else new or list(original)
        for new, original in ((new_forget, forget_grad), (new_retain, retain_grad))
    ]
    return out[0], out[1]


def _weights(gram: Tensor, mode: str) -> Tensor:
    """[p, 2]: the edited gradients as combinations of (f, r), from their [2, 2] Gramian."""
    conflict = gram[0, 1].clamp(max=0)
    squares = gram.diagonal()
    a = torch.where(squares > 0, -conflict / squares, 0)  # of f on itself, of r on itself
    one = torch.ones_like(conflict)
    both = torch.stack([torch.stack([one, a[1]]), torch.stack([a[0], one])])
    return both[EDITED[mode]]


def harmonize_reference(
    forget: Sequence[Tensor], retain: Sequence[Tensor], mode: str, per_tensor: bool
) -> tuple[list[Tensor], list[Tensor]]:
    new = _fake(forget, retain, mode, per_tensor)
    for step in _steps(len(forget), per_tensor):
        rows = torch.stack(
            [torch.cat([t.flatten() for t in side[step]]) for side in (forget, retain)]
        )
        rows = rows.double()
        gram = rows @ rows.mT
        _check_finite(gram.diagonal(), forget[step], retain[step])
        scale = factors([rows.to(forget[0].dtype)], gram.diagonal())
        if scale is not None:
            rows = rows * scale[:, None]
            gram = rows @ rows.mT
        edited = _weights(gram, mode) @ rows
        if scale is not None:
            edited = edited / scale[EDITED[mode], None]
        sizes = [tensor.numel() for tensor in forget[step]]
        for row, outs in zip(edited, [side for side in new if side], strict=True):
            for part, out in zip(row.split(sizes), outs[step], strict=True):
                out.copy_(part.view(out.shape))
                _check_overflow(bool(out.isfinite().all()), out)
    return new


def harmonize_native(
    forget: Sequence[Tensor], retain: Sequence[Tensor], mode: str, per_tensor: bool
) -> tuple[list[Tensor], list[Tensor]]:
    out = _fake(forget, retain, mode, per_tensor)
    sources = [[tensor.reshape(1, -1) for tensor in side] for side in (forget, retain)]
    outs = [[tensor.view(1, -1) for tensor in side] for side in out if side]
    for step in _steps(len(forget), per_tensor):
        rows = [source[step] for source in sources]
        gram = gramian_of(rows, precise=False)
        if not gram.is_cuda:
            _check_finite(gram.diagonal(), forget[step], retain[step])
        square, wait = gram.diagonal(), not gram.is_cuda
        scales = [factors(rows[i], square[i : i + 1], wait) for i in range(2)]
        if any(scale is not None for scale in scales):
            rows = [r if s is None else times(r, s) for r, s in zip(rows, scales, strict=True)]
            gram = gramian_of(rows, precise=False)
        edited = [side[step] for side in outs]
        finite = combine_into(rows, _weights(gram, mode), edited)
        _check_overflow(finite, forget[0])
        # each gradient is edited alike whatever the lengths of both
        for side, scale in zip(edited, scales[EDITED[mode]], strict=True):
            if scale is not None:
                for tensor in side:
                    tensor /= scale
    return out


def _steps(count: int, per_tensor: bool) -> list[slice]:
    """The tensors decided together: each alone, or all."""
    return [slice(k, k + 1) for k in range(count)] if per_tensor else [slice(None)]


def _check_overflow(finite: bool, out: Tensor) -> None:
    # a vector shortened by a projection may have values larger than it had
    if not finite:
        raise NonFiniteError(
            f"harmonize: the result overflows {out.dtype}; scale the gradients down"
        )


def _check_finite(squares: Tensor, forget: Sequence[Tensor], retain: Sequence[Tensor]) -> None:
    check_finite(squares[:1], [tensor[None] for tensor in forget], "forget_grad")
    check_finite(squares[1:], [tensor[None] for tensor in retain], "retain_grad")


def _fake(
    forget: Sequence[Tensor], retain: Sequence[Tensor], mode: str, per_tensor: bool
) -> tuple[list[Tensor], list[Tensor]]:
    new = [[], []]
    for side, (tensors, untouched) in enumerate(((forget, "retain"), (retain, "forget"))):
        if mode != untouched:
            new[side] = [tensor.new_empty(tensor.shape) for tensor in tensors]
    return new[0], new[1]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    forget, retain, ctx.mode, ctx.per_tensor = inputs
    ctx.count = len(forget)
    ctx.save_for_backward(*forget, *retain)


def _backward(ctx: Any, d_forget: list[Tensor], d_retain: list[Tensor]) -> tuple:
    # the edited gradients are W J with W a function of G = J Jᵀ: dJ = Wᵀ dU + (dG + dGᵀ) J
    forget, retain = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    grads = [side for side in (d_forget, d_retain) if side]
    d_rows = [torch.zeros_like(tensor) for tensor in forget], [torch.zeros_like(t) for t in retain]
    for step in _steps(ctx.count, ctx.per_tensor):
        rows = [forget[step], retain[step]]
        upstream = [side[step] for side in grads]
        gram = torch.stack([torch.stack([_dot(a, b) for b in rows]) for a in rows])
        d_weights = torch.stack([torch.stack([_dot(d, row) for row in rows]) for d in upstream])
        back = _d_gram(gram, d_weights, ctx.mode)
        weights = _weights(gram, ctx.mode)
        for i, side in enumerate(d_rows):
            for k, out in enumerate(side[step]):
                for p, d in enumerate(upstream):
                    out += weights[p, i].to(out.dtype) * d[k]
                for q, row in enumerate(rows):
                    out += (back[i, q] + back[q, i]).to(out.dtype) * row[k]
    return *d_rows, None, None


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()


def _d_gram(gram: Tensor, d_weights: Tensor, mode: str) -> Tensor:
    """dG from dW through a_i = -min(0, G_01) / G_ii, the only entries of W that vary."""
    zero = torch.zeros_like(gram[0, 0])
    d_a = {
        "forget": lambda: [zero, d_weights[0, 1]],
        "retain": lambda: [d_weights[0, 0], zero],
        "both": lambda: [d_weights[1, 0], d_weights[0, 1]],
    }[mode]()
    squares, conflict = gram.diagonal(), gram[0, 1].clamp(max=0)
    d_a = torch.where(squares > 0, torch.stack(d_a) / squares, 0)
    d_squares = torch.where(squares > 0, d_a * conflict / squares, 0)
    d_cross = torch.where(gram[0, 1] < 0, -d_a.sum(), 0)
    return torch.stack([torch.stack([d_squares[0], d_cross]), torch.stack([zero, d_squares[1]])])


register(
    "harmonize",
    "(Tensor[] forget, Tensor[] retain, str mode, bool per_tensor) -> (Tensor[], Tensor[])",
    {
        ("torch", "any"): harmonize_reference,
        ("native", "cpu"): harmonize_native,
        ("native", "cuda"): harmonize_native,
        ("triton", "cuda"): harmonize_native,
    },
    device_of=lambda forget, *_: forget[0].device,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
