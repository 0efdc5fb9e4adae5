"""Losses that are others when samples are taken apart: refused by name, never silently other."""

import copy
import functools
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from gradsurgery import apart
from tests.models import batch, classification, mlp
from tests.test_jacobian import one_by_one


def softmax(model, data):
    return classification(model, data) * model(data[0])[:, 0].detach().softmax(0)


def shares(model, data):
    """Weights of the batch, as a share of their sum."""
    return classification(model, data[:2]) * data[2] / data[2].sum()


def to_the_mean(model, data):
    """As `shares`, times the number of samples."""
    return classification(model, data[:2]) * data[2] / data[2].mean()


def deviation(model, data):
    return classification(model, data) / data[0].std(0).mean()


def of_the_size(model, data):
    return classification(model, data) / len(data[0])


def weighted(size):
    return *batch(size), torch.rand(size).double() + 0.5


def padded(size, short):
    """Sequences of 9 tokens, but for the samples `short`, which have 2; their labels are -100."""
    labels = torch.randint(3, (size, 9))
    labels[short, 2:] = -100
    return torch.randn(size, 9, 6).double(), labels


def token_mean(model, data):
    """Of all tokens of the batch, as language models' losses are."""
    losses = F.cross_entropy(model(data[0]).mT, data[1], reduction="none", ignore_index=-100)
    return losses.sum(1) / (data[1] != -100).sum() * len(losses)


def token_sum(model, data):
    losses = F.cross_entropy(model(data[0]).mT, data[1], reduction="none", ignore_index=-100)
    return losses.sum(1) / 9


COUPLED = {
    "softmax over the batch": (softmax, lambda: batch(6)),
    "shares of weights": (shares, lambda: weighted(6)),
    "weights to their mean": (to_the_mean, lambda: weighted(6)),
    "standard deviation": (deviation, lambda: batch(6)),
    "divided by the size": (of_the_size, lambda: batch(6)),
    "tokens of the batch": (token_mean, lambda: padded(16, [11])),
}


def surgeon_of(model, rule=None, **options):
    return gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=1.0), rule, **options)


@pytest.mark.parametrize("way", ["stored rows", "a step of stored rows", "in parts"])
@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_couples_samples_is_refused_by_name(name, way):
    loss, make = COUPLED[name]
    model, data = mlp(), make()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    if way == "stored rows":
        step = lambda: gs.DenseJacobian.from_model(model, data, loss)  # noqa: E731
    else:
        options = {"micro_batch": 3} if way == "in parts" else {"rows": "stored"}
        surgeon = surgeon_of(model, gs.UPGrad(), **options)
        step = lambda: surgeon.step(batch=data, loss=loss)  # noqa: E731
    with pytest.raises(gs.InputError, match=r"loss of a sample .*depends on the others") as told:
        step()
    assert ("micro_batch=None" if way == "in parts" else "rows='captured'") in str(told.value)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("options", [{"rows": "stored"}, {"micro_batch": 1}, {"micro_batch": 5}])
def test_a_sum_over_tokens_divided_by_a_constant_is_served(options):
    model, data = mlp(), padded(8, [1, 6])
    rows = torch.cat([r.flatten(1) for r in one_by_one(model, data, token_sum).values()], 1)
    info = surgeon_of(model, gs.UPGrad(), **options).step(batch=data, loss=token_sum)
    torch.testing.assert_close(info.gramian, rows @ rows.mT, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [shares, to_the_mean])
def test_both_batches_go_apart_where_a_pass_of_both_differs(loss):
    start, forget, retain = mlp(), weighted(3), weighted(4)
    infos = []
    for together in (None, False):
        surgeon = surgeon_of(copy.deepcopy(start), gs.OrthoGrad(), together=together)
        infos.append(surgeon.step(forget=forget, retain=retain, loss=loss))
    assert torch.equal(infos[0].gramian, infos[1].gramian)
    assert infos[0].forget_loss == pytest.approx(
        float(loss(start, forget).detach().mean()), rel=1e-12
    )
    surgeon = surgeon_of(start, gs.OrthoGrad(), together=True)
    with pytest.raises(gs.InputError, match=r"together: loss of a sample .*together=False"):
        surgeon.step(forget=forget, retain=retain, loss=loss)


@pytest.mark.parametrize(
    "options,calls",
    [({"rows": "stored"}, [3, 1, 1, 1]), ({"micro_batch": 4}, [4, 2, 2]), ({}, [])],
    ids=str,
)
def test_the_trial_is_made_once_for_a_loss(options, calls):
    model, data, sizes = mlp(), batch(7), []

    def loss(model, data):
        sizes.append(len(data[0]))
        return classification(model, data)

    surgeon = surgeon_of(model, gs.UPGrad(), **options)
    first, later = [], []
    for seen in (first, later, later):
        sizes.clear()
        surgeon.step(batch=data, loss=lambda m, b: loss(m, b))  # made anew at each step
        seen[:] = sizes
    assert sorted(first) == sorted(later + calls)


