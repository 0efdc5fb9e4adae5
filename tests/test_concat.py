"""gs.concat: rows of several Jacobians as one, stored or captured, never both."""

import copy

import pytest
import torch

import gradsurgery as gs
from tests.models import MODELS, make


def dense():
    return gs.DenseJacobian({"w": torch.randn(3, 2, 2).double(), "b": torch.randn(3).double()})


def captured(model, batch, loss, groups=None):
    with gs.tape(model) as tape:
        losses = loss(model, batch)
    return tape.jacobian(losses, groups)


def test_concat_stacks_rows_in_order():
    model, batch, loss = make("mlp")
    first = gs.DenseJacobian.from_model(model, batch, loss, rows="mean")
    second = gs.DenseJacobian.from_model(model, batch, loss)
    both = gs.concat([first, second])
    assert both.m == 6
    assert both.names == first.names
    assert both.parameters == first.parameters
    assert torch.equal(both.materialize(), torch.cat([first.materialize(), second.materialize()]))
    assert torch.equal(both.losses, torch.cat([first.losses, second.losses]))


def test_a_parameter_that_passes_see_as_other_matrices():
    cube = torch.nn.Parameter(torch.randn(2, 3, 4).double())
    model = torch.nn.ParameterList([cube])
    x, y = torch.randn(3, 6).double(), torch.randn(4, 2).double()
    losses = [
        lambda: (x @ cube.view(6, 4)).square().sum(1),
        lambda: (y @ cube.view(2, 12)).square().sum(1),
    ]
    parts = []
    for one in losses:
        with gs.tape(model) as tape:
            parts.append(tape.jacobian(one()))
    rows = [
        torch.autograd.grad(each, cube, retain_graph=True)[0]
        for one in losses
        for each in one().unbind()
    ]
    expected = gs.DenseJacobian([torch.stack(rows)])
    weights = torch.arange(7.0).double()
    for several in (parts, parts[::-1]):
        both = gs.concat(several)
        order = [*range(7)] if several is parts else [3, 4, 5, 6, 0, 1, 2]
        gram = expected.gramian()[order][:, order]
        torch.testing.assert_close(both.gramian(), gram, rtol=1e-12, atol=0)
        update, wanted = both.combine(weights[order])[0], expected.combine(weights)[0]
        torch.testing.assert_close(update, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "other,message",
    [
        (
            {"w": torch.ones(1, 3)},
            r"jacobians\[1\] is over \['w'\], jacobians\[0\] over \['w', 'b'\]",
        ),
        ({"v": torch.ones(1, 2, 2), "b": torch.ones(1)}, r"jacobians\[1\] is over"),
        (
            {"w": torch.ones(1, 4), "b": torch.ones(1)},
            r"jacobians\[1\] has rows of \[4\] for w, jacobians\[0\] of \[2, 2\]",
        ),
        ({"w": torch.ones(1, 2, 2), "b": torch.ones(1)}, r"jacobians\[1\] is torch.float32"),
    ],
)
def test_concat_refuses_other_columns(other, message):
    with pytest.raises(gs.InputError, match=message):
        gs.concat([dense(), gs.DenseJacobian(other)])


def test_concat_refuses_nothing():
    with pytest.raises(gs.InputError, match="jacobians is an empty sequence"):
        gs.concat([])


@pytest.mark.parametrize("name", MODELS)
def test_captured_rows_of_several_passes_are_those_of_one(name):
    model, batch, loss = make(name)
    other, last = make(name, size=3)[1], make(name, size=2)[1]
    mean = torch.zeros(3, dtype=torch.int64)
    parts = [captured(model, *part) for part in ((batch, loss), (other, loss, mean), (last, loss))]
    whole = gs.concat(parts)
    assert (whole.m, whole.names, whole.sizes) == (8, parts[0].names, parts[0].sizes)
    rows = torch.cat([part.materialize() for part in parts])
    torch.testing.assert_close(whole.losses, torch.cat([part.losses for part in parts]))
    torch.testing.assert_close(whole.materialize(), rows)
    torch.testing.assert_close(whole.gramian(), rows @ rows.mT)
    weights = torch.randn(8).double()
    update = torch.cat([u.flatten() for u in whole.combine(weights)])
    torch.testing.assert_close(update, weights @ rows)
    whole.backward(weights)
    for parameter, part in zip(whole.parameters, update.split(whole.sizes), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad.flatten(), part)
    # the parts are still of use
    torch.testing.assert_close(parts[1].materialize(), rows[5:6])


