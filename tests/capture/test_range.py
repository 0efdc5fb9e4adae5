"""Rows of norms from 1e-30 to 1e30, in one Jacobian, by every way to their products and sums."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from gradsurgery.capture import paths

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
    """Weights that rules give rows: those of unit rows, and of rows over their squared norms."""
    norms = torch.stack([r.square().sum(1) for r in rows]).sum(0).sqrt()
    signs = torch.linspace(-1, 2, len(norms), dtype=torch.float64)
    some = signs / norms
    yield some
    if norms.max() < 1e3 * norms.min():
        yield some / norms * min(norms.max().item(), 1e30)
        yield signs * 1e30 if norms.max() < 1e6 else signs * 1e-30
    else:
        yield some * norms.min() / norms  # of very different size


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
    for weights in weighings(rows):
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
    jacobian.backward(weights, release=True)
    for p, row in zip(net.parameters(), rows, strict=True):
        sums(p.grad, weights, row)


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
