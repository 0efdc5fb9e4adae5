"""Planes smaller than their tokens, which a GPU holds as rows; here on a CPU that takes its way."""

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.capture import plane
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.uses import MatrixUse

SAMPLES, TOKENS = 6, 40


@pytest.fixture(autouse=True)
def as_a_gpu(monkeypatch):
    monkeypatch.setattr(plane, "FORMED_ON", {"cpu"})


def adapted(dtype):
    """A wide layer, whose planes stay pairs, and two of rank 3, as of LoRA."""
    layers = [nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3, bias=False), nn.Linear(3, 5)]
    return nn.Sequential(*layers).to(dtype)


def losses_of(net, x):
    return net(x).square().mean((1, 2))


@pytest.mark.parametrize("groups", [None, [0, 0, 0, 0, 1, 2], [0, 1, 2, 2, 2, 2]])
def test_gramian_and_update(groups):
    net, x = adapted(torch.float64), torch.randn(SAMPLES, TOKENS, 40, dtype=torch.float64)
    groups = None if groups is None else torch.tensor(groups)
    with gs.tape(net) as tape:
        losses = losses_of(net, x)
    jacobian = tape.jacobian(losses, groups=groups)
    assert [p.plan is None for p in jacobian._planes] == [False, True, True, True, True]

    rows = torch.zeros(jacobian.m, sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    for k, loss in enumerate(losses_of(net, x)):
        grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        rows[k if groups is None else groups[k]] += torch.cat([g.flatten() for g in grads])
    torch.testing.assert_close(jacobian.gramian(), rows @ rows.mT, rtol=1e-11, atol=1e-13)
    per = jacobian.gramian(per="tensor")
    torch.testing.assert_close(per.sum(0), rows @ rows.mT, rtol=1e-11, atol=1e-13)
    weights = torch.linspace(-1, 2, jacobian.m).double()
    jacobian.backward(weights, release=True)
    update = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(update, weights @ rows, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions(transposed):
    """Kernels of fewer values than their images: of the second, which has groups, pairs stay."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    net = nn.Sequential(kind(2, 4, 3, stride=2), nn.Tanh(), kind(4, 4, 3, groups=2, padding=1))
    net, x = net.double(), torch.randn(SAMPLES, 2, 12, 12, dtype=torch.float64)

    def losses_of(x):
        return net(x).square().mean((1, 2, 3))

    with gs.tape(net) as tape:
        losses = losses_of(x)
    jacobian = tape.jacobian(losses, groups=torch.tensor([0, 0, 0, 1, 2, 3]))
    assert [bool(p.rows) for p in jacobian._planes] == [True, True, False, True]
    rows = torch.zeros(4, sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    for k, loss in enumerate(losses_of(x)):
        grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        rows[max(0, k - 2)] += torch.cat([g.flatten() for g in grads])
    torch.testing.assert_close(jacobian.gramian(), rows @ rows.mT, rtol=1e-11, atol=1e-13)
    weights = torch.linspace(-1, 2, 4).double()
    jacobian.backward(weights)
    update = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(update, weights @ rows, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_orthograd_step(dtype):
    """Forget samples whole, retain samples each: as by `combine` of the rows in float64."""
    net, x = adapted(dtype), torch.randn(SAMPLES, TOKENS, 40).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    kept = []
    optimizer.register_step_pre_hook(
        lambda *_: kept.append(torch.cat([p.grad.flatten().double() for p in net.parameters()]))
    )
    gs.Surgeon(net, optimizer, gs.OrthoGrad()).step(forget=x[:3], retain=x[3:], loss=losses_of)
    exact, rows = adapted(torch.float64), []
    exact.load_state_dict(net.state_dict())
    for loss in losses_of(exact, x.double()):
        grads = torch.autograd.grad(loss, list(exact.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    forget, retain = torch.stack(rows[:3]).mean(0), torch.stack(rows[3:])
    c = torch.linalg.solve(retain @ retain.mT, retain @ forget)
    expected = 0.5 * retain.mean(0) - 0.5 * (forget - c @ retain)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert (kept[0] - expected).norm() <= tolerance * expected.norm()


def test_a_plane_larger_than_its_tokens_is_not_formed():
    left, right = torch.randn(2, 3, 40), torch.randn(2, 3, 50)
    use = MatrixUse(left, right, RowNumbers(torch.arange(2)))
    assert plane._formed([use])[0] is use
    # 2 * 4 * 5 values of a plane, 5 tokens of 9
    use = MatrixUse(torch.randn(2, 5, 4), torch.randn(2, 5, 5), use.rows)
    formed = plane._formed([use])[0]
    torch.testing.assert_close(formed.blocks, use.left.mT @ use.right)
