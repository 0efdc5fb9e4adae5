"""Parameters that only a summed row reaches, or samples of no row, or nothing at all."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from gradsurgery.capture.plane import Plane
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.uses import EmbeddingUse, MatrixUse
from tests.capture.oracle import agrees, loop

X = torch.randn(4, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[0, 1], [2, 3], [3, 1]])


class Net(nn.Module):
    """`reach` takes the first three samples through some of the parameters."""

    def __init__(self, reach, tail):
        super().__init__()
        self.reach, self.tail = reach, tail
        self.emb, self.lin, self.out = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.a, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def losses(self):
        first = self.out(torch.tanh(self.reach(self))).square().sum(1)
        return torch.cat([first, self.out(X[3, : self.tail]).square().sum(1)])


REACH = {
    "embedding": lambda n: n.emb(IDS).sum(1),
    "bag": lambda n: F.embedding_bag(IDS, n.emb.weight, mode="sum"),
    "padded": lambda n: F.embedding(0 * IDS, n.emb.weight, padding_idx=0).sum(1),
    "tied": lambda n: n.emb(IDS).sum(1) @ n.emb.weight.T @ n.emb.weight,
    "linear": lambda n: n.lin(X[:3]).sum(1),
    "used twice": lambda n: n.lin(torch.tanh(n.lin(X[:3]))).sum(1),
    "convolution": lambda n: n.conv(X[:3].mT).sum(2),
    "scalar": lambda n: n.scale * X[:3].sum(1),
    "sum": lambda n: (X[:3] @ (n.a + n.b)).sum(1),
    "some rows": lambda n: (X[:3] @ n.lin.weight[:2].T).sum(1).repeat(1, 2),
    "no tokens": lambda n: n.lin(X[:3, :0]).sum(1) + n.emb(IDS[:, :0]).sum(1),
}
GROUPS = {
    "summed row and no row": [2, 2, -1, 1],
    "no row": [-1, -1, -1, 0],
    "summed row": [0, 0, 0, 1],
    "one sample of many": [-1, 1, -1, -1],
    "empty rows between": [5, 5, -1, 2],
}


@pytest.mark.parametrize("path", ["", "factored", "direct"])
@pytest.mark.parametrize("reach", REACH)
def test_rows_are_exact(reach, path, monkeypatch):
    if path:
        monkeypatch.setenv("GRADSURGERY_PATH", path)
    for name, groups in GROUPS.items():
        for tail in (3,) if path else (1, 3):
            model = Net(REACH[reach], tail).double()
            rows = torch.tensor(groups + groups[-1:] * (tail - 1))
            jacobian = agrees(model, model.losses, groups=rows)
            metric = [torch.rand_like(p) for p in model.parameters()]
            exact = loop(model.losses(), model, rows)
            both = zip(exact, metric, strict=True)
            pairs = [(r.reshape(jacobian.m, -1), w) for r, w in both if r is not None]
            gram = sum((r * w.flatten()) @ r.T for r, w in pairs)
            error = (jacobian.gramian(metric=metric) - gram).abs().max()
            assert error <= 1e-10 * gram.abs().max(), name
            products = sum(r @ w.flatten() for r, w in pairs)
            error = (jacobian.products(metric).sum(0) - products).abs().max()
            assert error <= 1e-10 * products.abs().max(), name


@pytest.mark.parametrize("path", ["", "factored", "direct"])
def test_all_samples_may_belong_to_no_row(path, monkeypatch):
    if path:
        monkeypatch.setenv("GRADSURGERY_PATH", path)
    for reach in REACH.values():
        model = Net(reach, 1).double()
        with gs.tape(model) as tape:
            losses = model.losses()
        jacobian = tape.jacobian(losses, torch.full((4,), -1))
        assert jacobian.m == 0
        assert jacobian.gramian().shape == (0, 0)
        assert jacobian.materialize().shape == (0, sum(jacobian.sizes))
        assert not any(update.any() for update in jacobian.combine(torch.zeros(0)))
        jacobian.backward(torch.zeros(0))
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("path", ["", "factored", "direct"])
@pytest.mark.parametrize("group", [None, 0])
def test_a_use_of_no_blocks_has_no_products(path, group, monkeypatch):
    if path:
        monkeypatch.setenv("GRADSURGERY_PATH", path)
    parameter, none = nn.Parameter(torch.randn(3, 4)), RowNumbers(torch.zeros(0, dtype=torch.int64))
    for use in (
        MatrixUse(torch.zeros(0, 2, 3), torch.zeros(0, 2, 4), none),
        EmbeddingUse(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, 4), none, 3),
    ):
        plane = Plane(parameter, [use], group)
        for metric in (None, torch.ones(3, 4)):
            gram = plane.gramian(2, metric)
            assert gram.tolist() == [[0, 0], [0, 0]]
            assert gram.dtype == torch.float64
        assert not plane.update(torch.ones(2), False, False).any()


class Empty(nn.Module):
    """Parameters without values beside one that has some."""

    def __init__(self):
        super().__init__()
        self.w, self.none = nn.Linear(4, 4), nn.Linear(4, 1)
        self.none.weight = nn.Parameter(torch.zeros(0, 4))
        self.none.bias = nn.Parameter(torch.zeros(0))
        self.wide = nn.Parameter(torch.zeros(4, 0))

    def forward(self, x):
        h = torch.tanh(self.w(x))
        return h.square().sum(1) + self.none(h).sum(1) + (h[:, :0] @ self.wide.T).sum(1)


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 2], [0, 0, 0, 0], [2, 2, -1, 0]])
@pytest.mark.parametrize("path", ["", "factored", "direct"])
@pytest.mark.parametrize("combine", ["stored", "backward"])
def test_parameters_without_values(groups, path, combine, monkeypatch):
    if path:
        monkeypatch.setenv("GRADSURGERY_PATH", path)
    model = Empty().double()
    with gs.tape(model) as tape:
        losses = model(X[:, 0])
    rows = None if groups is None else torch.tensor(groups)
    exact = loop(losses, model, rows)
    jacobian = tape.jacobian(losses, rows, combine=combine)
    gram = sum(r.reshape(jacobian.m, -1) @ r.reshape(jacobian.m, -1).T for r in exact)
    torch.testing.assert_close(jacobian.gramian(), gram, rtol=1e-10, atol=1e-12)
    assert jacobian.gramian(per="tensor").shape == (5, jacobian.m, jacobian.m)
    weights = torch.linspace(-1, 2, jacobian.m, dtype=torch.float64)
    update = jacobian.combine(weights)
    jacobian.backward(weights)
    for p, part, block in zip(model.parameters(), update, exact, strict=True):
        want = (weights @ block.reshape(jacobian.m, -1)).view_as(p)
        torch.testing.assert_close(part, want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(p.grad, want, rtol=1e-10, atol=1e-12)
