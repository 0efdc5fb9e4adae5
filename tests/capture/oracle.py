"""The oracle of a Jacobian: a loop of backward passes over the losses of the same graph."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs

BATCH = 6


def mlp(*, middle=(), dtype=torch.float64):
    """5 -> 7 -> 4, with `middle` after the first layer."""
    return nn.Sequential(nn.Linear(5, 7), *middle, nn.Tanh(), nn.Linear(7, 4)).to(dtype)


def batch(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (BATCH, 5)), generator=generator, dtype=torch.float64)


def labels(high=4, size=BATCH):
    return torch.randint(high, (size,), generator=torch.Generator().manual_seed(2))


def energy(out):
    """One loss per sample, of whatever it gave."""
    return out.square().flatten(1).sum(1)


def entropy(out, y=None):
    return F.cross_entropy(out, labels() if y is None else y, reduction="none")


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loop(losses, model, groups=None):
    """[m, *p.shape] per parameter; None where no loss reaches it."""
    named = trainable(model)
    flat = losses.flatten()
    groups = torch.arange(len(flat)) if groups is None else groups.flatten()
    m = int(groups.max()) + 1
    totals: list[torch.Tensor | None] = [None] * len(named)
    for loss, row in zip(flat.unbind(), groups.tolist(), strict=True):
        if row < 0:
            continue
        grads = torch.autograd.grad(
            loss, list(named.values()), retain_graph=True, allow_unused=True
        )
        for k, (p, grad) in enumerate(zip(named.values(), grads, strict=True)):
            if grad is not None:
                total = totals[k]
                total = p.new_zeros(m, *p.shape) if total is None else total
                total[row] += grad.to_dense().detach()
                totals[k] = total
    return totals


def flattened(rows, model, m):
    """[m, p.numel()] per parameter, float64."""
    return [
        torch.zeros(m, p.numel(), dtype=torch.float64) if g is None else g.reshape(m, -1).double()
        for p, g in zip(trainable(model).values(), rows, strict=True)
    ]


def check(jacobian, model, rows, tolerance=1e-10):
    """All that a Jacobian gives, against its rows."""
    named, m = trainable(model), jacobian.m
    assert list(jacobian.names) == list(named)
    flat = flattened(rows, model, m)
    expected = torch.stack([g @ g.T for g in flat])
    largest = expected.sum(0).diagonal().max().clamp(min=1e-30)
    assert (jacobian.gramian() - expected.sum(0)).abs().max() <= tolerance * largest
    assert (jacobian.gramian(per="tensor") - expected).abs().max() <= tolerance * largest
    error = (jacobian.materialize().double() - torch.cat(flat, 1)).abs().max()
    assert error <= tolerance * largest.sqrt()

    weights = torch.randn(m, dtype=next(iter(named.values())).dtype)
    bound = tolerance * largest.sqrt() * weights.double().abs().sum()
    before = [None if p.grad is None else p.grad.clone() for p in named.values()]
    combined = jacobian.combine(weights)
    jacobian.backward(weights)
    for (name, p), b, c, g, row in zip(named.items(), before, combined, flat, rows, strict=True):
        want = (weights.double() @ g).view(p.shape)
        assert (c.double() - want).abs().max() <= bound, name
        if p.grad is None:
            assert row is None or not row.any(), name
        elif row is None:
            assert b is not None, f"{name}: no loss reaches it"
        else:
            added = p.grad if b is None else p.grad - b
            assert (added.double() - want).abs().max() <= bound, name


def agrees(model, forward, *, groups=None, coupled="refuse", warns=(), tolerance=1e-10):
    """The Jacobian of the losses that `forward` returns is the loop's.

    warns: what the one warning has to say; no warning without.
    """
    with gs.tape(model, coupled=coupled) as tape:
        losses = forward()
    rows = loop(losses, model, groups)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jacobian = tape.jacobian(losses, groups=groups)
    assert len(caught) == bool(warns), [str(w.message) for w in caught]
    for text in warns:
        assert re.search(text, str(caught[0].message)), str(caught[0].message)
    check(jacobian, model, rows, tolerance)
    return jacobian


def refused(model, forward, *texts, exact=True):
    """Refused by name, and exact with one warning of the same names where that is asked for."""
    with gs.tape(model) as tape:
        losses = forward()
    with pytest.raises(gs.InputError) as error:
        tape.jacobian(losses)
    for text in texts:
        assert re.search(text, str(error.value)), str(error.value)
    if exact:
        agrees(model, forward, coupled="exact", warns=texts)
