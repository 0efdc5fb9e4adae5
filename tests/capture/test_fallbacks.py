"""What goes the slow way, and what is refused, is told by types; messages repeat it in words."""

import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from gradsurgery.capture import Fallback
from tests.capture.oracle import BATCH, batch, energy, labels, mlp

X = batch(BATCH, 5)


def taken(model, forward, coupled="exact"):
    """The Jacobian, and what its one warning says; "" without."""
    with gs.tape(model, coupled=coupled) as tape:
        losses = forward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jacobian = tape.jacobian(losses)
    assert len(caught) <= 1
    return jacobian, str(caught[0].message) if caught else ""


def sparse():
    model = nn.Embedding(7, 4, sparse=True).double()
    return model, lambda: energy(model(labels(7, 2 * BATCH).view(BATCH, 2)))


def hooked():
    model = mlp()
    model.get_parameter("0.weight").register_hook(lambda grad: 2 * grad)
    return model, lambda: energy(model(X))


def normed():
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    return model, lambda: energy(model(X))


def soft():
    model = nn.Linear(5, 3).double()
    return model, lambda: energy(F.softmax(model(X), 0))


def clipped(grad):
    return grad.clamp(-0.01, 0.01)


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 5))

    def forward(self, x):
        weight = self.left @ self.right
        weight.register_hook(clipped)
        return F.linear(x, weight)


def bent():
    model = Computed().double()
    return model, lambda: energy(model(X))


def mixed():
    model = mlp()

    def forward():
        hidden = torch.tanh(model[0](X))
        hidden.register_hook(lambda grad: grad - grad.mean(0))
        return energy(model[2](hidden))

    return model, forward


BATCH_NORM = "NativeBatchNormBackward0"
FALLBACKS = {
    sparse: [Fallback("EmbeddingBackward0", ("weight",), "no formula")],
    hooked: [Fallback("", ("0.weight",), "hook")],
    normed: [Fallback(BATCH_NORM, ("0.weight", "0.bias"), "coupled")],
    soft: [Fallback("SoftmaxBackward0", ("weight", "bias"), "coupled")],
    bent: [Fallback("", ("left", "right"), "not linear")],
}


@pytest.mark.parametrize("made", FALLBACKS, ids=lambda made: made.__name__)
def test_a_fallback_is_on_the_jacobian_and_in_the_warning(made):
    model, forward = made()
    jacobian, said = taken(model, forward)
    found = [(f.operation, sorted(f.parameters), f.reason) for f in jacobian.fallbacks]
    assert found == [(f.operation, sorted(f.parameters), f.reason) for f in FALLBACKS[made]]
    assert said == "; ".join(map(str, jacobian.fallbacks))


def test_without_fallbacks_nothing_is_said():
    model = mlp()
    jacobian, said = taken(model, lambda: energy(model(X)))
    assert (jacobian.fallbacks, said) == ([], "")


def test_a_hook_that_mixes_samples_is_a_fallback():
    jacobian, _ = taken(*mixed())
    ((operation, parameters, reason),) = [
        (f.operation, f.parameters, f.reason) for f in jacobian.fallbacks
    ]
    assert operation.startswith("a hook on the output of TanhBackward0")
    assert parameters == ("0.weight", "0.bias")
    assert reason == "coupled"


def test_each_reason_has_its_own_parameters():
    model, forward = normed()
    model.get_parameter("2.weight").register_hook(lambda grad: 2 * grad)
    jacobian, said = taken(model, forward)
    assert jacobian.fallbacks == [*FALLBACKS[normed], Fallback("", ("2.weight",), "hook")]
    assert "2.weight: it has a hook" in said


def test_fallbacks_stay_with_the_rows():
    model, forward = normed()
    model.get_parameter("2.weight").register_hook(lambda grad: 2 * grad)
    jacobian, _ = taken(model, forward)
    both = gs.concat([jacobian, taken(model, forward)[0]])
    assert both.fallbacks == jacobian.fallbacks
    some = jacobian.columns([jacobian.names.index("0.bias")])
    assert some.fallbacks == [Fallback(BATCH_NORM, ("0.bias",), "coupled")]


def test_check_tells_all_reasons_of_a_parameter():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, 4))

        def forward(self, ids):
            picked = F.embedding(ids, self.table, scale_grad_by_freq=True)
            bags = F.embedding_bag(ids, self.table, scale_grad_by_freq=True, mode="sum")
            return energy(picked) + energy(bags)

    checked = gs.check(Twice().double(), labels(7, 10).view(5, 2), loss=lambda net, x: net(x))
    assert checked.exact
    for operation in ("EmbeddingBackward0", "EmbeddingBagBackward0"):
        assert f"there is no formula for {operation}" in checked.slow["table"]


REFUSALS = {
    normed: (BATCH_NORM, ("0.weight", "0.bias"), ("1",)),
    soft: ("SoftmaxBackward0", ("weight", "bias"), ()),
}


@pytest.mark.parametrize("made", REFUSALS, ids=lambda made: made.__name__)
def test_coupled_samples_are_an_error_with_attributes(made):
    operation, parameters, modules = REFUSALS[made]
    model, forward = made()
    with pytest.raises(gs.CoupledSamplesError, match=operation) as caught:
        taken(model, forward, "refuse")
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert isinstance(error, gs.InputError)
        assert (error.operation, error.modules) == (operation, modules)
        assert sorted(error.parameters) == sorted(parameters)
        assert all(name in str(error) for name in (*parameters, *modules))


def test_a_hook_that_mixes_samples_is_an_error_with_attributes():
    with pytest.raises(gs.CoupledSamplesError, match="a hook on the output of Tanh") as caught:
        taken(*mixed(), "refuse")
    assert caught.value.operation.startswith("a hook on the output of TanhBackward0")
    assert caught.value.parameters == ("0.weight", "0.bias")
    assert caught.value.modules == ()


def test_what_cannot_be_asked_is_no_coupling():
    """Nothing is known of it: it may be independent of other samples."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError("not for you")

    model = nn.Linear(5, 3).double()
    with pytest.raises(gs.InputError, match="cannot be asked") as caught:
        taken(model, lambda: energy(Failing.apply(model(X))), "refuse")
    assert not isinstance(caught.value, gs.CoupledSamplesError)
