"""gs.diagnose: figures worked by hand, and what it prints and draws."""

import json
import math

import pytest
import torch

import gradsurgery as gs
from tests.inputs import gaussian


def test_three_rows_worked_by_hand():
    rows = torch.tensor([[3.0, 4, 0], [-3, 0, 0], [0, 0, 2]]).double()
    found = gs.diagnose(rows @ rows.mT)
    assert found.norms.tolist() == [5, 3, 2]
    assert found.cosines[0, 1] == pytest.approx(-0.6)
    assert found.conflicts == [("0", "1", pytest.approx(-0.6))]
    assert found.conflict_rate == pytest.approx(1 / 3)
    assert found.rank == 3
    assert found.removed.tolist() == pytest.approx([0.6, 0.6, 0])
    # eigenvalues of the cosines: 1.6, 1, 0.4
    values = [math.sqrt(v) for v in (1.6, 1, 0.4)]
    shares = [v / sum(values) for v in values]
    assert found.effective_rank == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_ranks_do_not_depend_on_scale(scale):
    found = gs.diagnose(torch.eye(5).double() * scale)
    assert (found.rank, found.effective_rank) == (5, pytest.approx(5))
    same = gs.diagnose(torch.ones(4, 4).double() * scale)
    assert (same.rank, same.effective_rank) == (1, pytest.approx(1, abs=1e-6))
    assert same.removed.tolist() == pytest.approx([1] * 4)


def test_zero_rows_and_none():
    found = gs.diagnose(torch.diag(torch.tensor([0.0, 4.0])))
    assert found.norms.tolist() == [0, 2]
    assert (found.rank, found.conflict_rate, found.removed.tolist()) == (1, 0, [0, 0])
    assert gs.diagnose(torch.zeros(2, 2)).effective_rank == 0
    assert gs.diagnose(torch.zeros(0, 0)).rank == 0
    assert "1 rows" in str(gs.diagnose(torch.ones(1, 1)))


def test_a_jacobian_tells_what_would_freeze():
    blocks = {"w": gaussian(4, 9), "b": gaussian(4, 3)}
    jacobian = gs.DenseJacobian(blocks)
    found = gs.diagnose(jacobian, labels=["a", "b", "c", "d"])
    assert found.frozen == ["b"]
    torch.testing.assert_close(found.norms, torch.cat(list(blocks.values()), 1).norm(dim=1))
    assert "1 tensors would freeze: b" in str(found)
    assert all(label in str(found) for label in "abcd")


def test_prints_a_small_table():
    text = str(gs.diagnose(gs.gramian(torch.randn(40, 60))))
    assert text.splitlines()[0].startswith("40 rows, rank 40, effective rank")
    assert len(text.splitlines()) == 19
    assert "... and 24 more rows" in text


def test_logs_as_json():
    found = gs.diagnose(gs.gramian(gaussian(3, 5)))
    logged = json.loads(json.dumps(found.to_dict()))
    assert logged["cosines"] == found.cosines.tolist()
    assert len(logged["conflicts"]) == len(found.conflicts)


def test_draws_the_cosines():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = gaussian(4, 6)
    ax = gs.diagnose(rows @ rows.mT, labels=["p", "q", "r", "s"]).plot()
    assert ax.images[0].get_array().shape == (4, 4)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["p", "q", "r", "s"]
    assert gs.diagnose(rows @ rows.mT).plot(ax) is ax
    pyplot.close("all")


def test_refuses_what_is_no_gramian():
    for given, message in (
        (torch.ones(2, 3, 3), r"rows must be a Gramian \[m, m\], got \[2, 3, 3\]"),
        (torch.ones(2, 3), r"gramian must be \[..., m, m\], got \[2, 3\]"),
        (torch.full((2, 2), float("nan")), "gramian is not finite in row 0"),
    ):
        with pytest.raises(gs.InputError, match=message):
            gs.diagnose(given)
    for no_gramian in (torch.tensor([[1.0, 0], [5, 1]]), torch.tensor([[-1.0]])):
        with pytest.raises(gs.InputError, match="rows must be a Gramian: it is not symmetric"):
            gs.diagnose(no_gramian)
    with pytest.raises(gs.InputError, match="must be a Jacobian or a Gramian, got list"):
        gs.diagnose([[1.0]])
    with pytest.raises(gs.InputError, match="labels has 1 names for 2 rows"):
        gs.diagnose(torch.eye(2), labels=["a"])
