"""Grouped products: tokens sorted into groups, each of which meets a matrix, as those of experts.

y_t = x_t W_e for offs[e - 1] <= t < offs[e]. Its carrier, and its formula.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.capture.carriers import SHARED, Answer, carries, move
from gradsurgery.capture.formulas import Finish, Shape, formula
from gradsurgery.capture.layout import Axis, Layout
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.tokens import TokenUse
from gradsurgery.capture.uses import Use

# of transformers, for GPUs for which torch has none
FALLBACK = "GeneratedBackwardFor_transformers_grouped_mm_fallback_defaultBackward"


@carries("GroupedMm")
def grouped_product(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    """Tokens, sorted into groups, of which each meets a matrix of its own."""
    layout, out, (a, b) = outs[0], shapes[0], ins[:2]
    if layout.constant:
        return [layout] * len(ins)
    axis = layout.axis(out)
    dims = len(node._saved_self_sym_sizes), len(node._saved_mat2_sym_sizes)
    # where tokens are: [S, d] by [E, d, p], or [E, p, d] by [d, S]; other ways sum over them
    tokens = {(2, 3): 0, (3, 2): 1}.get(dims)
    if axis is None or tokens is None or axis.dim != tokens:
        return [None] * len(ins)
    sides: list[Answer] = [SHARED, SHARED]
    side = (a, b)[tokens]
    sides[tokens] = None if side is None else move(layout, axis, out, side, tokens)
    return sides


@carries(FALLBACK)
def fallback(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    layout, out = outs[0], shapes[0]
    if layout.constant:
        return [layout] * len(ins)
    axis = layout.axis(out)
    if axis is None or axis.dim != 0:
        return [None] * len(ins)
    return [None if ins[0] is None else move(layout, axis, out, ins[0], 0), SHARED, None]


@formula("GroupedMm")
def grouped(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    dims = len(node._saved_self_sym_sizes), len(node._saved_mat2_sym_sizes)
    offs = node._saved_offs
    if dims == (2, 3) and k == 1:
        return _routed(node._saved_self, offs, layout, axis, shape)
    if dims == (3, 2) and k == 0:  # y = W x: P x^T, tokens in the second dimension
        turned = None if axis is None else axis._replace(dim=1 - axis.dim)
        return _routed(node._saved_mat2.mT, offs, layout, turned, shape, transposed=True)
    return None


@formula(FALLBACK)
def grouped_fallback(
    node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape
) -> Finish | None:
    return _routed(node.saved_tensors[0], node.offs, layout, axis, shape) if k == 1 else None


def _routed(
    x: Tensor,
    offs: Tensor,
    layout: Layout,
    axis: Axis | None,
    shape: Shape,
    transposed: bool = False,
) -> Finish | None:
    """Tokens x [S, d], of which those before offs[e], and not before offs[e - 1], meet matrix e."""
    if axis is not None and axis.dim != 0:
        return None
    ends = offs.long().cpu()
    tokens = int(ends[-1])  # what comes behind meets none
    which = torch.searchsorted(ends, torch.arange(tokens, device="cpu"), right=True)
    if axis is None:
        of = layout.rows.expand(len(x))
    else:
        of = layout.rows.repeat_interleave(axis.inner).repeat(axis.outer)
    rows = RowNumbers(of[:tokens])

    def finish(grad: Tensor) -> Use:
        sides = x[:tokens], (grad.mT if transposed else grad)[:tokens]
        use = TokenUse(which, *sides, rows, shape[0], "left")
        return use.transposed() if transposed else use

    return finish
