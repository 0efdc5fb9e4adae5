"""combine="backward": weighted sums of rows by a backward pass of the kept graph."""

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.capture.memory import Live
from tests.models import batch, classification, make, mlp

GROUPS = torch.tensor([0, 0, 1, 2, -1])


def both(name="attention", groups=None):
    model, data, loss = make(name)
    jacobians = []
    for combine in ("stored", "backward"):
        with gs.tape(model) as tape:
            losses = loss(model, data)
        jacobians.append(tape.jacobian(losses, groups, combine=combine))
    return model, *jacobians


@pytest.mark.parametrize("name", ["mlp", "cnn in eval", "attention", "tied attention", "partial"])
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_it_gives_what_the_stored_pairs_give(name, groups):
    model, stored, backward = both(name, groups)
    torch.testing.assert_close(backward.gramian(), stored.gramian(), rtol=1e-12, atol=1e-14)
    weights = torch.randn(stored.m).double()
    per_tensor = torch.randn(2, stored.m).double()[torch.randint(2, (len(stored.names),))]
    for w in (weights, per_tensor):
        for a, b in zip(backward.combine(w), stored.combine(w), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    backward.backward(weights)
    for p, expected in zip(model.parameters(), stored.combine(weights), strict=False):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-12)


def test_it_keeps_no_pairs_and_says_so():
    _, _, jacobian = both("mlp")
    for call in (
        jacobian.materialize,
        lambda: jacobian.products([torch.ones_like(p) for p in jacobian.parameters]),
        lambda: jacobian.gramian(metric=[torch.ones_like(p) for p in jacobian.parameters]),
        lambda: gs.concat([jacobian, jacobian]),
    ):
        with pytest.raises(gs.InputError, match="combine='stored'"):
            call()


def test_hooks_on_parameters_see_the_update():
    # a sharded or distributed model reduces gradients in such hooks
    model, seen = mlp(), []
    with gs.tape(model) as tape:
        losses = classification(model, batch(3))
    jacobian = tape.jacobian(losses, combine="backward")
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    weights = torch.tensor([1.0, -2.0, 0.5]).double()
    jacobian.backward(weights)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], model[0].weight.grad)


def test_a_wrong_mode_is_named():
    model = nn.Linear(2, 1)
    with gs.tape(model) as tape:
        losses = model(torch.randn(3, 2))[:, 0]
    with pytest.raises(gs.InputError, match="combine must be 'stored' or 'backward', got 'later'"):
        tape.jacobian(losses, combine="later")


@pytest.mark.parametrize("combine", ["stored", "backward"])
@pytest.mark.parametrize("name", ["mlp", "attention", "tied attention", "partial"])
def test_released_it_adds_the_same_and_is_gone(name, combine):
    model, data, loss = make(name)
    with gs.tape(model) as tape:
        losses = loss(model, data)
    jacobian = tape.jacobian(losses, GROUPS, combine=combine)
    weights = torch.randn(jacobian.m).double()
    expected = jacobian.combine(weights)
    gram = jacobian.gramian()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    jacobian.backward(weights, release=True)
    for p, update in zip(jacobian.parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, 1 + update, rtol=1e-10, atol=1e-12)
    for call in (
        lambda: jacobian.backward(weights),
        lambda: jacobian.combine(weights),
        jacobian.materialize,
        lambda: jacobian.products(expected),
        lambda: gs.concat([jacobian, jacobian]),
    ):
        with pytest.raises(gs.InputError, match=r"released by backward\(weights, release=True\)"):
            call()
    assert torch.equal(jacobian.gramian(), gram), "what is known stays known"


def test_released_it_frees_pairs_as_it_goes():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    x = torch.randn(8, 32, 64)
    size = 4 * 64 * 64
    peaks = {}
    for release in (False, True):
        model.zero_grad()
        with Live() as live:
            with gs.tape(model) as tape:
                losses = model(x).square().mean((1, 2))
            jacobian = tape.jacobian(losses)
            weights = jacobian.gramian().sum(0)
            del losses
            live.peak = live.now
            before = live.now
            jacobian.backward(weights, release=release)
            peaks[release] = live.peak - before
    assert peaks[False] >= 8 * size, "a gradient each, beside all pairs"
    assert peaks[True] < 6 * size, "each in the place of its pair"


@pytest.mark.parametrize("combine", ["stored", "backward"])
def test_released_it_stays_so_where_a_hook_raises(combine):
    model, data, loss = make("mlp")
    with gs.tape(model) as tape:
        losses = loss(model, data)
    jacobian = tape.jacobian(losses, combine=combine)
    weights = torch.ones(jacobian.m)

    def refuse(_):
        raise RuntimeError("no")

    jacobian.parameters[-1].register_post_accumulate_grad_hook(refuse)
    with pytest.raises(RuntimeError, match="no"):
        jacobian.backward(weights, release=True)
    with pytest.raises(gs.InputError, match="released"):
        jacobian.backward(weights)


def test_a_hook_may_ask_for_another_sum(monkeypatch):
    """Though planes that are kept are scaled one after another."""
    monkeypatch.setenv("GRADSURGERY_PATH", "direct")
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    model, x = model.double(), torch.randn(8, 5, 8, dtype=torch.float64)
    with gs.tape(model) as tape:
        losses = model(x).square().mean((1, 2))
    jacobian = tape.jacobian(losses, torch.tensor([0, 0, 0, 0, 1, 2, 3, 4]))
    weights, others = torch.randn(5).double(), torch.ones(5).double()
    rows = jacobian.materialize()
    jacobian.gramian()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: jacobian.combine(others) and None)
    jacobian.backward(weights)
    update = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(update, weights @ rows, rtol=1e-12, atol=1e-14)


def change_by_numpy(array, weights):
    array[:] = [4, -3, 2, -1]


def change_data(array, weights):
    weights.data.copy_(torch.tensor([4.0, -3, 2, -1]))


@pytest.mark.parametrize("change", [change_by_numpy, change_data])
def test_weights_may_be_written_to_between_sums(change):
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 5, 3, dtype=torch.float64)
    with gs.tape(model) as tape:
        losses = model(x).square().mean((1, 2))
    jacobian = tape.jacobian(losses)
    rows, array = jacobian.materialize(), np.array([1.0, 2, 3, 4])
    weights = torch.from_numpy(array)
    for _ in range(2):
        update = torch.cat([part.flatten() for part in jacobian.combine(weights)])
        torch.testing.assert_close(update, weights @ rows, rtol=1e-12, atol=1e-14)
        change(array, weights)
    with torch.inference_mode():
        weights = torch.ones(4, dtype=torch.float64)
    update = torch.cat([part.flatten() for part in jacobian.combine(weights)])
    torch.testing.assert_close(update, rows.sum(0), rtol=1e-12, atol=1e-14)