@pytest.mark.parametrize("path", ["direct", "factored"])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_a_pass_of_its_own_beside_rows_of_another(name, path, monkeypatch):
    # the plane of the one is kept, and what is asked for first does not change it for the next
    monkeypatch.setenv("GRADSURGERY_PATH", path)
    model, batch, loss = make(name)
    mean = torch.zeros(5, dtype=torch.int64)
    other = make(name, size=4)[1]
    parts = [captured(model, batch, loss, mean), captured(model, other, loss)]
    both = gs.concat(parts)
    rows = torch.cat([part.materialize() for part in parts])
    metric = [torch.rand_like(p) + 0.5 for p in both.parameters]
    scaled = rows * torch.cat([m.flatten() for m in metric]).sqrt()
    weights = torch.randn(5).double()
    for _ in range(2):
        torch.testing.assert_close(both.gramian(), rows @ rows.mT)
        torch.testing.assert_close(both.gramian(metric=metric), scaled @ scaled.mT)
        update = torch.cat([u.flatten() for u in both.combine(weights)])
        torch.testing.assert_close(update, weights @ rows)
        model.zero_grad()
        both.backward(weights)
        torch.testing.assert_close(gradient(both), weights @ rows)
        torch.testing.assert_close(both.materialize(), rows)
        torch.testing.assert_close(both.gramian(per="tensor").sum(0), rows @ rows.mT)
    model.zero_grad()
    both.backward(weights, release=True)
    torch.testing.assert_close(gradient(both), weights @ rows)


def gradient(jacobian):
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in jacobian.parameters]
    return torch.cat([grad.flatten() for grad in grads])


def test_captured_rows_keep_their_parameters_apart():
    model, batch, loss = make("mlp")
    twin = copy.deepcopy(model)
    with pytest.raises(gs.InputError, match=r"jacobians\[1\] is of other parameters than"):
        gs.concat([captured(model, batch, loss), captured(twin, batch, loss)])
    whole = captured(model, batch, loss)
    model[0].requires_grad_(False)
    with pytest.raises(gs.InputError, match=r"jacobians\[1\] is over \['2.weight', '2.bias'\]"):
        gs.concat([whole, captured(model, batch, loss)])


def test_kinds_do_not_mix():
    model, batch, loss = make("mlp")
    stored, recorded = gs.DenseJacobian.from_model(model, batch, loss), captured(model, batch, loss)
    for pair, message in (
        (
            [stored, recorded],
            r"jacobians\[1\] is a FactoredJacobian, jacobians\[0\] a DenseJacobian",
        ),
        (
            [recorded, stored],
            r"jacobians\[1\] is a DenseJacobian, jacobians\[0\] a FactoredJacobian",
        ),
    ):
        with pytest.raises(gs.InputError, match=message):
            gs.concat(pair)


def test_rows_given_away_are_gone_from_their_parent():
    """The whole row of a pass of its own ends in `.grad`: who else holds it must not use it."""
    model, batch, loss = make("mlp")
    one = torch.zeros(len(batch[1]), dtype=torch.int64)
    first, second = captured(model, batch, loss, one), captured(model, batch, loss)
    both = gs.concat([first, second])
    both.gramian()
    both.backward(torch.randn(both.m).double(), release=True)
    for use in (first.gramian, first.materialize, lambda: first.combine(torch.ones(1))):
        with pytest.raises(gs.InputError, match="modified in place"):
            use()


def test_a_gradient_that_two_parameters_share_is_given_away_once():
    a, b = (torch.nn.Parameter(torch.randn(5, 3).double()) for _ in range(2))
    model = torch.nn.ParameterList([a, b])
    x = torch.randn(4, 6, 5).double()
    with gs.tape(model) as tape:
        whole = (x[0] @ (a + b)).square().sum()
    with gs.tape(model) as other:
        each = (x[1:] @ a).square().sum((1, 2)) + (x[1:] @ b).tanh().sum((1, 2))
    both = gs.concat([tape.jacobian(whole), other.jacobian(each)])
    weights = torch.tensor([2.0, -1, 0.5, 3]).double()
    expected = both.combine(weights)
    both.gramian()
    both.backward(weights, release=True)
    for p, update in zip((a, b), expected, strict=True):
        torch.testing.assert_close(p.grad, update)


def test_a_whole_row_that_is_one_expanded_value():
    linear = torch.nn.Linear(1, 1).double()
    x = torch.randn(4, 6, 1).double()
    with gs.tape(linear) as tape:
        whole = linear.weight.sum() * 2
    with gs.tape(linear) as other:
        each = linear(x).square().mean((1, 2))
    both = gs.concat([tape.jacobian(whole), other.jacobian(each)])
    rows = both.materialize()
    torch.testing.assert_close(both.gramian(), rows @ rows.mT)
    weights = torch.arange(5.0).double()
    both.backward(weights)
    torch.testing.assert_close(linear.weight.grad.flatten(), weights @ rows[:, :1])
