"""Uses: what is kept of one junction, enough to form each block of the gradient.

A use has n blocks, each a part of one row: G_k, k = 0 .. n-1. They are seen as planes [H, W],
H the first dimension of the parameter, W all others. Only a `RowsUse` stores its planes: those of
small parameters, of a row that came from a pass of its own, or of a fallback.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.ops._backend import backend_of
from gradsurgery.ops._inputs import alike, to_device, wide
from gradsurgery.ops.combine_tokens import combine_tokens
from gradsurgery.ops.formed_gramian import SMALL


class Use:
    """n blocks of gradients; `rows` says which row of the Jacobian each belongs to."""

    plane: tuple[int, int]
    rows: RowNumbers
    grain = 1  # planes are cut along H into multiples of this
    tensors: tuple[str, ...] = ()  # attributes with leading dimension n
    by_sample = False  # whether each block is of all tokens of a sample

    def select(self, blocks: Tensor | slice, rows: RowNumbers | None = None) -> "Use":
        """The use with some of its blocks only, of `rows`; views where it is a slice."""
        # a copy of everything but the tensors, whatever a kind of use has besides
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.rows = RowNumbers(self.rows.tensor[blocks]) if rows is None else rows
        for name in self.tensors:
            tensor = getattr(self, name)
            inside = blocks if isinstance(blocks, slice) else to_device(blocks, tensor.device)
            part.__dict__[name] = tensor[inside]
        return part

    def wide(self) -> "Use":
        """The use with 16-bit values as float32, to be computed with."""
        if not any(t.dtype in HALVES for t in self.values) or self.takes_halves:
            return self
        return self._with(wide)

    def double(self) -> "Use":
        """The use in float64, for what leaves float32's range."""
        return self._with(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Use":
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        for name in self.tensors:
            part.__dict__[name] = change(getattr(self, name))
        return part

    @property
    def takes_halves(self) -> bool:
        """Whether 16-bit values are computed with as they are."""
        return False

    @property
    def n(self) -> int:
        return self.rows.tensor.shape[0]

    @property
    def values(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.tensors]

    def add_rows(self, out: Tensor, index: RowNumbers, lo: int, hi: int) -> None:
        """out[index[k]] += G_k[lo:hi]; out [R, hi - lo, W]."""
        raise NotImplementedError

    def write_rows(self, out: Tensor, index: RowNumbers, lo: int, hi: int) -> None:
        """The same into memory that holds nothing yet."""
        self.add_rows(out.zero_(), index, lo, hi)

    def combine(self, weights: Tensor, out: Tensor, beta: float = 1) -> None:
        """out = beta out + sum_k weights[k] G_k; out [H, W], which is not read if beta is 0."""
        raise NotImplementedError

    def products(self, vector: Tensor) -> Tensor:
        """⟨G_k, vector⟩, [n] float64; vector [H, W]."""
        raise NotImplementedError


HALVES = (torch.float16, torch.bfloat16)


def kernels_take_halves(device: str) -> bool:
    return backend_of("combine_tokens", device) == "triton"


def scale(out: Tensor, beta: float) -> Tensor:
    """out *= beta, whatever is in `out` if that is 0."""
    return out.zero_() if beta == 0 else out if beta == 1 else out.mul_(beta)


def scatter(out: Tensor, index: RowNumbers, blocks: Tensor) -> None:
    """out[index[k]] += blocks[k]."""
    if _is_range(index, len(out)):
        out += blocks
    else:
        out.index_add_(0, index.on(out.device), blocks.to(out.dtype))


class RowsUse(Use):
    """Blocks that exist, [n, *shape]: of biases, scales, norms."""

    tensors = ("blocks",)

    def __init__(self, blocks: Tensor, rows: RowNumbers) -> None:
        self.blocks, self.rows = blocks.resolve_neg(), rows
        self.plane = plane_of(blocks.shape[1:])

    def add_rows(self, out: Tensor, index: RowNumbers, lo: int, hi: int) -> None:
        scatter(out, index, self.blocks.reshape(self.n, *self.plane)[:, lo:hi])

    @property
    def flat(self) -> Tensor:
        return self.blocks.reshape(self.n, math.prod(self.plane))

    def combine(self, weights: Tensor, out: Tensor, beta: float = 1) -> None:
        scale(out, beta)
        out += (weights.to(out.dtype) @ self.flat.to(out.dtype)).view(out.shape)

    def products(self, vector: Tensor) -> Tensor:
        return (self.flat @ vector.reshape(-1).to(self.blocks.dtype)).double()

    def viewed(self, plane: tuple[int, int]) -> "RowsUse":
        return RowsUse(self.blocks.reshape(self.n, *plane), self.rows)

    def transposed(self) -> "RowsUse":
        return RowsUse(self.blocks.mT, self.rows)


def plane_of(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) else (1, 1)


class MatrixUse(Use):
    """G_k = left_k^T right_k over the tokens of block k: linear layers.

    left [n, T, a], right [n, T, b]; or [n, g, T, .] for g matrices, one below the other. `inputs`
    says which of them are activations.
    """

    tensors = ("left", "right")
    by_sample = True

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        rows: RowNumbers,
        inputs: Literal["left", "right"] = "right",
    ) -> None:
        self.inputs: Literal["left", "right"] = inputs
        self.left, self.right = left.detach().resolve_neg(), right.detach().resolve_neg()
        self.rows = rows
        # several matrices are one below the other in the plane: cut between them only
        self.grain = left.shape[-1] if left.dim() == 4 else 1
        self.plane = (math.prod(left.shape[1:-2]) * left.shape[-1], right.shape[-1])

    @property
    def tokens(self) -> int:
        return self.left.shape[-2]

    @property
    def takes_halves(self) -> bool:
        return kernels_take_halves(self.left.device.type)

    def transposed(self) -> "MatrixUse":
        turned = "left" if self.inputs == "right" else "right"
        return MatrixUse(self.right, self.left, self.rows, turned)

    def formed(self) -> RowsUse:
        """The same gradients, which then exist."""
        left, right = self.left.mT, self.right
        if left.is_cuda and left.dtype in HALVES and left.dtype == right.dtype:
            planes = torch.bmm(left, right, out_dtype=torch.float32)
        else:
            planes = wide(left) @ wide(right)
        return RowsUse(planes, self.rows)

    def total(self) -> Tensor:
        """The sum of all blocks of one matrix, [H, W], in float32 or wider."""
        left, right = self.left.flatten(0, 1).mT, self.right.flatten(0, 1)
        if left.is_cuda and left.dtype in HALVES and left.dtype == right.dtype:
            return torch.mm(left, right, out_dtype=torch.float32)
        left, right = alike(wide(left), wide(right))
        return left @ right

    def add_rows(self, out: Tensor, index: RowNumbers, lo: int, hi: int) -> None:
        left, right = wide(self.left), wide(self.right)
        if left.dim() == 4:
            part = slice(lo // self.grain, hi // self.grain)
            planes = left[:, part].mT @ right[:, part]
            scatter(out, index, planes.view(self.n, hi - lo, -1))
        elif _is_range(index, len(out)):
            out.baddbmm_(left[..., lo:hi].mT, right)
        else:
            scatter(out, index, left[..., lo:hi].mT @ right)

    def write_rows(self, out: Tensor, index: RowNumbers, lo: int, hi: int) -> None:
        if self.left.dim() == 3 and _is_range(index, len(out)):
            torch.bmm(wide(self.left[..., lo:hi]).mT, wide(self.right), out=out)
        else:
            super().write_rows(out, index, lo, hi)

    def combine(self, weights: Tensor, out: Tensor, beta: float = 1) -> None:
        left, right = self.left, self.right
        computed = wide(left[:0]).dtype
        # the kernel scales tokens as it reads them: no copy of a side
        if left.dim() == 3 and computed == out.dtype:
            combine_tokens(left, right, weights, out, beta)
            return
        if left.dim() == 3:
            part = torch.empty_like(out, dtype=computed)
            combine_tokens(left, right, weights, part)
        else:
            left, right = wide(left), wide(right)
            left = left * weights.to(left.dtype).view(-1, 1, 1, 1)
            part = (left.mT @ right).sum(0).view_as(out)
        scale(out, beta).add_(part)

    def products(self, vector: Tensor) -> Tensor:
        left, right = self.left, self.right
        if (
            left.is_cuda
            and left.dtype == torch.bfloat16
            and left.dim() == 3
            and math.prod(self.plane) >= SMALL
        ):
            # `vector` rounded as the tokens were, for tensor cores, as `formed_gramian` has it
            moved = torch.mm(left.flatten(0, 1), vector.to(left.dtype), out_dtype=torch.float32)
            return (moved.view_as(right) * right).flatten(1).sum(1, dtype=torch.float64)
        left, right = wide(left), wide(right)
        vector = vector.to(left.dtype)
        if left.dim() == 3:  # one product for all blocks
            moved = (left.flatten(0, 1) @ vector).view_as(right)
        else:
            moved = left @ vector.view(-1, left.shape[-1], right.shape[-1])
        return (moved * right).flatten(1).sum(1, dtype=torch.float64)


def _is_range(index: RowNumbers, size: int) -> bool:
    return len(index) == size and index.distinct


class EmbeddingUse(Use):
    """Line indices[k, t] of G_k gets grads[k, t]: embeddings, and what indices pick elsewhere.

    indices [n, T], where -1 marks a token without gradient, whose values are those of line
    `padding` if there is one; grads [n, T, *rest].
    """

    tensors = ("indices", "grads")

    def __init__(
        self,
        indices: Tensor,
        grads: Tensor,
        rows: RowNumbers,
        size: int,
        padding: int | None = None,
    ) -> None:
        self.indices, self.grads, self.rows = indices, grads.flatten(2), rows
        self.plane, self.padding = (size, self.grads.shape[2]), padding

    @property
    def tokens(self) -> int:
        return self.indices.shape[1]

    @property
    def takes_halves(self) -> bool:
        return kernels_take_halves(self.grads.device.type)

    def add_rows(self, out: Tensor, index: RowNumbers, lo: int, hi: int) -> None:
        if out.is_meta:
            return  # which lines were picked is not known there
        inside = (self.indices >= lo) & (self.indices < hi)
        block, _ = where = inside.nonzero(as_tuple=True)
        line = index.on(block.device)[block] * (hi - lo) + self.indices[where] - lo
        out.view(-1, self.plane[1]).index_add_(0, line, self.grads[where].to(out.dtype))

    def combine(self, weights: Tensor, out: Tensor, beta: float = 1) -> None:
        # -1 is clamped to a line that exists, and nothing is added to it: a mask's size would have
        # to be waited for
        inside = (self.indices >= 0)[..., None]
        weighted = self.grads.to(out.dtype) * weights.to(out.dtype)[:, None, None]
        lines = self.indices.clamp(min=0).flatten()
        scale(out, beta).index_add_(0, lines, weighted.where(inside, 0).flatten(0, 1))

    def products(self, vector: Tensor) -> Tensor:
        # -1 is clamped to a line that exists, and what it picked is masked out of the sums
        inside = self.indices >= 0
        grads = wide(self.grads)
        picked = vector[self.indices.clamp(min=0)].to(grads.dtype)
        sums = (picked * grads).flatten(2).sum(2, dtype=torch.float64)
        return (sums * inside).sum(1)

    def counts(self) -> Tensor:
        """How often each line of the parameter is read, [H] int64."""
        indices = self.indices
        if self.padding is not None:
            indices = torch.where(indices < 0, self.padding, indices)
        return torch.bincount(indices[indices >= 0], minlength=self.plane[0])

    def compact(self, picked: Tensor) -> "EmbeddingUse":
        """The same over the lines `picked` [u], sorted, of the parameter alone."""
        where = torch.searchsorted(picked, self.indices.clamp(min=0))
        indices = torch.where(self.indices >= 0, where, -1)
        return EmbeddingUse(indices, self.grads, self.rows, len(picked))


class Within(Use):
    """A use of some lines of a taller parameter: those from `start` on that `inner` has."""

    def __init__(self, inner: Use, start: int, height: int) -> None:
        self.inner, self.start, self.rows = inner, start, inner.rows
        self.plane = (height, inner.plane[1])

    def select(self, blocks: Tensor | slice, rows: RowNumbers | None = None) -> "Within":
        return Within(self.inner.select(blocks, rows), self.start, self.plane[0])

    def wide(self) -> "Within":
        return Within(self.inner.wide(), self.start, self.plane[0])

    def double(self) -> "Within":
        return Within(self.inner.double(), self.start, self.plane[0])

    @property
    def values(self) -> list[Tensor]:
        return self.inner.values

    def add_rows(self, out: Tensor, index: RowNumbers, lo: int, hi: int) -> None:
        # the lines of the slice that are the inner use's too, counted as it counts them
        first, last = max(lo, self.start), min(hi, self.start + self.inner.plane[0])
        if first < last:
            part = out.new_zeros(len(out), last - first, out.shape[2])
            self.inner.add_rows(part, index, first - self.start, last - self.start)
            out[:, first - lo : last - lo] += part

    def combine(self, weights: Tensor, out: Tensor, beta: float = 1) -> None:
        inner = scale(out, beta)[self.start : self.start + self.inner.plane[0]]
        self.inner.combine(weights, inner)

    def products(self, vector: Tensor) -> Tensor:
        return self.inner.products(vector[self.start : self.start + self.inner.plane[0]])


def on_one_plane(uses: Sequence[Use | None], plane: tuple[int, int]) -> list[Use] | None:
    """The uses, all over the same plane; None where they cannot be."""
    # blocks that exist can be reshaped; pairs are tied to the plane they multiply to
    planes = {use.plane for use in uses if use is not None and not isinstance(use, RowsUse)}
    plane = planes.pop() if planes else plane
    if planes:
        return None
    seen: list[Use] = []
    for use in uses:
        if use is None or math.prod(use.plane) != math.prod(plane):
            return None
        if isinstance(use, RowsUse) and use.plane != plane:
            use = use.viewed(plane)
        seen.append(use)
    return seen


class Renumbered:
    """Makes uses whose row numbers begin at `start`; what shared its row numbers still does."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.known: dict[int, RowNumbers] = {}

    def __call__(self, use: Use) -> Use:
        if id(use.rows) not in self.known:
            self.known[id(use.rows)] = RowNumbers(use.rows.tensor + self.start)
        return use.select(slice(None), self.known[id(use.rows)])


def largest_group(uses: list[list[Use]]) -> int | None:
    """The row that sums most samples; None where each has its own."""
    every = [use for mine in uses for use in mine]
    # others may have a block for each token: rows have many of these, and sum nothing
    longest = max(
        [use for use in every if use.by_sample] or every, key=lambda use: use.n, default=None
    )
    if longest is None or longest.n < 2:
        return None
    counts = torch.bincount(longest.rows.tensor)
    row = int(counts.argmax())
    return row if int(counts[row]) > 1 else None
