"""Which row of the Jacobian each element of a gradient belongs to.

Samples are independent, so an element of a gradient that flows back from per-sample losses depends
on the loss of one row at most. Where the samples lie in a tensor is followed through the graph,
operation by operation, never guessed from its size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradsurgery.capture.row_numbers import RowNumbers


class Axis(NamedTuple):
    """Where samples lie: dimension `dim` counts [outer, samples, inner]."""

    dim: int
    outer: int
    inner: int


class Layout:
    """Element e, counted row-major, belongs to row rows[e // stride % len(rows)].

    So a view that keeps the order of elements, such as a reshape, keeps its layout. `rows` is the
    tensor of `numbers`; -1 stands where no loss depends on an element. Axes are found once for each
    shape, and stay for as long as the layout does: over many steps, if it is a recipe's.
    """

    __slots__ = ("_axes", "constant", "count", "numbers", "rows", "stride")

    def __init__(self, stride: int, numbers: RowNumbers) -> None:
        self.stride, self.numbers, self.rows = stride, numbers, numbers.tensor
        self._axes: dict[tuple[int, ...], Axis | None] = {}
        self.count = self.rows.shape[0]
        self.constant = self.count == 1  # all of the tensor belongs to one row

    def __repr__(self) -> str:
        return f"Layout(stride={self.stride}, rows={self.rows.tolist()})"

    @property
    def empty(self) -> bool:
        """No loss depends on the tensor."""
        return self.constant and int(self.rows) < 0

    def axis(self, shape: Sequence[int]) -> Axis | None:
        """The one dimension that the row depends on; None if it depends on several, or none."""
        shape = tuple(shape)
        try:
            return self._axes[shape]
        except KeyError:
            return self._axes.setdefault(shape, self._axis(shape))

    def _axis(self, shape: tuple[int, ...]) -> Axis | None:
        # the dimension in which the stride of the rows lies; a step of it is `suffix` elements
        n, suffix = self.count, 1
        if n == 1:
            return None
        for dim in range(len(shape) - 1, -1, -1):
            above = suffix * shape[dim]
            if suffix <= self.stride < above:
                inner, rest = divmod(self.stride, suffix)
                outer, odd = divmod(shape[dim], inner * n)
                return None if rest or odd else Axis(dim, outer, inner)
            suffix = above
        return None

    def at(self, shape: Sequence[int], dim: int, axis: Axis) -> "Layout":
        """The same samples where dimension `dim` of another shape holds them."""
        return Layout(axis.inner * math.prod(shape[dim + 1 :]), self.numbers)

    def along(self, shape: Sequence[int]) -> Tensor:
        """The row of each index along the sample dimension, [shape[dim]]."""
        axis = self.axis(shape)
        assert axis is not None
        return self.rows.repeat_interleave(axis.inner).repeat(axis.outer)

    def elements(self, shape: Sequence[int]) -> Tensor:
        """The row of every element, [*shape]."""
        each = torch.arange(math.prod(shape), device="cpu")
        return self.rows[each // self.stride % self.count].view(tuple(shape))

    def beside(self, shape: Sequence[int]) -> Tensor:
        """The same with dimensions of 1 where the row is the same all along."""
        if self.constant:
            return self.rows.view([1] * len(shape))
        axis = self.axis(shape)
        if axis is None:
            return self.elements(shape)
        return self.along(shape).view([-1 if d == axis.dim else 1 for d in range(len(shape))])

    def same(self, other: "Layout") -> bool:
        if self is other:
            return True
        return self.stride == other.stride and (
            self.rows is other.rows or torch.equal(self.rows, other.rows)
        )


def constant(row: int) -> Layout:
    return Layout(1, RowNumbers(torch.tensor([row], device="cpu")))


def listed(rows: Tensor, shape: Sequence[int], dim: int) -> Layout:
    """One row for each index along `dim`; no element is as good as one of row 0."""
    if len(rows) == 0:
        return constant(0)
    if bool((rows == rows[0]).all()):
        return Layout(1, RowNumbers(rows[:1]))
    return Layout(math.prod(shape[dim + 1 :]), RowNumbers(rows))


def together(layout: Layout) -> Layout:
    """The same rows, each said once for as many neighbours as have it."""
    for n in range(len(layout.numbers.ids), layout.count):
        if layout.count % n == 0:
            parts = layout.rows.view(n, -1)
            if bool((parts == parts[:, :1]).all()):
                return Layout(layout.stride * parts.shape[1], RowNumbers(parts[:, 0].contiguous()))
    return layout


def merge(a: Layout, b: Layout, shape: Sequence[int]) -> Layout | None:
    """The layout of a sum of two gradients; None where an element would belong to two rows."""
    if a.same(b) or 0 in shape:
        return a
    for one, other in ((a, b), (b, a)):
        if one.empty:
            return other
    if a.constant and b.constant:
        return None  # they are not the same, and neither is empty
    # where both depend on one dimension, a number for each of its indices is enough; one for each
    # element would cost as much as the tensor
    axes = [layout.axis(shape) for layout in (a, b)]
    dims = {axis.dim for axis in axes if axis is not None}
    if len(dims) == 1 and all(
        axis or layout.constant for axis, layout in zip(axes, (a, b), strict=True)
    ):
        dim = dims.pop()
        one, other = (
            layout.rows.expand(shape[dim]) if layout.constant else layout.along(shape)
            for layout in (a, b)
        )
        if bool(((one == other) | (one < 0) | (other < 0)).all()):
            both = torch.maximum(one, other)
            # the one that says it in fewer words, if it says it all
            for layout, own in sorted(((a, one), (b, other)), key=lambda each: each[0].count):
                if torch.equal(own, both):
                    return layout
            return listed(both, shape, dim)
        return None
    one, other = a.elements(shape), b.elements(shape)
    if bool(((one == other) | (one < 0) | (other < 0)).all()):
        return compress(torch.maximum(one, other))
    return None


def compress(elements: Tensor) -> Layout:
    """The layout with these rows, element by element, if they depend on one dimension only.

    An element of no row goes with its neighbours.
    """
    shape = elements.shape
    if elements.numel() == 0:
        return constant(0)
    if elements.dim() == 1:
        return listed(elements, shape, 0)
    # the first dimension along which each slice is of one row
    for dim in range(elements.dim()):
        flat = elements.movedim(dim, 0).reshape(shape[dim], -1)
        rows = flat.amax(1) if flat.numel() else flat.new_full((shape[dim],), -1)
        if bool(((flat == rows[:, None]) | (flat < 0)).all()):
            return listed(rows, shape, dim)
    rows = elements.flatten()
    return constant(int(rows)) if rows.numel() == 1 else Layout(1, RowNumbers(rows))
