"""Gradients through a tuning step, against closed forms and finite differences."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradsurgery.errors import InputError
from gradsurgery.unlearn.methods.ltu import meta
from gradsurgery.unlearn.methods.ltu.meta import meta_gradient


class Point(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.at = nn.Parameter(start.clone())


def quadratic(matrix, offset):
    return lambda model: 0.5 * model.at @ matrix @ model.at - offset @ model.at


def symmetric(n):
    root = torch.randn(n, n, dtype=torch.float64)
    return root @ root.mT


@pytest.fixture
def bowls():
    """L(t) = t'At/2 - b't and M(t) = t'Ct/2 - d't."""
    a, c = symmetric(5), symmetric(5)
    b, d, start = torch.randn(3, 5, dtype=torch.float64)
    return Point(start), (a, b), (c, d)


@pytest.mark.parametrize("rate", [0.0, 0.03, 0.7])
def test_both_orders_on_a_quadratic_by_hand(bowls, rate):
    model, (a, b), (c, d) = bowls
    t = model.at.detach().clone()
    g = a @ t - b
    tuned = t - rate * g
    v = c @ tuned - d
    expected = {"first": g + v, "second": g + v - rate * a @ v}
    tune, test = [quadratic(a, b)], [quadratic(c, d)]
    for order, gradient in expected.items():
        (found,), before, after = meta_gradient(model, tune, test, rate, order=order)
        torch.testing.assert_close(found, gradient)
        torch.testing.assert_close(before, tune[0](Point(t)).detach())
        torch.testing.assert_close(after, test[0](Point(tuned)).detach())
    assert torch.equal(model.at, t)
    assert model.at.grad is None


@pytest.mark.parametrize("queries", [1, 3, 5])
@pytest.mark.parametrize("weight", [0.0, 0.4, 5.0])
def test_several_query_sets_on_a_quadratic_by_hand(bowls, queries, weight):
    """g + w (I - a A) mean_i (C_i t' - d_i) at t' = t - a g."""
    model, (a, b), _ = bowls
    others = [(symmetric(5), torch.randn(5, dtype=torch.float64)) for _ in range(queries)]
    t, rate = model.at.detach().clone(), 0.3
    g = a @ t - b
    tuned = t - rate * g
    v = sum((c @ tuned - d for c, d in others), torch.zeros(5, dtype=torch.float64)) / queries
    expected = {"first": g + weight * v, "second": g + weight * (v - rate * a @ v)}
    test = [quadratic(c / queries, d / queries) for c, d in others]
    for order, gradient in expected.items():
        (found,), _, after = meta_gradient(
            model, [quadratic(a, b)], test, rate, weight=weight, order=order
        )
        torch.testing.assert_close(found, gradient, rtol=1e-14, atol=1e-14 * float(g.norm()))
        torch.testing.assert_close(after, sum(one(Point(tuned)).detach() for one in test))


def test_one_dimension_by_hand():
    """L = t^2, M = 3 t, at t = 2 with a = 1/4: the tuned point is 1, g = 4, v = 3, H = 2."""
    model = Point(torch.tensor([2.0]))
    tune = [lambda m: (m.at**2).sum()]
    test = [lambda m: 3 * m.at.sum()]
    (second,), _, after = meta_gradient(model, tune, test, 0.25)
    (first,), _, _ = meta_gradient(model, tune, test, 0.25, order="first")
    assert (first.item(), second.item(), after.item()) == (7.0, 5.5, 3.0)


def net_and_losses():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))

    def parts(rows, of):
        size = len(rows)
        return [
            lambda m, at=at: nn.functional.cross_entropy(m(x[at]), y[at], reduction="sum") / size
            for at in rows.split(of)
        ]

    return model, parts


def test_second_order_is_the_derivative_of_what_is_promised():
    """Central differences of L(t) + M(t - a grad L(t)) along random directions."""
    model, parts = net_and_losses()
    rows, rate, h = torch.arange(8), 0.5, 1e-6
    (tune,), (test,) = parts(rows[:4], 4), parts(rows[4:], 4)

    def promised():
        loss = tune(model)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p.sub_(rate * g)
            after = test(model)
            for p, g in zip(model.parameters(), grads, strict=True):
                p.add_(rate * g)
        return (loss + after).item()

    found, _, _ = meta_gradient(model, [tune], [test], rate)
    first, _, _ = meta_gradient(model, [tune], [test], rate, order="first")
    for _ in range(3):
        direction = [torch.randn_like(p) for p in model.parameters()]
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(model.parameters(), direction, strict=True):
                    p.add_(sign * h * d)
            ends.append(promised())
            with torch.no_grad():
                for p, d in zip(model.parameters(), direction, strict=True):
                    p.sub_(sign * h * d)
        slope = (ends[0] - ends[1]) / (2 * h)
        # every parameter is reached, so no gradient is None
        along, short = (
            sum((g * d).sum().item() for g, d in zip(side, direction, strict=True))  # type: ignore[operator]
            for side in (found, first)
        )
        assert along == pytest.approx(slope, rel=1e-6)
        assert abs(short - slope) > 1e-3 * abs(slope)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("of", [1, 3])
def test_parts_of_a_batch_are_the_batch(order, of):
    model, parts = net_and_losses()
    rows = torch.arange(8)
    whole = meta_gradient(model, parts(rows[:5], 5), parts(rows[5:], 3), 0.5, order=order)
    split = meta_gradient(model, parts(rows[:5], of), parts(rows[5:], of), 0.5, order=order)
    torch.testing.assert_close(split, whole)


def test_a_linear_loss_and_an_unused_parameter():
    model = Point(torch.randn(3, dtype=torch.float64))
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    slope = torch.randn(3, dtype=torch.float64)
    found, _, _ = meta_gradient(model, [lambda m: slope @ m.at], [lambda m: (m.at**2).sum()], 0.5)
    torch.testing.assert_close(found[0], slope + 2 * (model.at.detach() - 0.5 * slope))
    assert found[1] is None


def test_attention_has_a_second_derivative():
    torch.manual_seed(0)

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 24).double()

        def forward(self, x):
            q, k, v = self.inner(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    model, x = Attend(), torch.randn(2, 5, 8, dtype=torch.float64)
    found, _, _ = meta_gradient(
        model, [lambda m: (m(x) ** 2).sum()], [lambda m: m(x).abs().sum()], 0.1
    )
    assert all(grad.isfinite().all() for grad in found)


@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_changes_nothing_but_the_time(monkeypatch, channels_last):
    """Its own second derivative serves inside, torch's gives the same."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(54, 3)).double()
    x, y = torch.randn(2, 4, 2, 5, 5, dtype=torch.float64), torch.randint(0, 3, (2, 4))
    if channels_last:
        x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 4))
        model.to(memory_format=torch.channels_last)
    sides = [[lambda m, k=k: nn.functional.cross_entropy(m(x[k]), y[k])] for k in (0, 1)]
    calls, ours = [], meta.group_norm
    monkeypatch.setattr(meta, "group_norm", lambda *a, **k: calls.append(a) or ours(*a, **k))
    found, *_ = meta_gradient(model, *sides, 0.5)
    assert len(calls) == 1  # the test loss is differentiated once
    monkeypatch.setattr(meta, "group_norm", nn.functional.group_norm)
    expected, *_ = meta_gradient(model, *sides, 0.5)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("parts", [1, 2])
def test_activation_checkpoints_change_nothing(parts):
    """What is computed again, in the derivatives, is what was computed before."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.into = nn.GroupNorm(2, 6), nn.Linear(5, 30)

        def inner(self, x):
            q, k, v = self.into(self.norm(x)).unflatten(-1, (3, 2, 5)).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False) if self.saves else self.inner(x)

    model = Net()
    x = torch.randn(parts + 1, 4, 6, 5)
    losses = [lambda m, each=each: m(each).pow(2).sum() for each in x]
    found = []
    for model.saves in (False, True):
        found.append(meta_gradient(model, losses[:-1], losses[-1:], 0.1)[0])
    torch.testing.assert_close(*found)


def test_nothing_to_differentiate_is_named():
    model = Point(torch.ones(2)).requires_grad_(False)
    with pytest.raises(InputError, match="no parameter requires a gradient"):
        meta_gradient(model, [lambda m: m.at.sum()], [lambda m: m.at.sum()], 0.1)
