"""Every architecture of the zoo against a loop of backward passes, one for each loss.

The loop is over the losses of the same forward pass, so its rows are by definition the gradients
of the losses.
"""

import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from tests.capture.zoo import ZOO, make

FLOAT32 = 1e-4
ROWS = 3
each = pytest.mark.parametrize("name", ZOO)


def loop(losses, model):
    """{name: the gradients of each loss, a row for each; None where no loss reaches it}."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(loss, trainable.values(), retain_graph=True, allow_unused=True)
        for loss in losses.unbind()
    ]
    found = {}
    for (name, p), column in zip(trainable.items(), zip(*rows, strict=True), strict=True):
        reached = any(row is not None for row in column)
        column = [torch.zeros_like(p) if row is None else row for row in column]
        found[name] = torch.stack(column) if reached else None
    return found


def forward(name, **options):
    """A model, the tape of its forward pass and the losses."""
    model, batch = make(name, **options)
    with gs.tape(model) as tape:
        losses = ZOO[name].loss(model, batch)
    return model, tape, losses


def expected_warning(name, dtype):
    return pytest.warns(UserWarning) if dtype in ZOO[name].falls_back else nullcontext()


def summed(rows, groups):
    """The rows of each group as one; `rows` as `loop` gives them."""
    count = int(groups.max()) + 1
    return {
        name: None if g is None else g.new_zeros(count, *g.shape[1:]).index_add(0, groups, g)
        for name, g in rows.items()
    }


def check(jacobian, model, rows, weights, tolerance):
    """All that a Jacobian gives, against its `rows` in float64."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    m = len(weights)
    assert list(jacobian.names) == list(trainable)
    assert list(jacobian.sizes) == [p.numel() for p in trainable.values()]
    assert jacobian.m == m

    flat = [
        torch.zeros(m, p.numel(), dtype=torch.float64) if g is None else g.reshape(m, -1)
        for p, g in zip(trainable.values(), rows.values(), strict=True)
    ]
    per_tensor = torch.stack([g @ g.T for g in flat])
    gramian = per_tensor.sum(0)
    largest = gramian.diagonal().max().clamp(min=1e-30)
    actual = jacobian.gramian()
    assert actual.dtype == torch.float64
    assert actual.shape == (m, m)
    assert (actual - gramian).abs().max() <= tolerance * largest

    actual = jacobian.gramian(per="tensor")
    assert actual.shape == (len(flat), m, m)
    scale = per_tensor.diagonal(dim1=1, dim2=2).amax(1).clamp(min=1e-3 * largest)
    errors = (actual - per_tensor).abs().amax((1, 2)) / scale
    worst = int(errors.argmax())
    assert errors[worst] <= tolerance, f"{jacobian.names[worst]} is off by {errors[worst]:.1e}"

    norms = gramian.diagonal().sqrt()
    torch.testing.assert_close(
        jacobian.row_norms().double(), norms, rtol=0, atol=float(tolerance * largest.sqrt())
    )

    bound = tolerance * (weights.double().abs() @ norms).clamp(min=1e-30)
    combined = jacobian.combine(weights)
    assert len(combined) == len(trainable)
    for (name, p), c, g in zip(trainable.items(), combined, flat, strict=True):
        assert c.shape == p.shape
        assert (c.double().flatten() - weights.double() @ g).abs().max() <= bound, name

    model.zero_grad()
    jacobian.backward(weights)
    for (name, p), c in zip(trainable.items(), combined, strict=True):
        if rows[name] is None:
            assert p.grad is None, f"{name}: no loss reaches it"
        else:
            assert (p.grad - c).double().abs().max() <= bound, name


def apart(rows, exact):
    """How far two Jacobians' Gramians are from each other, by the measure of `check`."""
    m = next(len(g) for g in rows.values() if g is not None)
    pairs = [(rows[n].reshape(m, -1), exact[n].reshape(m, -1)) for n in rows if rows[n] is not None]
    largest = sum(b @ b.T for _, b in pairs).diagonal().max()
    return max(
        float((a @ a.T - b @ b.T).abs().max() / (b @ b.T).diagonal().max().clamp(1e-3 * largest))
        for a, b in pairs
    )


@each
def test_float64(name):
    dtype = torch.float64
    model, tape, losses = forward(name, dtype=dtype)
    rows = loop(losses, model)
    with expected_warning(name, dtype):
        jacobian = tape.jacobian(losses)
        check(jacobian, model, rows, torch.randn(len(losses), dtype=dtype), ZOO[name].tolerance)


@each
def test_groups(name):
    dtype = torch.float64
    model, tape, losses = forward(name, size=6, dtype=dtype)
    groups = torch.cat([torch.arange(ROWS), torch.randint(ROWS, (6 - ROWS,))])[torch.randperm(6)]
    rows = summed(loop(losses, model), groups)
    with expected_warning(name, dtype):
        jacobian = tape.jacobian(losses, groups=groups)
        check(jacobian, model, rows, torch.randn(ROWS, dtype=dtype), ZOO[name].tolerance)


@each
def test_float32(name):
    """Against the loop, and against the loop in float64, with the same weights.

    A LayerNorm of few channels magnifies roundings: where float32's own loop is further from
    float64's, no rows of that forward pass can be nearer.
    """
    exact, batch = make(name, dtype=torch.float64)
    rows = loop(ZOO[name].loss(exact, batch), exact)
    model, tape, losses = forward(name, dtype=torch.float32)
    own = {n: None if g is None else g.double() for n, g in loop(losses, model).items()}
    weights = torch.randn(len(losses))
    with expected_warning(name, torch.float32):
        jacobian = tape.jacobian(losses)
        check(jacobian, model, own, weights, FLOAT32)
        check(jacobian, model, rows, weights, max(FLOAT32, 1.5 * apart(own, rows)))


@each
def test_any_shape(name):
    dtype, entry = torch.float64, ZOO[name]

    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(shape=entry.strategy(), size=st.integers(1, 6), seed=st.integers(0, 99))
    def holds(shape, size, seed):
        model, tape, losses = forward(name, shape=shape, size=size, dtype=dtype, seed=seed)
        rows = loop(losses, model)
        with warnings.catch_warnings():
            if dtype in entry.falls_back:  # not for every shape: a single row needs no formula
                warnings.simplefilter("ignore", UserWarning)
            jacobian = tape.jacobian(losses)
            check(jacobian, model, rows, torch.randn(size, dtype=dtype), entry.tolerance)

    holds()
