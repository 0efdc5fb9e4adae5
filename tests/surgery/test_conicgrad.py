"""ConicGrad: against CAGrad's path, all directions of a plane, and random ones of a cone."""

import math

import pytest
import torch

import gradsurgery as gs
from tests.inputs import CONFLICTS, gaussian, half_space, signed
from tests.surgery.properties import relative


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def test_is_worked_by_hand(impl):
    """(1, 0) and (0, 3): g₀ = (1/2, 3/2), at 71.57 degrees, and MGDA's direction (3, 1) at 18.43.

    Between them min(x, 3 y) grows. cos 60 reaches past it; cos 25 only to 46.57 degrees.
    """
    rows = torch.tensor([[1.0, 0], [0, 3]], dtype=torch.float64)
    length, angle = math.sqrt(2.5), math.atan2(3, 1)
    for c, at in (
        (math.cos(math.radians(60)), math.atan2(1, 3)),
        (math.cos(math.radians(25)), angle - math.radians(25)),
        (1.0, angle),
    ):
        expected = length * torch.tensor([math.cos(at), math.sin(at)], dtype=torch.float64)
        torch.testing.assert_close(gs.ConicGrad(c=c)(rows), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("m", [2, 3, 6])
def test_is_of_all_directions_of_a_plane_the_best(m, impl):
    for c in (0.0, 0.4, 0.9):
        rows = half_space(m, 2) * 10 ** torch.randn(m, 1).double()
        g0 = rows.mean(0)
        turn = torch.linspace(-1, 1, 200_001).double() * math.acos(c)
        at = math.atan2(g0[1], g0[0]) + turn
        worst = (rows @ torch.stack([at.cos(), at.sin()])).amin(0)
        update = gs.ConicGrad(c=c)(rows)
        found = float((rows @ update).min() / update.norm())
        assert found == pytest.approx(float(worst.max()), rel=1e-4, abs=1e-9)
        assert cosine(update, g0) >= c - 1e-12
        assert update.norm() == pytest.approx(float(g0.norm()))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_is_on_the_path_of_cagrad(scale, impl):
    for radius in (0.05, 0.4, 1.0, 1.5):
        rows = scale * signed(gaussian(4, 9))
        expected = gs.CAGrad(c=radius)(rows)
        g0 = rows.mean(0)
        update = gs.ConicGrad(c=cosine(expected, g0))(rows)
        assert relative(update, expected / expected.norm() * g0.norm()) <= 1e-7


@pytest.mark.parametrize(
    "family", ["conflicting", "alike", "condition 1e4", "duplicate", "graded", "unequal"]
)
def test_no_direction_of_the_cone_is_better(family, impl):
    for c in (0.2, 0.8):
        rows = CONFLICTS[family](5, 40)
        update = gs.ConicGrad(c=c)(rows)
        g0 = rows.mean(0)
        axis, best = g0 / g0.norm(), update / update.norm()
        assert cosine(update, g0) >= c - 1e-9
        _, values, basis = torch.linalg.svd(rows, full_matrices=False)
        basis = basis[values > 1e-9 * values[0]]
        for sigma in (1.0, 1e-1, 1e-2, 1e-3):
            tried = best + sigma * torch.randn(2000, len(basis)).double() @ basis
            along = tried @ axis
            off = tried - along[:, None] * axis
            away = off.norm(dim=1)
            edge = c * axis + math.sqrt(1 - c * c) * off / away[:, None]
            outside = c * away > math.sqrt(1 - c * c) * along
            tried = torch.where(outside[:, None], edge, tried / tried.norm(dim=1, keepdim=True))
            rounding = 1e-6 * float(rows.norm(dim=1).min()) + 1e-15 * float(rows.norm())
            assert float((tried @ rows.mT).amin(1).max() - (rows @ best).min()) <= rounding


def test_is_mgda_if_that_is_inside(impl):
    rows = half_space(4, 9).abs()
    expected = gs.MGDA()(rows)
    g0 = rows.mean(0)
    update = gs.ConicGrad(c=cosine(expected, g0) - 1e-6)(rows)
    torch.testing.assert_close(update, expected / expected.norm() * g0.norm())
    torch.testing.assert_close(gs.ConicGrad(c=1.0)(rows), g0)


def test_rows_that_cancel_leave_a_direction_in_the_cone(impl):
    a, b = gaussian(2, 9)
    for rows in (torch.stack([a, -2 * a]), torch.stack([a, b, -a - 2 * b])):
        for c in (0.1, 0.9):
            update = gs.ConicGrad(c=c)(rows)
            assert update.norm() == pytest.approx(float(rows.mean(0).norm()))
            assert cosine(update, rows.mean(0)) >= c - 1e-9
    assert not gs.ConicGrad()(torch.stack([a, -a])).any()  # no mean, no cone
    assert not gs.ConicGrad()(torch.zeros(3, 9)).any()
    zero = torch.stack([a, b, 0 * a])
    assert cosine(gs.ConicGrad(c=0.0)(zero), gs.MGDA()(zero[:2])) == pytest.approx(1)


def test_refuses_what_makes_no_sense():
    for c in (-0.1, 1.1):
        with pytest.raises(gs.InputError, match=rf"c must be in \[0, 1\], got {c}"):
            gs.ConicGrad(c=c)
