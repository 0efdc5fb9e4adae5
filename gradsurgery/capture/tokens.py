"""Tokens one by one: each is of a row, and meets one of several matrices, as experts are."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from gradsurgery.capture.row_numbers import RowNumbers, as_slice
from gradsurgery.capture.uses import MatrixUse, Use, kernels_take_halves, scale

PADDING = 1.25  # times its tokens that a matrix may have in blocks of equal length


class TokenUse(Use):
    """G_k = left_k right_kᵀ of one token, in one of g matrices, one below the other.

    which [n] int64 on the CPU, in order: the matrix of each token; left [n, a], right [n, b].
    `inputs` says which of these are activations.
    """

    tensors = ("which", "left", "right")
    tokens = 1

    def __init__(
        self,
        which: Tensor,
        left: Tensor,
        right: Tensor,
        rows: RowNumbers,
        matrices: int,
        inputs: Literal["left", "right"] = "right",
    ) -> None:
        self.which, self.rows, self.matrices = which, rows, matrices
        self.inputs: Literal["left", "right"] = inputs
        self.left, self.right = left.detach().resolve_neg(), right.detach().resolve_neg()
        self.plane = (matrices * left.shape[1], right.shape[1])

    @property
    def height(self) -> int:
        """Lines of each matrix."""
        return self.left.shape[1]

    @property
    def takes_halves(self) -> bool:
        return kernels_take_halves(self.left.device.type)

    def transposed(self) -> "TokenUse":
        turned = "left" if self.inputs == "right" else "right"
        return TokenUse(self.which, self.right, self.left, self.rows, self.matrices, turned)

    def each(self) -> Iterator[tuple[int, slice]]:
        """The matrices that have tokens, and these."""
        ends = torch.bincount(self.which, minlength=self.matrices).cumsum(0).tolist()
        for k, (lo, hi) in enumerate(pairwise([0, *ends])):
            if lo < hi:
                yield k, slice(lo, hi)

    def of(self, tokens: slice) -> "TokenUse":
        """Some of the tokens, which are of one matrix, as those of this alone; views."""
        which, rows = torch.zeros_like(self.which[tokens]), RowNumbers(self.rows.tensor[tokens])
        return TokenUse(which, self.left[tokens], self.right[tokens], rows, 1, self.inputs)

    def longest(self, but: int | None) -> int:
        """The most tokens of one row, other than `but`."""
        counts = torch.bincount(self.rows.tensor)
        if but is not None and but < len(counts):
            counts[but] = 0
        return int(counts.max()) if len(counts) else 0

    def blocks(self) -> tuple[MatrixUse, Tensor]:
        """Tokens of one matrix in blocks of equal length; and the first token of each block.

        A block is of one row, which may have several; what it lacks in tokens is zero.
        """
        order = self.rows.tensor.argsort(stable=True)
        rows, counts = self.rows.tensor[order].unique_consecutive(return_counts=True)
        length = _length(counts)
        blocks = -(-counts // length)
        ends = counts.cumsum(0).repeat_interleave(blocks)
        within = torch.arange(len(ends), device="cpu") - (
            blocks.cumsum(0) - blocks
        ).repeat_interleave(blocks)
        starts = (counts.cumsum(0) - counts).repeat_interleave(blocks) + length * within
        index = starts[:, None] + torch.arange(length, device="cpu")
        beyond = index >= ends[:, None]
        index = order[index.where(~beyond, 0)]  # [blocks, length]
        first, tokens = index[:, 0], as_slice(index.flatten())

        def blocked(side: Tensor) -> Tensor:
            side = side[tokens if isinstance(tokens, slice) else tokens.to(side.device)]
            side = side.unflatten(0, tuple(index.shape))
            padded = bool(beyond.any())
            return side.masked_fill(beyond.to(side.device)[..., None], 0) if padded else side

        of = RowNumbers(rows.repeat_interleave(blocks))
        return MatrixUse(blocked(self.left), blocked(self.right), of, self.inputs), first

    def add_rows(self, out: Tensor, index: RowNumbers, lo: int, hi: int) -> None:
        for k, tokens in self.each():
            start = k * self.height
            first, last = max(lo, start), min(hi, start + self.height)
            if first < last:
                use, of = self.of(tokens).blocks()
                # a block goes where its first token does
                where = RowNumbers(index.tensor[tokens][of])
                part = out.new_zeros(len(out), last - first, out.shape[2])
                use.add_rows(part, where, first - start, last - start)
                out[:, first - lo : last - lo] += part

    def combine(self, weights: Tensor, out: Tensor, beta: float = 1) -> None:
        parts = out.unflatten(0, (self.matrices, self.height))
        tokens = dict(self.each())
        for k, part in enumerate(parts):
            if k in tokens:
                self._alone(tokens[k]).combine(weights[tokens[k]], part, beta)
            else:
                scale(part, beta)

    def products(self, vector: Tensor) -> Tensor:
        parts = vector.unflatten(0, (self.matrices, self.height))
        found = [self._alone(tokens).products(parts[k]) for k, tokens in self.each()]
        return torch.cat([self.left.new_zeros(0, dtype=torch.float64), *found])

    def _alone(self, tokens: slice) -> MatrixUse:
        """Each token a block."""
        left, right = self.left[tokens, None], self.right[tokens, None]
        return MatrixUse(left, right, RowNumbers(self.rows.tensor[tokens]), self.inputs)


def _length(counts: Tensor) -> int:
    """The longest blocks, as a power of two or the largest count, that need little padding."""
    most, tokens = int(counts.max()), int(counts.sum())
    length = most
    while length > 1 and int((-(-counts // length)).sum()) * length > PADDING * tokens:
        length = 1 << (length - 1).bit_length() - 1
    return length
