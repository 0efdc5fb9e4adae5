"""Convolutions: the gradient of a kernel, sample by sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.uses import MatrixUse, RowsUse, Use, plane_of, scale, scatter

PATCHES = 128  # positions from which patches, k times the input, cost more than they save
MADE = 1 << 26  # values of patches, and of what they are multiplied with, that are there at a time


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
        wide, narrow = (self.grads, self.inputs) if g.transposed else (self.inputs, self.grads)
        n, count, channels = wide.shape[:3]
        patches = unfold(wide.flatten(0, 1), kernel, g, narrow.shape[3:])
        patches = patches.reshape(n, count, g.groups, channels // g.groups * _numel(kernel), -1)
        narrow = narrow.reshape(n, count, g.groups, narrow.shape[2] // g.groups, -1)
        # [n, groups, tokens, .]: the samples of a block are tokens of one product
        left = narrow.permute(0, 2, 1, 4, 3).flatten(2, 3)
        right = patches.permute(0, 2, 1, 4, 3).flatten(2, 3)
        if g.groups == 1:
            left, right = left.squeeze(1), right.squeeze(1)
        return MatrixUse(left, right, self.rows, "left" if g.transposed else "right")

    @property
    def made(self) -> int:
        """How many blocks' patches may be there at a time."""
        return max(1, MADE // max(1, self.tokens * sum(self.plane)))

    def formed(self) -> RowsUse:
        """The same gradients, which then exist."""
        pieces = [
            cast(ConvolutionUse, self.select(slice(lo, lo + self.made)))
            for lo in range(0, max(1, self.n), self.made)
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

    def combine(self, weights: Tensor, out: Tensor, beta: float = 1) -> None:
        # an ordinary weight gradient of all samples, with the gradients of each scaled
        each = weights.to(self.grads.dtype).view(-1, *[1] * (self.grads.dim() - 1))
        grads = (self.grads * each).flatten(0, 1)
        weight = grads.new_empty(self.shape)
        planes = self.kernel_grad(self.inputs.flatten(0, 1), grads, weight)
        scale(out, beta).add_(planes.reshape(out.shape))

    def products(self, vector: Tensor) -> Tensor:
        g = self.geometry
        out = torch.ops.aten.convolution(
            self.inputs.flatten(0, 1), vector.reshape(self.shape).to(self.inputs.dtype), None,
            g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups,
        ).reshape(self.grads.shape)  # fmt: skip
        return (out * self.grads).flatten(1).sum(1, dtype=torch.float64)


def unfold(x: Tensor, kernel: Sequence[int], g: Geometry, positions: Sequence[int]) -> Tensor:
    """Patches under the kernel, [N, C, *kernel, *positions], flattened to [N, C * k, positions]."""
    dims = len(kernel)
    if dims == 2 and not _uneven(x, kernel, g, positions):
        return F.unfold(x, tuple(kernel), g.dilation, g.padding, g.stride)
    # padded, or cut, to what the visited positions cover: strides may leave a rest
    pads: list[int] = []
    for d in reversed(range(dims)):
        need = (positions[d] - 1) * g.stride[d] + (kernel[d] - 1) * g.dilation[d] + 1
        pads += [g.padding[d], need - x.shape[2 + d] - g.padding[d]]
    x = F.pad(x, pads)
    for d in range(dims):
        span = (kernel[d] - 1) * g.dilation[d] + 1
        x = x.unfold(2 + d, span, g.stride[d])[..., :: g.dilation[d]]
    # [N, C, *positions, *kernel]
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    return x.permute(order).reshape(x.shape[0], x.shape[1] * _numel(kernel), -1)


def _uneven(x: Tensor, kernel: Sequence[int], g: Geometry, positions: Sequence[int]) -> bool:
    """F.unfold would not visit these positions."""
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, g.dilation, strict=True)]
    return any(
        (size + 2 * pad - span) // stride + 1 != count
        for size, pad, span, stride, count in zip(
            x.shape[2:], g.padding, spans, g.stride, positions, strict=True
        )
    )


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
