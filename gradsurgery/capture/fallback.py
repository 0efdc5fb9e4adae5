"""What can be had of a meeting that no junction knows, by the operation's own backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.capture.junctions import Shape, reduce_to
from gradsurgery.capture.probe import call
from gradsurgery.capture.rules import ELEMENTWISE, base_name
from gradsurgery.capture.trace import Meeting
from gradsurgery.capture.uses import RowsUse


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


def one_by_one(meeting: Meeting, grads: Sequence[Tensor | None], shape: Shape) -> RowsUse:
    """Each row's gradient by the operation's own backward, other rows' gradients set to zero."""
    metas = meeting.node._input_metadata
    like = next(g for g in grads if g is not None)
    rows = sorted({int(r) for o in meeting.outs.values() for r in o.rows.unique()} - {-1})
    with torch.no_grad():
        if meeting.whole is not None:  # one call for all
            part = call(meeting.node, grads)[meeting.k]
            rows = [row for row in rows if bool((meeting.whole.rows == row).any())]
            elements = meeting.whole.elements(shape).to(like.device)
            found = [] if part is None else [part.masked_fill(elements != row, 0) for row in rows]
        else:
            of = {
                nr: layout.elements(tuple(metas[nr].shape)).to(like.device)
                for nr, layout in meeting.outs.items()
            }
            found = []
            for row in rows:
                masked = [
                    None if g is None else g.masked_fill(of[nr] != row, 0)
                    for nr, g in enumerate(grads)
                ]
                part = call(meeting.node, masked)[meeting.k]
                found.append(like.new_zeros(shape) if part is None else part.clone())
    if not found:
        return RowsUse(like.new_zeros(0, *shape), torch.zeros(0, dtype=torch.int64, device="cpu"))
    return RowsUse(torch.stack(found), torch.tensor(rows, device="cpu"))
