"""PCD: two rows worked by hand, the conditions of its minimum, shares, memory, and torchjd's."""

import math

import pytest
import torch

import gradsurgery as gs
from tests.inputs import CONFLICTS, gaussian, signed, vanishing


def test_two_rows_are_worked_by_hand(impl):
    """Unit rows (1, 0) and (-0.6, 0.8): d = (1, 0) + (0.02 + 0.6) (-0.6, 0.8) = (0.628, 0.496)."""
    rows = torch.tensor([[5.0, 0], [-0.3, 0.4]], dtype=torch.float64)
    d = torch.tensor([0.628, 0.496], dtype=torch.float64)
    torch.testing.assert_close(gs.PCD()(rows), 5 * d / d.norm(), rtol=1e-14, atol=0)
    # served by the first alone: nothing is added
    assert gs.PCD(tau=0.5)(rows * torch.tensor([[1], [-1]])).tolist() == pytest.approx([5, 0])
    # the second first: (-0.6, 0.8) + 0.62 (1, 0) = (0.02, 0.8), of length 0.5
    d = torch.tensor([0.02, 0.8], dtype=torch.float64)
    expected = 0.5 * d / d.norm()
    for primary in (1, -1):
        torch.testing.assert_close(gs.PCD(primary=primary)(rows), expected, rtol=1e-14, atol=0)


def test_retains_first_of_two_directions(impl):
    """f = -(3, 4) raised and r = (0, 2): f opposes r by 0.8 of its length, r stays nearly r."""
    rows = torch.tensor([[3.0, 4], [0, 2]], dtype=torch.float64)
    update = gs.TwoDirections(rule=gs.PCD(primary=1))(rows, forget=0)
    d = torch.tensor([0, 1], dtype=torch.float64) + 0.82 * torch.tensor(
        [-0.6, -0.8], dtype=torch.float64
    )
    torch.testing.assert_close(update, 2 * d / d.norm(), rtol=1e-14, atol=0)
    # the forget loss rises by the share: -<g_f, d> = 0.02 of unit rows
    assert float(-rows[0] @ d / 5) == pytest.approx(0.02)


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("family", ["conflicting", "alike", "condition 1e4", "graded", "tiny"])
def test_is_the_nearest_that_serves_all(family, tau, impl):
    for m, n in ((2, 9), (5, 40), (4, 4)):
        rows = CONFLICTS[family](m, n)
        update = gs.PCD(tau=tau)(rows)
        assert update.norm() == pytest.approx(float(rows[0].norm()), rel=1e-6)
        unit = rows / rows.norm(dim=1, keepdim=True)
        weights = gs.PCD(tau=tau).weights(rows @ rows.mT) * rows.norm(dim=1)
        assert weights[0] > 0
        assert (weights >= 0).all()
        weights = weights / weights[0]  # of d before it is made as long as the first
        d = weights @ unit
        size = 1 + float(weights.sum())
        over = unit[1:] @ d - tau
        assert (over >= -1e-12 * size).all()
        assert (weights[1:] * over).abs().max() <= 1e-12 * size**2


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_shares_no_direction_has_leave_the_first(scale, impl):
    a, b = scale * gaussian(2, 9)
    for rows in (
        torch.stack([a, b, -2 * b]),
        torch.cat([a[None], scale * vanishing(4, 9)]),
        torch.stack([a, -a, a]),
    ):
        torch.testing.assert_close(gs.PCD()(rows), a, rtol=1e-12, atol=0)
    torch.testing.assert_close(gs.PCD()(torch.stack([a, -3 * a])), -a, rtol=1e-9, atol=0)
    assert not gs.PCD(tau=0.0)(torch.stack([a, -3 * a])).any()


def test_rows_of_zeros(impl):
    rows = gaussian(3, 9)
    assert not gs.PCD()(torch.stack([0 * rows[0], *rows[1:]])).any()
    torch.testing.assert_close(
        gs.PCD()(torch.stack([rows[0], 0 * rows[1], rows[2]])), gs.PCD()(rows[::2])
    )


def test_norms_are_averaged_from_call_to_call(impl):
    rule, beta = gs.PCD(beta=0.75, tau=0.3), 0.75
    calls = [
        signed(gaussian(3, 9)) * 10.0 ** torch.randint(-3, 3, (3, 1)).double() for _ in range(4)
    ]
    for k, rows in enumerate(calls):
        found = rule(rows)
        shares = [beta ** (k - j) for j in range(k + 1)]
        squares = sum(s * c.square().sum(1) for s, c in zip(shares, calls, strict=False))
        scaled = rows / (squares / sum(shares)).sqrt()[:, None]
        # the rows are no longer unit: d by the same rule of rows that it need not scale
        d = serving(scaled, 0.3)
        torch.testing.assert_close(found, d * rows[0].norm() / d.norm(), rtol=1e-9, atol=1e-12)
    # another number of rows begins anew
    assert torch.equal(rule(calls[1][:2]), gs.PCD(beta=0.75, tau=0.3)(calls[1][:2]))


def serving(rows, tau):
    """argmin |d - g_0| with <g_j, d> ≥ tau |g_j|², by Hildreth's sweeps over the conditions."""
    d, x = rows[0].clone(), torch.zeros(len(rows)).double()
    for _ in range(2000):
        for j, row in enumerate(rows[1:], 1):
            step = max(float(tau - row @ d / (row @ row)), -float(x[j]))
            d, x[j] = d + step * row, x[j] + step
    return d


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_groups_have_norms_of_their_own(granularity):
    blocks = [gaussian(3, 6), 1e3 * gaussian(3, 4)]
    rule = gs.PCD(granularity=granularity)
    rule(blocks)
    assert rule.state_dict()["squares"].shape == (2 if granularity == "tensor" else 1, 4)
    if granularity == "tensor":
        for part, block in zip(rule(blocks), blocks, strict=True):
            torch.testing.assert_close(part, gs.PCD()(block))


def test_gradients(impl):
    rows = signed(gaussian(4, 9)).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: gs.PCD().weights(r @ r.mT) @ r, rows, atol=1e-5)


@pytest.mark.parametrize("tau", [0.02, 0.4])
def test_is_torchjds(tau, impl):
    theirs = pytest.importorskip("torchjd.aggregation")
    for m in (1, 2, 3, 5):
        rule, other = gs.PCD(tau=tau), theirs.PCDWeighting(tau=tau, eps=0.0)
        for k in range(5):
            rows = signed(gaussian(m, 9)) * 10.0 ** torch.randint(-2, 3, (m, 1)).double()
            if k == 3 and m > 2:
                rows[-1] = -rows[-2]  # no direction serves both
            gram = rows @ rows.mT
            torch.testing.assert_close(rule.weights(gram), other(gram), rtol=1e-9, atol=1e-12)


def test_refuses_what_makes_no_sense():
    rows = gaussian(3, 5)
    for call, message in (
        (lambda: gs.PCD(tau=1.5), r"tau must be in \[0, 1\], got 1.5"),
        (lambda: gs.PCD(beta=1.0), r"beta must be in \[0, 1\), got 1.0"),
        (lambda: gs.PCD(tau=math.nan), "tau must be a number, got nan"),
        (lambda: gs.PCD(primary=3)(rows), "primary=3 is out of range for 3 rows"),
        (lambda: gs.PCD(primary=0.5), "primary must be a whole number, got 0.5"),
    ):
        with pytest.raises(gs.InputError, match=message):
            call()
