"""Krum: the definition by loops, distances of rows as they are, and outliers that it leaves out."""

import pytest
import torch

import gradsurgery as gs
from tests.inputs import gaussian


def by_loops(rows, n_byzantine, n_selected):
    scores = []
    for i, row in enumerate(rows):
        away = sorted(float((row - other).square().sum()) for j, other in enumerate(rows) if j != i)
        scores.append(sum(away[: len(rows) - n_byzantine - 2]))
    best = sorted(range(len(rows)), key=scores.__getitem__)[:n_selected]
    return rows[best].mean(0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("n_byzantine,n_selected", [(0, 1), (1, 3), (2, 7), (4, 2)])
def test_is_its_definition(n_byzantine, n_selected, scale, impl):
    rule = gs.Krum(n_byzantine=n_byzantine, n_selected=n_selected)
    for _ in range(20):
        rows = scale * gaussian(7, 9)
        expected = by_loops(rows, n_byzantine, n_selected)
        assert (rule(rows) - expected).norm() <= 1e-12 * expected.norm()


def test_distances_are_squared():
    """The first is 3 and 3 from its nearest two: 6, squared 18. The fifth is 0.1 and 4.5: 4.6, and
    squared 20.26. All others have more."""
    points = [[0, 0], [3, 0], [0, 3], [100, 0], [100.1, 0], [104.6, 0]]
    rows = torch.tensor(points, dtype=torch.float64)
    assert gs.Krum(n_byzantine=2).weights(rows @ rows.mT).tolist() == [1, 0, 0, 0, 0, 0]


def test_rows_that_are_anything_are_left_out(impl):
    honest = 1 + 0.1 * gaussian(5, 9)
    for wrong in (1e9 * gaussian(2, 9), -100 * honest[:2], torch.zeros(2, 9).double()):
        rows = torch.cat([wrong, honest])
        weights = gs.Krum(n_byzantine=2, n_selected=3).weights(rows @ rows.mT)
        assert weights[:2].tolist() == [0, 0]
        assert sorted(weights[2:].tolist()) == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])


def test_of_equal_scores_the_earlier_row():
    rows = torch.eye(5).double()
    assert gs.Krum(n_byzantine=1).weights(rows @ rows.mT).tolist() == [1, 0, 0, 0, 0]
    update = gs.Krum(n_byzantine=1, n_selected=2)(rows)
    assert update.tolist() == [0.5, 0.5, 0, 0, 0]


def test_refuses_what_makes_no_sense():
    rows = gaussian(4, 5)
    for call, message in (
        (lambda: gs.Krum(n_byzantine=-1), "n_byzantine must be 0 or more, got -1"),
        (lambda: gs.Krum(n_byzantine=0, n_selected=0), "n_selected must be 1 or more, got 0"),
        (
            lambda: gs.Krum(n_byzantine=2)(rows),
            "Krum needs 5 rows or more for n_byzantine=2, got 4",
        ),
        (
            lambda: gs.Krum(n_byzantine=0, n_selected=5)(rows),
            "n_selected must be at most the number of rows, 4, got 5",
        ),
    ):
        with pytest.raises(gs.InputError, match=message):
            call()
