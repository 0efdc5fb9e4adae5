"""Sums of rows by Triton, against float64."""

import pytest
import torch

from gradsurgery.ops.row_sums import LONG, Summand, row_sums, row_sums_reference
from tests.conftest import ROUNDOFF
from tests.kernels.interpreted import needs_triton, randn, triton  # noqa: F401 - a fixture

pytestmark = needs_triton


def exact_sum(summand):
    """In float64, and the sum of the sizes of what is added."""
    values, *others = (t if t is None else t.double() for t in summand.tensors)
    factors, means, rstds = others
    if factors is not None:
        means, rstds = (
            t if t is None else t.repeat_interleave(summand.each, 2) for t in others[1:]
        )
        size = factors.abs() if means is None else factors.abs() + means.abs()
        factors = factors if means is None else factors - means
        factors = factors if rstds is None else factors * rstds
        values, size = values * factors, values * (size if rstds is None else size * rstds)
        return values.sum(1), size.abs().sum(1)
    return values.sum(1), values.abs().sum(1)


def expect_sums(summands):
    for total, summand in zip(row_sums(summands), summands, strict=True):
        exact, size = exact_sum(summand)
        assert total.dtype == summand.dtype
        assert total.shape == exact.shape
        # sums of up to 32 in one lane, and the last rounding to the dtype
        bound = 4 * ROUNDOFF[torch.float64 if total.dtype == torch.float64 else torch.float32]
        bound = bound + ROUNDOFF[total.dtype]
        assert ((total.double() - exact).abs() <= bound * size).all()


def of_layer_norm(n, t, c, dtype, factors=3):
    statistics = torch.float32 if dtype.itemsize == 2 else dtype
    means, rstds = (randn(n, t, 1, dtype=statistics).expand(n, t, c) for _ in range(2))
    known = randn(n, t, c, dtype=dtype), means, rstds.abs()
    return Summand(randn(n, t, c, dtype=dtype), *known[:factors])


# n, T, C: one token, more than a tile, odd, none
SUMS = [
    (1, 1, 1), (3, 1, 40), (2, 70, 9), (5, 200, 130), (1, 33, 65), (0, 4, 3), (4, 0, 3), (3, 2, 0),
]  # fmt: skip


@pytest.mark.parametrize("n,t,c", SUMS)
def test_row_sums(n, t, c, dtype):
    summands = [of_layer_norm(n, t, c, dtype, k) for k in (0, 3, 0, 1, 3, 3)]
    # without a mean, as of RMS norm
    summands += [s._replace(means=None) for s in summands if s.rstds is not None]
    expect_sums(summands)


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("tokens", [1, 35, 1030])
def test_row_sums_of_channels(tokens, groups, dtype):
    n, channels = 3, 12
    summands = []
    for _ in range(2):
        values, factors = (randn(n, channels, tokens, dtype=dtype).mT for _ in range(2))
        means, rstds = (randn(n, groups).unsqueeze(1).expand(n, tokens, groups) for _ in range(2))
        summands.append(Summand(values, factors, means, rstds.abs(), channels // groups))
    expect_sums([*summands, *map(Summand, (s.values for s in summands))])


def test_row_sums_of_any_memory(dtype):
    """Strides of samples that alternate, of slices, of one value that stands for many."""
    whole = randn(40, 6, 24, dtype=dtype)
    views = (
        whole.transpose(0, 1),
        whole[::2, :, :16],
        whole[..., 8:],
        whole[..., 1:],
        whole[3:, ::3],
    )
    summands = [Summand(view, view) for view in views]
    summands.append(Summand(randn(1, 1, 1, dtype=dtype).expand(4, 5, 6), None))
    expect_sums(summands)


def test_row_sums_of_several_dtypes():
    values, means = randn(4, 9, 16, dtype=torch.bfloat16), randn(4, 9, 1).expand(4, 9, 16)
    for factors in randn(4, 9, 16), randn(4, 9, 16, dtype=torch.float64):
        expect_sums([Summand(values, factors, means, means.abs())] * 2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_row_sums_in_all_of_float32s_range(scale):
    values = randn(3, 50, 20, scale=scale)
    expect_sums([Summand(values), Summand(values, randn(3, 50, 20))])


def test_row_sums_keep_float16s_products_in_range():
    values = torch.full((2, 3, 8), 300.0, dtype=torch.float16)
    factors = values * torch.tensor([1.0, -1, 0.5])[:, None].half()  # 9e4 - 9e4 + 4.5e4
    (total,) = row_sums([Summand(values, factors)])
    assert total.tolist() == [[44_992.0] * 8] * 2  # 45000 as float16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_row_sums_not_finite_stay_in_their_place(bad):
    values = randn(3, 70, 20)
    values[1, 65, 7] = bad
    (total,) = row_sums([Summand(values, torch.ones(3, 70, 20))])
    wrong = ~total.isfinite()
    assert wrong.nonzero().tolist() == [[1, 7]]


def test_row_sums_have_the_same_bits_however_many_there_are():
    summands = [of_layer_norm(4, 70, 24, torch.float32) for _ in range(5)]
    together = row_sums(summands)
    for summand, total in zip(summands, together, strict=True):
        assert torch.equal(row_sums([summand])[0], total)
    assert row_sums([]) == []


def test_row_sums_of_very_many_tokens():
    values = randn(1, LONG + 1, 3)
    expect_sums([Summand(values)])
    assert torch.equal(row_sums([Summand(values)])[0], row_sums_reference([Summand(values)])[0])
