"""Tokens of images: the values under a window, wherever it is put, one token after another.

A program writes some values of some tokens. Images of one shape, of several parameters, take one
launch, by a table of where they are.
"""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.tiles import KINDS, cdiv, on, one_of, options

TOKENS, COLUMNS = 32, 32  # of a program


@triton.jit
def patches_kernel(
    images,  # [n, N, C, H, W], or where KIND a table of the addresses of such
    out,  # [planes, n, tokens, width]
    strides,  # of images
    size,  # (H, W)
    window,  # its size, strides, padding, dilation, positions
    blocks,  # n
    tokens,  # N times positions
    width,  # C times the window's size
    KIND: tl.constexpr,  # of the images of several planes; None of one
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    down, across = tl.cdiv(tokens, TOKENS), tl.cdiv(width, COLUMNS)
    plane = tl.program_id(1)
    if KIND is not None:
        images = one_of(images, plane, KIND)
    block = (tl.program_id(0) // (down * across)).to(tl.int64)
    tile = tl.program_id(0) % (down * across)
    token = (tile // across) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    high, wide = window[0]
    place = token % (window[4][0] * window[4][1])
    image = (token // (window[4][0] * window[4][1])).to(tl.int64)
    channel = (column // (high * wide)).to(tl.int64)
    y = place // window[4][1] * window[1][0] + column // wide % high * window[3][0] - window[2][0]
    x = place % window[4][1] * window[1][1] + column % wide * window[3][1] - window[2][1]
    known = (token < tokens) & (column < width)
    inside = known & (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    at = images + block * strides[0] + image * strides[1] + channel * strides[2]
    at += y.to(tl.int64) * strides[3] + x.to(tl.int64) * strides[4]
    value = tl.load(at, mask=inside, other=0)
    to = out + ((plane.to(tl.int64) * blocks + block) * tokens + token) * width + column
    tl.store(to, value, mask=known)


def patches(images: Tensor, window: Sequence[tuple[int, ...]], addresses: Tensor | None) -> Tensor:
    """Of several parameters, [planes, n, N positions, C window], in one launch.

    Args:
        images: of one, [n, N, C, H, W].
        window: its size, strides, padding, dilation and positions, along H and along W.
        addresses: [planes] int64, where those of each are, laid out as these; multiples of 16. None
            for these alone.
    """
    n, count, channels, *size = images.shape
    tokens, width = count * math.prod(window[4]), channels * math.prod(window[0])
    planes = 1 if addresses is None else len(addresses)
    out = images.new_empty(planes, n, tokens, width)
    if out.numel() == 0:
        return out
    with on(images):
        patches_kernel[(n * cdiv(tokens, TOKENS) * cdiv(width, COLUMNS), planes)](
            images if addresses is None else addresses,
            out,
            images.stride(),
            tuple(size),
            tuple(window),
            n,
            tokens,
            width,
            None if addresses is None else KINDS[images.dtype],
            TOKENS,
            COLUMNS,
            **options(4, 1),
        )
    return out
