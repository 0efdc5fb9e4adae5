"""Patches by Triton: the same bits as torch's."""

import pytest
import torch

from gradsurgery.ops.patches import Window, patches, patches_reference
from tests.kernels.interpreted import needs_triton, randn, triton  # noqa: F401 - a fixture

pytestmark = needs_triton


# size, stride, padding, dilation of a window, and the shape of images under it
WINDOWS = {
    "plain": ((3, 3), (1, 1), (1, 1), (1, 1), (6, 5)),
    "strided": ((3, 2), (2, 3), (1, 0), (1, 1), (9, 8)),
    "dilated": ((2, 3), (1, 2), (2, 2), (3, 2), (7, 9)),
    "a point": ((1, 1), (1, 1), (0, 0), (1, 1), (4, 12)),
    "larger than the image": ((5, 5), (1, 1), (2, 2), (1, 1), (2, 1)),
    "a line": ((3,), (2,), (1,), (1,), (40,)),
    "a volume": ((2, 1, 2), (1, 1, 1), (0, 0, 1), (1, 1, 1), (3, 2, 3)),
}


def window_of(name):
    *parts, image = WINDOWS[name]
    positions = tuple(
        (h + 2 * p - (k - 1) * d - 1) // s + 1 for k, s, p, d, h in zip(*parts, image, strict=True)
    )
    return Window(*parts, positions), image


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", WINDOWS)
def test_patches(name, count, dtype):
    window, image = window_of(name)
    images = [randn(4, 2, 5, *image, dtype=dtype) for _ in range(count)]
    found = patches(images, window)
    for one, exact in zip(found, patches_reference(images, window), strict=True):
        assert one.stride() == (one[0].numel(), one.shape[2], 1)
        assert torch.equal(one, exact)
    # [n, T, C window] is what a convolution multiplies
    kernel = randn(7, 5, *window.size, dtype=torch.float64)
    convolve = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(image)]
    options = {"stride": window.stride, "padding": window.padding, "dilation": window.dilation}
    out = convolve(images[-1].double().flatten(0, 1), kernel, **options)
    expected = out.unflatten(0, (4, 2)).flatten(3).mT.flatten(1, 2)
    torch.testing.assert_close(found[-1].double() @ kernel.flatten(1).mT, expected)


def test_patches_of_any_memory(dtype):
    window, image = window_of("strided")
    whole = randn(6, 2, 5, image[0] + 1, *image[1:], dtype=dtype)
    views = [whole[::2, :, :, 1:], whole[1::2, :, :, :-1], whole.transpose(1, 2)[:3, :2, :, 1:]]
    views += [randn(3, 2, *image, 5, dtype=dtype).movedim(-1, 2)]  # channels last
    views = [view for view in views if view.shape[2] == 5]
    for given in (views, views[:1]):
        for one, exact in zip(
            patches(given, window), patches_reference(given, window), strict=True
        ):
            assert torch.equal(one, exact)


@pytest.mark.parametrize("shape", [(0, 1, 2, 4, 4), (2, 0, 2, 4, 4), (2, 1, 0, 4, 4)])
def test_no_patches(shape):
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), (4, 4))
    (found,) = patches([torch.zeros(shape)], window)
    assert found.shape == (shape[0], shape[1] * 16, shape[2] * 9)
