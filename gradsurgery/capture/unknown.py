"""What can be had of a meeting that no junction knows, by the operation's own backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.capture.carriers import ELEMENTWISE, base_name
from gradsurgery.capture.formulas import Shape, reduce_to
from gradsurgery.capture.probe import call, may_keep, steady, unsteady
from gradsurgery.capture.trace import Meeting
from gradsurgery.capture.uses import RowsUse
from gradsurgery.errors import InputError


def spread(meeting: Meeting, grads: Sequence[Tensor | None], shape: Shape) -> RowsUse | None:
    """A broadcast input of an operation on elements, by the operation's own backward.

    None where it does not give the gradient as it was before the sum over what was broadcast.
    """
    out = tuple(meeting.node._input_metadata[0].shape)
    grad = grads[0]
    if base_name(meeting.node) not in ELEMENTWISE or grad is None or meeting.whole is not None:
        return None
    layout = meeting.outs[0]
    axis = layout.axis(out)
    if axis is None:
        return None
    with torch.no_grad():
        found = call(meeting.node, grads, summed=False)[meeting.k]
        if found is None or found.shape != out:
            return None
        return RowsUse(reduce_to(found, axis, shape), layout.rows)


def apart(
    meeting: Meeting, grad: Tensor | None, grads: Sequence[Tensor | None], shape: Shape
) -> RowsUse:
    """The rows of a gradient whose every element belongs to one row."""
    like = next(g for g in grads if g is not None)
    whole = meeting.whole
    rows = [] if whole is None or grad is None else sorted(set(whole.rows.tolist()) - {-1})
    if whole is None or grad is None or not rows:
        return RowsUse(like.new_zeros(0, *shape), torch.zeros(0, dtype=torch.int64, device="cpu"))
    ids = torch.tensor(rows, device="cpu")
    if whole.constant:
        return RowsUse(grad.detach().clone().unsqueeze(0), ids)
    elements = whole.elements(shape).to(grad.device)
    return RowsUse(torch.stack([grad.masked_fill(elements != row, 0) for row in rows]), ids)


def one_by_one(meeting: Meeting, grads: Sequence[Tensor | None], shape: Shape) -> RowsUse:
    """Each row's gradient by the operation's own backward, other rows' gradients set to zero."""
    if meeting.whole is not None:  # one call for all
        with torch.no_grad():
            return apart(meeting, call(meeting.node, grads)[meeting.k], grads, shape)
    metas = meeting.node._input_metadata
    like = next(g for g in grads if g is not None)
    rows = sorted({int(r) for o in meeting.outs.values() for r in o.rows.unique()} - {-1})
    of = {
        nr: layout.elements(tuple(metas[nr].shape)).to(like.device)
        for nr, layout in meeting.outs.items()
    }

    def row(number: int) -> Tensor:
        masked = [
            None if g is None else g.masked_fill(of[nr] != number, 0) for nr, g in enumerate(grads)
        ]
        part = call(meeting.node, masked)[meeting.k]
        return like.new_zeros(shape) if part is None else part.clone()

    with torch.no_grad():
        found = [row(number) for number in rows]
        if found and may_keep(meeting.node) and not bool(steady(row(rows[0]), found[0])):
            raise InputError(unsteady(meeting.node.name()))
    if not found:
        return RowsUse(like.new_zeros(0, *shape), torch.zeros(0, dtype=torch.int64, device="cpu"))
    return RowsUse(torch.stack(found), torch.tensor(rows, device="cpu"))
