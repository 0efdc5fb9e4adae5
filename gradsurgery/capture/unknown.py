"""The rows of a junction that no formula knows, by the operation's own backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.capture.broadcast import Shape, reduce_to
from gradsurgery.capture.carriers import ELEMENTWISE, base_name
from gradsurgery.capture.probe import call, may_keep, steady, unsteady
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.trace import Junction
from gradsurgery.capture.uses import RowsUse
from gradsurgery.errors import InputError


def of_broadcast(
    junction: Junction, grads: Sequence[Tensor | None], shape: Shape
) -> RowsUse | None:
    """A broadcast input of an operation on elements, by the operation's own backward.

    None where it does not give the gradient as it was before the sum over what was broadcast.
    """
    out = tuple(junction.node._input_metadata[0].shape)
    grad = grads[0]
    if base_name(junction.node) not in ELEMENTWISE or grad is None or junction.whole is not None:
        return None
    layout = junction.outs[0]
    axis = layout.axis(out)
    if axis is None:
        return None
    with torch.no_grad():
        found = call(junction.node, grads, summed=False)[junction.k]
        if found is None or found.shape != out:
            return None
        return RowsUse(reduce_to(found, axis, shape), layout.numbers)


def by_row(
    junction: Junction, grad: Tensor | None, grads: Sequence[Tensor | None], shape: Shape
) -> RowsUse:
    """The rows of a gradient whose every element belongs to one row."""
    like = next(g for g in grads if g is not None)
    whole = junction.whole
    rows = [] if whole is None or grad is None else sorted(set(whole.rows.tolist()) - {-1})
    if whole is None or grad is None or not rows:
        return _no_rows(like, shape)
    ids = RowNumbers(torch.tensor(rows, device="cpu"))
    if whole.constant:
        return RowsUse(grad.detach().clone().unsqueeze(0), ids)
    elements = whole.elements(shape).to(grad.device)
    return RowsUse(torch.stack([grad.masked_fill(elements != row, 0) for row in rows]), ids)


def one_by_one(junction: Junction, grads: Sequence[Tensor | None], shape: Shape) -> RowsUse:
    """Each row's gradient by the operation's own backward, other rows' gradients set to zero."""
    if junction.whole is not None:  # no two rows meet in the input: one call for all
        with torch.no_grad():
            return by_row(junction, call(junction.node, grads)[junction.k], grads, shape)
    metas = junction.node._input_metadata
    like = next(g for g in grads if g is not None)
    rows = sorted({int(r) for o in junction.outs.values() for r in o.rows.unique()} - {-1})
    # the row of each element of the outputs' gradients
    of = {
        nr: layout.elements(tuple(metas[nr].shape)).to(like.device)
        for nr, layout in junction.outs.items()
    }

    def row(number: int) -> Tensor:
        masked = [
            None if g is None else g.masked_fill(of[nr] != number, 0) for nr, g in enumerate(grads)
        ]
        part = call(junction.node, masked)[junction.k]
        return like.new_zeros(shape) if part is None else part.clone()

    with torch.no_grad():
        found = [row(number) for number in rows]
        # asked again for the first row, when all others have been asked for
        if found and may_keep(junction.node) and not bool(steady(row(rows[0]), found[0])):
            raise InputError(unsteady(junction.node.name()))
    if not found:
        return _no_rows(like, shape)
    return RowsUse(torch.stack(found), RowNumbers(torch.tensor(rows, device="cpu")))


def _no_rows(like: Tensor, shape: Shape) -> RowsUse:
    rows = RowNumbers(torch.zeros(0, dtype=torch.int64, device="cpu"))
    return RowsUse(like.new_zeros(0, *shape), rows)
