"""Carriers of operations that pick elements of a tensor, join tensors, or put one into another."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from gradsurgery.capture.carriers import SHARED, Answer, base_name, carries, keep, move, wrap
from gradsurgery.capture.layout import Layout, compress, constant, listed, together
from gradsurgery.capture.recomputed import read_again


@carries("Slice Select")
def pick(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    layout, out, (shape,) = outs[0], shapes[0], ins
    dim = wrap(node._saved_dim, len(shape))
    picked = torch.full((shape[dim],), -1, device="cpu")
    selects = base_name(node) == "Select"
    if selects:
        index = wrap(node._saved_index, shape[dim])
    else:
        start, end = (_signed(getattr(node, f"_saved_{a}")) for a in ("start", "end"))
        index = slice(start, end, node._saved_step)
    if layout.constant:
        picked[index] = layout.rows
        return [listed(picked, shape, dim)]
    axis = layout.axis(out)
    if axis is None:
        return [None]
    if selects:
        return [move(layout, axis, out, shape, axis.dim + (axis.dim >= dim))]
    if axis.dim != dim:
        return [move(layout, axis, out, shape, axis.dim)]
    if shape == out:
        return [layout]
    picked[index] = layout.along(out)
    return [listed(picked, shape, dim)]


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


@carries("Index IndexSelect")
def index(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    layout, out, shape = outs[0], shapes[0], ins[0]
    others: list[Answer] = [None] * (len(ins) - 1)
    if shape is None:
        return [None, *others]
    chosen = indices_of(node, len(shape))
    dims = [dim for dim, each in enumerate(chosen) if each is not None]
    axis = layout.axis(out)
    if not dims or dims != list(range(dims[0], dims[-1] + 1)) or not (axis or layout.constant):
        return [None, *others]  # with a slice between them, what they pick comes first
    before, after = dims[0], dims[-1] + 1
    picked = torch.broadcast_shapes(*(each.shape for each in chosen if each is not None))
    if axis is not None and not before <= axis.dim < before + len(picked):
        behind = 0 if axis.dim < before else after - before - len(picked)
        return [move(layout, axis, out, shape, axis.dim + behind), *others]
    # samples lie among what is picked: a line has the row of all that pick it
    of = layout.rows
    if axis is not None:
        of = layout.along(out).view(
            [-1 if before + k == axis.dim else 1 for k in range(len(picked))]
        )
    of = of.expand(picked).flatten()
    lines = flat_indices(chosen[before:after], shape[before:after]).expand(picked).flatten().cpu()
    rows = torch.full((math.prod(shape[before:after]),), -1, device="cpu")
    rows.scatter_reduce_(0, lines, of, "amax")
    if bool(((of >= 0) & (rows[lines] != of)).any()):
        return [SHARED, *others]
    found = together(compress(rows.view(shape[before:after])))
    below = math.prod(shape[after:])
    return [Layout(found.stride * below, found.numbers), *others]


def indices_of(node: Any, ndim: int) -> list[torch.Tensor | None]:
    """What is picked along each dimension; None where all is."""
    read_again([node])  # which the formula and the pass read, too
    if base_name(node) == "IndexSelect":
        chosen: list[torch.Tensor | None] = [None] * wrap(node._saved_dim, max(ndim, 1))
        return [*chosen, node._saved_index]
    chosen = []
    for each in node._saved_indices:
        if each is not None and each.dtype in (torch.bool, torch.uint8):
            chosen.extend(each.nonzero(as_tuple=True))
        else:
            chosen.append(each)
    return chosen


def flat_indices(chosen: Sequence[Any], sizes: Sequence[int]) -> torch.Tensor:
    """The lines that are picked, of some dimensions as one."""
    lines = torch.zeros((), dtype=torch.int64, device=chosen[0].device)
    for size, each in zip(sizes, chosen, strict=True):
        lines = lines * size + torch.where(each < 0, each + size, each)
    return lines


@carries("IndexAdd IndexCopy")
def index_add(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    """What is added to, or written over, and what is put there by an index."""
    layout, out, source = outs[0], shapes[0], ins[1]
    axis, dim = layout.axis(out), wrap(node._saved_dim, max(len(out), 1))
    if axis is None and not layout.constant:
        return [layout, None]
    if axis is not None and axis.dim != dim:
        return [layout, None if source is None else move(layout, axis, out, source, axis.dim)]
    rows = layout.rows if axis is None else layout.along(out)
    rows = rows.expand(out[dim] if out else 1)
    read_again([node])
    index, mine = node._saved_index.flatten().cpu(), layout
    if base_name(node) == "IndexCopy":  # nothing is left of what was written over
        mine = listed(rows.index_fill(0, index, -1), out, dim)
    return [mine, None if source is None else listed(rows[index], source, dim)]


@carries("Split UnsafeSplit SplitWithSizes UnsafeSplitWithSizes Unbind")
def split(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    (shape,) = ins
    dim = wrap(node._saved_dim, len(shape))
    unbinds = base_name(node) == "Unbind"
    first = next(iter(outs.values()))
    if not first.constant:
        out = shapes[next(iter(outs))]
        axis = first.axis(out)
        if axis is None:
            return [None]
        home = axis.dim + (unbinds and axis.dim >= dim)
        if home != dim:
            home = move(first, axis, out, shape, home)
            return [home if all(o.same(first) for o in outs.values()) else None]
    # samples lie in the dimension that is split: each output has the rows of its part
    parts, none = [], torch.tensor([-1], device="cpu")
    for k, out in enumerate(shapes):
        size = 1 if unbinds else out[dim]
        layout = outs.get(k)
        if layout is None or layout.constant:
            parts.append((none if layout is None else layout.rows).expand(size))
            continue
        axis = layout.axis(out)
        if unbinds or axis is None or axis.dim != dim:
            return [None]
        parts.append(layout.along(out))
    return [listed(torch.cat(parts), shape, dim)]


@carries("Cat Stack")
def join(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    layout, out = outs[0], shapes[0]
    if layout.constant:
        return [layout] * len(ins)
    axis = layout.axis(out)
    dim = wrap(node._saved_dim, len(out))
    if axis is None:
        return [None] * len(ins)
    stacks = base_name(node) == "Stack"
    if axis.dim != dim:
        home = axis.dim - (stacks and axis.dim > dim)
        return [None if s is None else move(layout, axis, out, s, home) for s in ins]
    rows = layout.along(out)
    if stacks:  # each input is one index of the new dimension
        return [constant(int(row)) for row in rows]
    if any(s is None or len(s) != len(out) for s in ins):
        return [None] * len(ins)
    parts = rows.split([s[dim] for s in ins])
    return [listed(part, s, dim) for part, s in zip(parts, ins, strict=True)]


@carries("ConstantPadNd")
def pad(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    (shape,) = ins
    padded = len(node._saved_pad) // 2
    return [keep(outs[0], shapes[0], shape, range(len(shape) - padded))]
