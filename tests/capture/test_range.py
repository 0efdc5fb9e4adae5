"""Rows of norms from 1e-30 to 1e30, in one Jacobian, by every way to their products and sums."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs

SAMPLES, TOKENS = 6, 5
MIXED = (1e-28, 1.0, 1e25, 1e-15, 1e30, 1e-30)
SCALES = {f"{s:.0e}": (s,) * SAMPLES for s in (1e-30, 1e-22, 1e-10, 1e20, 1e30)} | {"mixed": MIXED}
GROUPS = {"apart": None, "summed": [0, 0, 0, 0, 1, 2]}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, ids):
        return torch.tanh(self.body(self.embed(ids))) @ self.embed.weight.mT


def normed():
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))


def halves():
    """One parameter, of which two layers take a part each."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 6))

        def forward(self, x):
            return F.linear(x, self.weight[:4]) * F.linear(x, self.weight[4:]).tanh()

    return Halves()


def tokens(*shape):
    return lambda: torch.randn(SAMPLES, *shape)


def ids():
    return torch.randint(11, (SAMPLES, TOKENS))


LAYERS = {
    "one token": (lambda: nn.Linear(7, 4), tokens(7)),
    "linear": (lambda: nn.Linear(7, 4, bias=False), tokens(TOKENS, 7)),
    "wide": (lambda: nn.Linear(9000, 2), tokens(2, 9000)),  # few, for torch itself
    "convolution": (lambda: nn.Conv2d(2, 3, 3), tokens(2, 5, 5)),
    "grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), tokens(4, 7)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 2, 3), tokens(3, 4)),
    "embedding": (lambda: nn.Embedding(11, 4), ids),
    "tied": (Tied, ids),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 3)), tokens(TOKENS, 7)),
    "derived": (normed, tokens(TOKENS, 6)),
    "halves": (halves, tokens(TOKENS, 6)),
}


def made(layer, dtype=torch.float32):
    torch.manual_seed(3)
    build, draw = LAYERS[layer]
    x = draw()
    return build().to(dtype), x.to(dtype) if x.is_floating_point() else x


def losses_of(net, x, scales):
    """[SAMPLES], each of about the given size, and so its gradient."""
    out = net(x)
    size = torch.tensor(scales, dtype=torch.float64).to(out.dtype)
    return ((out - 0.3).square().flatten(1).mean(1)) * size


def rows_of(net, losses, groups=None):
    """[m, p.numel()] of each parameter, in float64."""
    groups = list(range(len(losses))) if groups is None else groups
    rows = [torch.zeros(max(groups) + 1, p.numel(), dtype=torch.float64) for p in net.parameters()]
    for row, loss in zip(groups, losses, strict=True):
        grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        for total, grad in zip(rows, grads, strict=True):
            total[row] += grad.double().flatten()
    return rows


def captured(net, losses, groups=None, **options):
    with gs.tape(net) as tape:
        value = losses(net)
    groups = None if groups is None else torch.tensor(groups)
    return tape.jacobian(value, groups=groups, **options)


def agrees(gram, rows, tolerance=2e-5):
    """Relative to the norms of the rows, each of them."""
    exact = rows @ rows.mT
    norms = exact.diagonal().sqrt()
    assert (norms > 0).all()
    error = ((gram - exact) / torch.outer(norms, norms)).abs().max()
    assert error <= tolerance, error.item()


def sums(update, weights, rows, tolerance=2e-5):
    size = (weights.abs()[:, None] * rows).norm(dim=1).sum()
    error = (update.double().flatten() - weights @ rows).norm() / size
    assert error <= tolerance, error.item()


def weighings(rows):
    """Weights that rules give rows: of unit rows, and of rows over their squared norms."""
    norms = torch.cat(rows, 1).norm(dim=1)
    signs = torch.linspace(-1, 2, len(norms), dtype=torch.float64)
    yield signs / norms
    yield signs / norms**2


