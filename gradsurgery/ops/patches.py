"""Patches of images, the tokens that a convolution multiplies."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Size, Tensor

from gradsurgery.ops._backend import OPERATORS, choose
from gradsurgery.ops._inputs import DTYPES, addresses

MOST = (1 << 16) - 1  # parameters in a launch


class Window(NamedTuple):
    """What a convolution puts on images, and where: numbers for each of their dimensions."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    positions: tuple[int, ...]

    @classmethod
    def point(cls, positions: Sequence[int]) -> "Window":
        """A window that sees one position, on each of an image."""
        one = (1,) * len(positions)
        return cls(one, one, (0,) * len(positions), one, tuple(positions))


def patches(images: Sequence[Tensor], window: Window) -> list[Tensor]:
    """Of each, what is under the window where it is put, [n, N positions, C window], tokens first.

    Zeros beyond the edges. On a GPU one launch for all that are laid out alike.

    Args:
        images: [n, N, C, *] each, of one shape.
    """
    return choose("patches", IMPLEMENTATIONS, images[0].device.type)(images, window)


def patches_reference(images: Sequence[Tensor], window: Window) -> list[Tensor]:
    found = []
    for each in images:
        n, count = each.shape[:2]
        parts = unfold(each.flatten(0, 1), window).unflatten(0, (n, count))
        found.append(parts.mT.flatten(1, 2).contiguous())
    return found


def patches_triton(images: Sequence[Tensor], window: Window) -> list[Tensor]:
    dims, first = len(window.size), images[0]
    if not (1 <= dims <= 2 and first.dtype in DTYPES):
        return patches_reference(images, window)
    from gradsurgery.kernels import patches as kernels

    if dims == 1:  # images of one line
        images = [each.unsqueeze(-2) for each in images]
        lines = Window.point([1])
        window = Window(*(a + b for a, b in zip(lines, window, strict=True)))
    first = images[0]
    known = first.stride(), first.dtype
    together = all((each.stride(), each.dtype) == known for each in images)
    if len(images) == 1 or not together or any(each.data_ptr() % 16 for each in images):
        return [kernels.patches(each, window, None)[0] for each in images]
    parts = [images[lo : lo + MOST] for lo in range(0, len(images), MOST)]
    return [
        found
        for part in parts
        for found in kernels.patches(first, window, addresses([part])[0]).unbind()
    ]


def unfold(x: Tensor, window: Window) -> Tensor:
    """Patches under the window, [N, C, *size, *positions], flattened to [N, C * k, positions]."""
    kernel, dims = window.size, len(window.size)
    if dims == 2 and not _uneven(x, window):
        return F.unfold(x, kernel, window.dilation, window.padding, window.stride)
    # padded, or cut, to what the visited positions cover: strides may leave a rest
    pads: list[int] = []
    for d in reversed(range(dims)):
        need = (window.positions[d] - 1) * window.stride[d]
        need += (kernel[d] - 1) * window.dilation[d] + 1
        pads += [window.padding[d], need - x.shape[2 + d] - window.padding[d]]
    x = F.pad(x, pads)
    for d in range(dims):
        span = (kernel[d] - 1) * window.dilation[d] + 1
        x = x.unfold(2 + d, span, window.stride[d])[..., :: window.dilation[d]]
    # [N, C, *positions, *kernel]
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    return x.permute(order).reshape(x.shape[0], x.shape[1] * Size(kernel).numel(), -1)


def _uneven(x: Tensor, window: Window) -> bool:
    """F.unfold would not visit these positions."""
    spans = [(k - 1) * d + 1 for k, d in zip(window.size, window.dilation, strict=True)]
    return any(
        (size + 2 * pad - span) // stride + 1 != count
        for size, pad, span, stride, count in zip(
            x.shape[2:], window.padding, spans, window.stride, window.positions, strict=True
        )
    )


IMPLEMENTATIONS = {
    ("torch", "any"): patches_reference,
    ("triton", "cuda"): patches_triton,
}
OPERATORS["patches"] = IMPLEMENTATIONS
