"""Asking an operation itself: its own backward, for gradients whose rows are known."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.capture.layout import Layout, compress, constant
from gradsurgery.capture.rules import SHARED, Answer, Shape
from gradsurgery.errors import NonFiniteError


def call(node: Any, grads: Sequence[Tensor | None], *, summed: bool = True) -> list[Tensor | None]:
    """A node's backward for the gradients of its outputs: one gradient for each edge.

    They are as autograd hands them on, but dense; `summed` over what was broadcast.
    """
    if hasattr(node, "apply"):  # a torch.autograd.Function, which has answers for what is no Tensor
        given = [
            torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device) if g is None else g
            for g, meta in zip(grads, node._input_metadata, strict=True)
        ]
        answer = node.apply(*given)
        answer = answer if isinstance(answer, tuple) else (answer,)
        wanted = (a for a, needed in zip(answer, node.needs_input_grad, strict=False) if needed)
        found = [None if child is None else next(wanted) for child, _ in node.next_functions]
    else:
        answer = node(*grads)
        found = list(answer if isinstance(answer, tuple) else (answer,))
    for k, (child, nr) in enumerate(node.next_functions):
        grad = found[k]
        if child is None or grad is None:
            continue
        variable = getattr(child, "variable", None)
        like = child._input_metadata[nr] if variable is None else variable
        grad = grad.to_dense() if grad.layout != torch.strided else grad
        grad = grad.real if grad.is_complex() and not like.dtype.is_complex else grad
        shape = tuple(like.shape)
        found[k] = grad.sum_to_size(shape) if summed and grad.shape != shape else grad
    return found


def probe(
    node: Any, outs: dict[int, Layout], ins: Sequence[Shape | None], count: int
) -> list[Answer]:
    """The layouts that the operation's own backward shows, for any operation.

    It is linear: an element of an input's gradient that depends on one row only is the same
    whether the other rows' gradients are there or not, and zero without that row's. Rows are told
    apart by the bits of their numbers, one call for each.
    """
    generator = torch.Generator().manual_seed(0)
    grads: list[Tensor | None] = []
    ids: list[Tensor | None] = []
    for nr, meta in enumerate(node._input_metadata):
        layout = outs.get(nr)
        if layout is None:
            grads.append(None)
            ids.append(None)
            continue
        shape = tuple(meta.shape)
        numbers = layout.elements(shape).to(meta.device)
        grad = torch.randn(shape, generator=generator, dtype=torch.float64) + 2.0
        if meta.dtype.is_complex:
            other = torch.randn(shape, generator=generator, dtype=torch.float64) + 3.0
            grad = torch.complex(grad, other)  # or an operation on one part would seem to pass none
        grads.append((grad.to(meta.dtype).to(meta.device)).masked_fill(numbers < 0, 0))
        ids.append(numbers)
    with torch.no_grad():
        whole = [None if g is None else g.detach().clone() for g in call(node, grads)]
        known = [None if g is None else g.isfinite() for g in whole]
        rows = [
            torch.zeros(() if g is None else g.shape, dtype=torch.int64, device="cpu")
            for g in whole
        ]
        separate = [g is not None for g in whole]
        for bit in range(max(1, math.ceil(math.log2(max(count, 2))))):
            masked = [
                None if g is None or n is None else g.masked_fill((n >> bit) & 1 == 0, 0)
                for g, n in zip(grads, ids, strict=True)
            ]
            for k, part in enumerate(call(node, masked)):
                full, finite = whole[k], known[k]
                if not separate[k] or ins[k] is None or full is None or finite is None:
                    continue
                part = torch.zeros_like(full) if part is None else part
                there = (part - full).abs() <= _roundings(full.dtype) * full.abs()
                separate[k] = bool((there | (part == 0) | ~finite).all())
                rows[k] |= (there & (full != 0)).cpu().long() << bit
    answers: list[Answer] = []
    for k, shape in enumerate(ins):
        full, finite = whole[k], known[k]
        if shape is None:
            answers.append(None)
        elif full is None or finite is None:  # no gradient passes
            answers.append(constant(-1))
        elif not separate[k]:
            answers.append(SHARED)
        else:
            # what is not finite has the row of its neighbours
            answer = compress(rows[k].masked_fill(((full == 0) | ~finite).cpu(), -1).view(shape))
            lost = ~finite.cpu() & (answer.elements(shape) < 0)
            if bool(lost.any()):
                raise NonFiniteError(f"{node.name()}: its gradient is not finite")
            answers.append(answer)
    return answers


def _roundings(dtype: torch.dtype) -> float:
    """How far two sums of the same numbers may be apart."""
    return torch.finfo(dtype).eps * (2 if dtype in (torch.float16, torch.bfloat16) else 64)
