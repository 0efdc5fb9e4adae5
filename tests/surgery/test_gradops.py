"""GradOPS: against its definition by QR, where rows conflict, depend on each other, or neither."""

import pytest
import torch

import gradsurgery as gs
from tests.inputs import CONFLICTS, gaussian, signed


def by_qr(rows, weights=None):
    """The definition on rows of full rank, without a Gramian to solve."""
    parts = []
    for i, row in enumerate(rows):
        others = torch.cat([rows[:i], rows[i + 1 :]])
        if bool((others @ row < 0).any()):
            q = torch.linalg.qr(others.mT).Q
            row = row - q @ (q.mT @ row)
        parts.append(row)
    return (torch.ones(len(rows)).double() if weights is None else weights) @ torch.stack(parts)


@pytest.mark.parametrize("family", ["conflicting", "alike", "condition 1e4", "graded", "tiny"])
@pytest.mark.parametrize("m,n", [(2, 9), (5, 40), (6, 6)])
def test_is_its_definition(family, m, n, impl):
    for _ in range(5):
        rows = CONFLICTS[family](m, n)
        expected = by_qr(rows)
        assert (gs.GradOPS()(rows) - expected).norm() <= 1e-7 * expected.norm()


def test_is_worked_by_hand(impl):
    """(1, -1) conflicts with (0, 1), not with (1, 0); (0, 1) with (1, -1); (1, 0) with none.

    In three columns: a = (1, -1, 0), b = (0, 1, 0), c = (1, 0, 1). a is kept off span{b, c}, whose
    normal is (1, 0, -1): (1/2, 0, -1/2). b off span{a, c}, of normal (1, 1, -1): (1, 1, -1) / 3. c
    as it is.
    """
    rows = torch.tensor([[1.0, -1, 0], [0, 1, 0], [1, 0, 1]]).double()
    a, b = torch.tensor([1, 0, -1]).double() / 2, torch.tensor([1, 1, -1]).double() / 3
    torch.testing.assert_close(gs.GradOPS()(rows), a + b + rows[2], rtol=0, atol=1e-14)
    update = gs.GradOPS(preference=[2.0, 0.0, 0.5])(rows)
    torch.testing.assert_close(update, 2 * a + rows[2] / 2, rtol=0, atol=1e-14)


def test_rows_without_conflict_are_summed(impl):
    rows = gaussian(4, 9).abs()
    assert torch.equal(gs.GradOPS().weights(rows @ rows.mT), torch.ones(4).double())
    at_right_angles = torch.linalg.qr(gaussian(60, 8)).Q.mT  # but for rounding
    weights = gs.GradOPS().weights(at_right_angles @ at_right_angles.mT)
    assert torch.equal(weights, torch.ones(8).double())


def test_a_row_in_the_span_of_the_others_gives_nothing(impl):
    a, b = torch.tensor([1.0, 0.0]).double(), torch.tensor([-1.0, 1.0]).double()
    # both a's conflict with b, and each is in the span of the other
    torch.testing.assert_close(
        gs.GradOPS()(torch.stack([a, 2 * a, b])), torch.tensor([0, 1.0]).double()
    )
    zero = torch.zeros(2).double()
    torch.testing.assert_close(
        gs.GradOPS()(torch.stack([a, zero, b])), gs.GradOPS()(torch.stack([a, b]))
    )
    for scale in (1e-9, 1.0, 1e9):
        rows = scale * signed(gaussian(7, 3))  # more rows than columns, and conflicts of all
        assert not gs.GradOPS()(rows).any()


def test_refuses_what_makes_no_sense():
    rows = gaussian(3, 5)
    with pytest.raises(gs.InputError, match="preference must have 3 entries, one per row, got 1"):
        gs.GradOPS(preference=[1.0])(rows)
    with pytest.raises(gs.InputError, match="preference must be 0 or more"):
        gs.GradOPS(preference=[1.0, -1.0, 0.0])