@pytest.mark.parametrize("path", ["", "factored", "direct"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("layer", LAYERS)
def test_gramian_and_update(layer, scales, groups, path, monkeypatch):
    monkeypatch.setenv("GRADSURGERY_PATH", path)
    net, x = made(layer)
    jacobian = captured(net, lambda net: losses_of(net, x, scales), groups)
    exact = copy.deepcopy(net).double()
    rows = rows_of(
        exact, losses_of(exact, x.double() if x.is_floating_point() else x, scales), groups
    )
    for gram, row in zip(jacobian.gramian(per="tensor"), rows, strict=True):
        agrees(gram, row)
    agrees(jacobian.gramian(), torch.cat(rows, 1))
    every = list(weighings(rows))
    for weights in every:
        for update, row in zip(jacobian.combine(weights), rows, strict=True):
            sums(update, weights, row)
    for vectors in ([torch.randn_like(p) for p in net.parameters()],):
        for size in (1e-30, 1e30):
            products = jacobian.products([size * v for v in vectors])
            for found, v, row in zip(products, vectors, rows, strict=True):
                want = row @ v.double().flatten() * size
                assert (
                    (found - want) / (row.norm(dim=1) * v.double().norm() * size)
                ).abs().max() <= 2e-5
    for p in net.parameters():
        p.grad = None
    jacobian.backward(every[-1], release=True)
    for p, row in zip(net.parameters(), rows, strict=True):
        sums(p.grad, every[-1], row)


LINEAR = {
    "one token": (lambda: nn.Linear(7, 4, bias=False), (1, 7)),
    "linear": (lambda: nn.Linear(7, 4, bias=False), (TOKENS, 7)),
    "few": (lambda: nn.Linear(9000, 2, bias=False), (2, 9000)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 5, 5)),
    "grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False), (4, 7)),
}
# of the samples' inputs; gradients of outputs make up for them
SIDES = {
    "small inputs": (1e-25,) * SAMPLES,
    "large inputs": (1e20,) * SAMPLES,
    "some small": (1, 1e-21, 1, 1e-12, 1e-30, 1),
    "some large": (1, 1e21, 1, 1e12, 1e22, 1),
    "both": (1e-30, 1e22, 1, 1e-12, 1e20, 1e15),
}


def both_sides(layer, inputs, sizes, groups=None):
    """Inputs of some sizes, and gradients of outputs that make rows of other sizes of them.

    Either as [SAMPLES, 1] or [1, tokens].
    """
    torch.manual_seed(3)
    build, shape = LINEAR[layer]
    net, x = build(), torch.randn(SAMPLES, *shape)
    inputs, sizes = (
        torch.tensor(each, dtype=torch.float64).reshape(*len_of(each), *[1] * (x.dim() - 2))
        for each in (inputs, sizes)
    )
    back = torch.randn(net(x).shape) * sizes / inputs
    x, back = (x * inputs).float(), back.float()

    def losses(net, x=x, back=back):
        return (net(x) * back).flatten(1).sum(1)

    jacobian = captured(net, losses, groups)
    exact = copy.deepcopy(net).double()
    (row,) = rows_of(exact, losses(exact, x.double(), back.double()), groups)
    agrees(jacobian.gramian(), row)
    weights = torch.linspace(-1, 2, len(row), dtype=torch.float64)
    for some in (weights, weights / row.norm(dim=1), weights * 1e-12, weights * 1e9):
        sums(jacobian.combine(some)[0], some, row)


def len_of(sizes):
    return (-1, 1) if isinstance(sizes, tuple) else (1, -1)


@pytest.mark.parametrize("path", ["factored", "direct"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e6])
@pytest.mark.parametrize("inputs", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("layer", LINEAR)
def test_sides_of_any_size(layer, inputs, size, groups, path, monkeypatch):
    monkeypatch.setenv("GRADSURGERY_PATH", path)
    both_sides(layer, inputs, (size,) * SAMPLES, groups)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("small", [1e-25, 1e-22, 1e18, 1e25])
def test_a_token_whose_sides_are_of_other_sizes(small, groups, impl, monkeypatch):
    # what it adds is most of the row, and would be lost beside others in range
    monkeypatch.setenv("GRADSURGERY_PATH", "factored")
    both_sides("linear", [small, 1, 1, 1, 1], [1e-5, 1e-8, 1e-8, 1e-8, 1e-8], groups)
    both_sides("few", [small, 1], [1e-5, 1e-8], groups)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("scales", [MIXED, (1e-30,) * SAMPLES, (1e30,) * SAMPLES])
@pytest.mark.parametrize("layer", ["one token", "linear", "convolution", "tied", "derived"])
def test_by_a_backward_pass(layer, scales, groups):
    net, x = made(layer)
    x64 = x.double() if x.is_floating_point() else x
    jacobian = captured(net, lambda net: losses_of(net, x, scales), groups, combine="backward")
    exact = copy.deepcopy(net).double()
    rows = rows_of(exact, losses_of(exact, x64, scales), groups)
    agrees(jacobian.gramian(), torch.cat(rows, 1))
    for weights in weighings(rows):
        net.zero_grad()
        jacobian.backward(weights)
        for update, p, row in zip(jacobian.combine(weights), net.parameters(), rows, strict=True):
            sums(update, weights, row)
            sums(p.grad, weights, row)


@pytest.mark.parametrize("path", ["factored", "direct"])
@pytest.mark.parametrize("layer", LAYERS)
def test_bfloat16(layer, path, monkeypatch):
    monkeypatch.setenv("GRADSURGERY_PATH", path)
    net, x = made(layer, torch.bfloat16)
    ones = captured(net, lambda net: losses_of(net, x, (1.0,) * SAMPLES)).gramian()
    powers = torch.tensor([-100, 0, 83, -50, 99, -98.0])
    scales = powers.exp2().tolist()
    jacobian = captured(net, lambda net: losses_of(net, x, scales))
    scale = powers.double().exp2()
    gram = jacobian.gramian() / torch.outer(scale, scale)
    # scaled exactly, in the graph too, so that they round alike
    norms = ones.diagonal().sqrt()
    assert ((gram - ones) / torch.outer(norms, norms)).abs().max() <= 1e-4
    weights = torch.linspace(-1, 2, SAMPLES, dtype=torch.float64)
    plain = captured(net, lambda net: losses_of(net, x, (1.0,) * SAMPLES)).combine(weights)
    for one, other in zip(jacobian.combine(weights / scale), plain, strict=True):
        assert (one - other).float().norm() <= 1e-2 * other.float().norm()


@pytest.mark.parametrize("path", ["factored", "direct"])
@pytest.mark.parametrize("layer", ["one token", "linear", "convolution", "embedding"])
def test_float16(layer, path, monkeypatch):
    """As far as its gradients go: those of outputs are 6e-8 at least, and whole powers of two."""
    monkeypatch.setenv("GRADSURGERY_PATH", path)
    net, x = made(layer, torch.float16)
    grams, updates = [], []
    weights = torch.linspace(-1, 2, SAMPLES, dtype=torch.float64)
    back = torch.randint(1, 4, net(x).shape).half()
    for scale in (1.0, 2.0**-20):
        jacobian = captured(net, lambda net, s=scale: (net(x) * back * s).flatten(1).sum(1).float())
        grams.append(jacobian.gramian() / scale**2)
        updates.append(jacobian.combine(weights * 1e30 / scale / 1e30))
    norms = grams[0].diagonal().sqrt()
    assert ((grams[1] - grams[0]) / torch.outer(norms, norms)).abs().max() <= 2e-3
    for one, other in zip(*updates, strict=True):
        assert (one - other).float().norm() <= 1e-2 * other.float().norm()


def test_derived_rows_in_float16():
    # whose entries it would not hold, while the parameters' rows are float32
    net, x = made("derived", torch.float16)
    exact = copy.deepcopy(net).double()
    back = torch.randint(1, 4, net(x).shape).half() * 2.0**-22
    jacobian = captured(net, lambda net: (net(x) * back).flatten(1).sum(1).float())
    rows = rows_of(exact, (exact(x.double()) * back.double()).flatten(1).sum(1))
    for gram, row in zip(jacobian.gramian(per="tensor"), rows, strict=True):
        agrees(gram, row, 2e-2)


def test_float64():
    net, x = made("linear", torch.float64)
    for scales in ((1e-150,) * SAMPLES, (1e-100, 1, 1e100, 1e-120, 1e120, 1e60)):
        jacobian = captured(net, lambda net, s=scales: losses_of(net, x, s))
        (row,) = rows_of(net, losses_of(net, x, scales))
        agrees(jacobian.gramian(), row, 1e-12)
        weights = 1 / row.norm(dim=1)
        sums(jacobian.combine(weights)[0], weights, row, 1e-12)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("scales", [MIXED, (1e-30,) * SAMPLES, (1e30,) * SAMPLES])
@pytest.mark.parametrize("layer", ["one token", "linear", "convolution", "tied", "derived"])
def test_metric(layer, scales, groups):
    net, x = made(layer)
    x64 = x.double() if x.is_floating_point() else x
    jacobian = captured(net, lambda net: losses_of(net, x, scales), groups)
    exact = copy.deepcopy(net).double()
    rows = rows_of(exact, losses_of(exact, x64, scales), groups)
    size = 1e-24 if max(scales) < 1 else 1e8
    metric = [size * (1 + torch.rand_like(p)) for p in net.parameters()]
    roots = [m.double().sqrt().flatten() for m in metric]
    scaled = torch.cat([row * root for row, root in zip(rows, roots, strict=True)], 1)
    agrees(jacobian.gramian(metric=metric), scaled)


@pytest.mark.parametrize("where", ["zero", "masked"])
def test_rows_of_zeros_are_not_computed_again(where, monkeypatch):
    net, x = made("linear")
    x[2] = 0 if where == "zero" else x[2]
    size = torch.ones(SAMPLES)
    size[2] = 0 if where == "masked" else 1
    jacobian = captured(net, lambda net: net(x).flatten(1).sum(1) * size)
    monkeypatch.setattr(
        "gradsurgery.capture.uses.Use.double", lambda use: pytest.fail("computed in float64")
    )
    gram = jacobian.gramian()
    assert gram[2].eq(0).all()
    assert gram.diagonal()[[0, 1, 3, 4, 5]].gt(0).all()
    jacobian.combine(torch.tensor([1.0, 2.0, 1e9, 3.0, 1e-9, 0.0]))


def test_losses_of_a_row_may_sum_beyond_their_dtype():
    net = nn.Linear(3, 2, bias=False).half()
    x = torch.randn(4, 3).half()
    with gs.tape(net) as tape:
        losses = net(x).sum(1) + 4e4
    jacobian = tape.jacobian(losses, groups=torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(
        jacobian.losses, torch.stack([losses[:3].double().sum(), losses[3].double()]).detach()
    )
    rows = torch.stack([x[:3].double().sum(0), x[3].double()])
    torch.testing.assert_close(jacobian.gramian(), 2 * rows @ rows.mT, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("times", [0.0, 1.0], ids=["nan", "inf"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("path", ["factored", "direct"])
def test_what_is_not_finite_is_refused_by_name(times, groups, path, monkeypatch):
    monkeypatch.setenv("GRADSURGERY_PATH", path)
    net, x = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False)), torch.randn(6, 3, 5)
    with gs.tape(net) as tape:
        out, mine = net(x).flatten(1).sum(1), torch.arange(6) == 4
        # of a root's 0, times 0 or not
        losses = (out - out.detach() + ~mine).sqrt() * torch.where(mine, times, 1)
    jacobian = tape.jacobian(losses, groups=None if groups is None else torch.tensor(groups))
    row = 4 if groups is None else 1
    with pytest.raises(
        gs.NonFiniteError, match=f"row {row} is not finite: its gradient of 0.weight"
    ):
        jacobian.gramian()


@pytest.mark.parametrize("margin", [20, 40, 55, 65])
def test_a_sample_of_large_margin_is_protected(margin):
    torch.manual_seed(0)
    net, x = nn.Linear(64, 8, bias=False), torch.randn(3, 64)
    with torch.no_grad():
        net.weight.zero_()
        net.weight[0] = x[0] / x[0].square().sum() * margin
        net.weight[1:] += 0.01 * torch.randn(7, 64)
    retain, forget = (x[:2], torch.tensor([0, 3])), (x[2:] + 0.3 * x[:1], torch.tensor([5]))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    (own,) = torch.autograd.grad(loss(net, (x[:1], torch.tensor([0]))).sum(), net.weight)
    before = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    info = gs.Surgeon(net, optimizer, gs.OrthoGrad(alpha=0.0), rows="captured").step(
        forget=forget, retain=retain, loss=loss
    )
    step = (before - net.weight.detach()).double()
    assert info.rank == 2
    assert abs((step * own.double()).sum() / step.norm() / own.double().norm()) <= 1e-5
