"""Convolutions: the gradient of a kernel, sample by sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.uses import MatrixUse, RowsUse, Use, plane_of, scale, scatter
from gradsurgery.ops._backend import runs_triton
from gradsurgery.ops.patches import Window, patches, unfold

PATCHES = 128  # positions from which patches, k times the input, cost more than they save
MADE = 3 << 22  # values of patches, and of what they are multiplied with, that are there at a time


@dataclass(frozen=True)
class Geometry:
    """What a convolution was called with."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, node: Any) -> "Geometry":
        dims = len(node._input_metadata[0].shape) - 2
        stride, padding, dilation, output_padding = (
            tuple(values) * (dims if len(values) == 1 else 1)  # one number may stand for all
            for values in (
                node._saved_stride,
                node._saved_padding,
                node._saved_dilation,
                node._saved_output_padding,
            )
        )
        transposed, groups = bool(node._saved_transposed), int(node._saved_groups)
        return cls(stride, padding, dilation, transposed, output_padding, groups)


class ConvolutionUse(Use):
    """inputs [n, N, C, *], grads [n, N, O, *]: block k is the convolution of N samples."""

    tensors = ("inputs", "grads")
    by_sample = True

    def __init__(
        self,
        inputs: Tensor,
        grads: Tensor,
        rows: RowNumbers,
        shape: Sequence[int],
        geometry: Geometry,
    ) -> None:
        self.inputs, self.grads, self.rows = inputs.detach(), grads.detach(), rows
        self.shape, self.geometry = tuple(shape), geometry
        self.plane = plane_of(self.shape)

    def kernel_grad(self, inputs: Tensor, grads: Tensor, weight: Tensor) -> Tensor:
        """The ordinary gradient of the kernel, of whole samples [N, C, *] and [N, O, *]."""
        g = self.geometry
        return torch.ops.aten.convolution_backward(
            grads, inputs, weight, None, g.stride, g.padding, g.dilation, g.transposed,
            g.output_padding, g.groups, [False, True, False],
        )[1]  # fmt: skip

    def matrices(self) -> MatrixUse:
        """The same gradients as products of matrices, over patches of the wider tensor.

        An ordinary kernel [O, C/groups, *k] is grads^T patches(inputs); that of a transposed
        convolution [C, O/groups, *k] is inputs^T patches(grads).
        """
        g, kernel = self.geometry, self.shape[2:]
        wide, narrow = self.wide_and_narrow
        n, count, channels = wide.shape[:3]
        narrow = narrow.reshape(n, count, g.groups, narrow.shape[2] // g.groups, -1)
        # [n, groups, tokens, .]: the samples of a block are tokens of one product
        left = narrow.permute(0, 2, 1, 4, 3).flatten(2, 3)
        if g.groups == 1 and runs_triton(wide, among=True):
            # torch launches a kernel for each sample
            left, right = left.squeeze(1), patches([wide], self.window)[0]
        else:
            found = unfold(wide.flatten(0, 1), self.window)
            found = found.reshape(n, count, g.groups, channels // g.groups * _numel(kernel), -1)
            right = found.permute(0, 2, 1, 4, 3).flatten(2, 3)
            if g.groups == 1:
                left, right = left.squeeze(1), right.squeeze(1)
        return MatrixUse(left, right, self.rows, "left" if g.transposed else "right")

    @property
    def wide_and_narrow(self) -> tuple[Tensor, Tensor]:
        """What patches are of, and what they are multiplied with."""
        if self.geometry.transposed:
            return self.grads, self.inputs
        return self.inputs, self.grads

    @property
    def window(self) -> Window:
        g, positions = self.geometry, self.wide_and_narrow[1].shape[3:]
        return Window(self.shape[2:], g.stride, g.padding, g.dilation, tuple(positions))

    @property
    def made(self) -> int:
        """How many blocks' patches may be there at a time."""
        return max(1, MADE // max(1, self.tokens * sum(self.plane)))

    def formed(self) -> RowsUse:
        """The same gradients, which then exist."""
        # as few pieces as go, and these of one size
        step = max(1, -(-self.n // max(1, -(-self.n // self.made))))
        pieces = [
            cast(ConvolutionUse, self.select(slice(lo, lo + step)))
            for lo in range(0, max(1, self.n), step)
        ]
        parts = [piece.matrices().formed().blocks for piece in pieces]
        return RowsUse(parts[0] if len(parts) == 1 else torch.cat(parts), self.rows)

    def best(self) -> Use:
        """Itself, or its patches where they are few: each sample's convolution costs more then."""
        return self if self.tokens >= PATCHES else self.matrices()

    @property
    def tokens(self) -> int:
        """Positions of the kernel on the samples of a block."""
        narrow = self.inputs if self.geometry.transposed else self.grads
        return narrow.shape[1] * _numel(narrow.shape[3:])

    def add_rows(self, out: Tensor, index: RowNumbers, lo: int, hi: int) -> None:
        # only an ordinary kernel's lines are output channels, of which some can be formed alone
        whole = self.geometry.transposed or self.geometry.groups > 1
        channels = slice(None) if whole else slice(lo, hi)
        weight = out.new_empty(self.shape)[channels]
        for k in range(self.n):
            grads = self.grads[k][:, channels]
            part = self.kernel_grad(self.inputs[k], grads, weight).flatten(1)
            scatter(
                out,
                RowNumbers(index.tensor[k : k + 1]),
                (part[lo:hi] if whole else part).unsqueeze(0),
            )

    def total(self, weights: Tensor | None = None) -> Tensor:
        """The sum of all blocks, or of their products with weights [n]; [H, W]."""
        # an ordinary weight gradient of all samples, with the gradients of each scaled
        grads = self.grads
        if weights is not None:
            grads = grads * weights.to(grads.dtype).view(-1, *[1] * (grads.dim() - 1))
        grads = grads.flatten(0, 1)
        weight = grads.new_empty(self.shape)
        found = self.kernel_grad(self.inputs.flatten(0, 1), grads, weight)
        return found.reshape(self.plane)

    def combine(self, weights: Tensor, out: Tensor, beta: float = 1) -> None:
        scale(out, beta).add_(self.total(weights))

    def products(self, vector: Tensor) -> Tensor:
        g = self.geometry
        out = torch.ops.aten.convolution(
            self.inputs.flatten(0, 1), vector.reshape(self.shape).to(self.inputs.dtype), None,
            g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups,
        ).reshape(self.grads.shape)  # fmt: skip
        return (out * self.grads).flatten(1).sum(1, dtype=torch.float64)


def token_sides(uses: Sequence[ConvolutionUse]) -> tuple[list[Tensor], list[Tensor]]:
    """Left and right sides of uses whose kernels, inputs and geometries are alike; of one group.

    [n, T, .] as `ConvolutionUse.matrices` has them, tokens one after another in memory.
    """
    wide, narrow = zip(*(use.wide_and_narrow for use in uses), strict=True)
    left = patches(narrow, Window.point(narrow[0].shape[3:]))
    return left, patches(wide, uses[0].window)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