def test_losses_are_told_apart():
    def scaled(factor):
        return lambda model, data: factor * classification(model, data)

    def wrapped(inner):
        return lambda model, data: inner(model, data)

    class Loss(nn.Module):
        def forward(self, model, data):
            return classification(model, data)

    made = Loss()
    assert apart.identity(scaled(1.0)) == apart.identity(scaled(2.0))
    assert apart.identity(wrapped(softmax)) != apart.identity(wrapped(shares))
    assert apart.identity(functools.partial(softmax, 1)) != apart.identity(softmax)
    assert apart.identity(made) == apart.identity(made) != apart.identity(Loss())
    assert apart.identity(made.forward) == apart.identity(made.forward)
    assert apart.identity(made.forward) != apart.identity(Loss().forward)


class Noisy(nn.Module):
    """Dropout, random numbers of Python's, and a count of calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 4)).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layers(x) * (1 + 0.1 * random.random() if self.training else 1)


@pytest.mark.parametrize("options", [{"rows": "stored"}, {"micro_batch": 3}, {"together": True}])
def test_dropout_is_not_taken_for_coupling(options):
    model = Noisy()
    data = {"forget": batch(4), "retain": batch(5)}
    surgeon = surgeon_of(model, gs.OrthoGrad(), **options)
    surgeon.step(**data, loss=classification)
    assert all(module.training for module in model.modules())
    coupled = {name: weighted(5) for name in data}
    with pytest.raises(gs.InputError, match="depends on the others"):  # found in eval mode
        surgeon.step(**coupled, loss=shares)
    assert all(module.training for module in model.modules())


def test_the_trial_leaves_random_numbers_modes_and_buffers():
    model, data = Noisy(), batch(5)
    states = torch.get_rng_state(), random.getstate()
    found = apart.in_parts(model, classification, data, 1)
    assert found.coupled is None
    assert list(found.moves) == ["calls"]
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("far", [1.0, 30.0])
def test_rounding_is_not_taken_for_coupling(dtype, far):
    # cross-entropies near zero, or of large logits: their roundings are larger than they are
    layers = [nn.Linear(200, 200) if k % 2 else nn.Tanh() for k in range(6)]
    model = nn.Sequential(nn.Linear(40, 200), *layers, nn.Linear(200, 50)).to(dtype)
    x = torch.randn(9, 40).to(dtype)

    def loss(model, data):
        logits = far * model(data[0])
        return F.cross_entropy(logits, logits.argmax(1), reduction="none")

    for most in (1, 2):
        assert apart.in_parts(model, loss, (x,), most).coupled is None
    coupled = lambda m, d: (loss(m, d) + 1) / len(d[0])  # noqa: E731
    for most in (1, 2):
        assert apart.in_parts(model, coupled, (x,), most).coupled is not None


@pytest.mark.parametrize("value", [1e-2, 1e-4, 3e-7])
@pytest.mark.parametrize("units,coupled", [(1, False), (300, True)])
def test_a_loss_near_zero_may_have_the_steps_of_the_numbers_it_is_made_of(value, units, coupled):
    """As cross-entropy of a sample that a model is sure of, log(1 + x): its last place is that of
    1, in which a pass of other samples may end elsewhere, and parameters move it only by whole
    steps."""
    model = nn.Linear(6, 1, bias=False)
    x = torch.rand(5, 6) + 0.5
    with torch.no_grad():
        model.weight.fill_(value / 6)

    def loss(model, batch):
        away = units * torch.finfo(torch.float32).eps * (len(batch) > 1)
        return ((1 + model(batch)[:, 0]) + away) - 1

    found = apart.in_parts(model, loss, x, 1).coupled
    assert (found is not None) == coupled, found


def test_autocast_inside_the_loss_is_rounding_too():
    model = nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 5))
    data = torch.randn(9, 40), torch.randint(5, (9,))

    def loss(model, data):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return classification(model, data)

    assert apart.in_parts(model, loss, data, 1).coupled is None
    assert apart.in_parts(model, lambda m, d: loss(m, d) / len(d[0]), data, 1).coupled is not None


def test_a_loss_that_takes_no_few_samples_goes_untried():
    def fixed(model, data):
        if len(data[0]) != 4:
            raise ValueError("four at a time")
        return classification(model, data)

    model, data = mlp(), batch(8)
    info = surgeon_of(model, gs.Mean(), micro_batch=4).step(batch=data, loss=fixed)
    assert len(info.losses) == 8


def test_the_samples_tried_are_those_that_differ_in_padding():
    lengths = torch.tensor([9, 9, 2, 9, 9, 5, 9, 9])
    mask = (torch.arange(9) < lengths[:, None]).long()
    assert apart.few((mask,), 3)[0].sum(1).tolist() == [9, 9, 2]
    plain = torch.ones(8, 3) + torch.arange(8)[:, None].flip(0)
    assert len(apart.few((plain,), 3)[0].unique(dim=0)) == 3
