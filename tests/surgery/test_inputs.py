"""OWM and NullSpace: updates off the inputs observed, and the moments they are made of."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from gradsurgery.capture import tape


class Turned(nn.Module):
    """y = x W, the weight as GPT-2 keeps it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


def loss(model, batch):
    return model(batch[0]).flatten(1).square().sum(1)


def moments(model, x):
    with tape(model) as recorder:
        losses = loss(model, (x,))
    jacobian = recorder.jacobian(losses)
    return dict(zip(jacobian.names, jacobian.input_moments(), strict=True))


def gram(x):
    x = x.reshape(-1, x.shape[-1]).double()
    return x.mT @ x


@pytest.mark.parametrize("tokens", [(), (3,)])
def test_moments_are_those_of_the_inputs(tokens):
    x = torch.randn(6, *tokens, 5).double()
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), Turned(4, 3)).double()
    found = moments(model, x)
    hidden = model[:2](x).detach()
    for name, dim, expected in (("0.weight", 1, gram(x)), ("2.weight", 0, gram(hidden))):
        assert found[name].dim == dim
        torch.testing.assert_close(found[name].matrix, expected)
    assert found["0.bias"] is None


@pytest.mark.parametrize("stride", [1, 2])
def test_moments_of_a_convolution_are_of_its_patches(stride):
    model = nn.Conv2d(2, 3, 3, stride, padding=1).double()
    x = torch.randn(4, 2, 7, 6).double()
    patches = F.unfold(x, 3, padding=1, stride=stride).mT
    torch.testing.assert_close(moments(model, x)["weight"].matrix, gram(patches))


def test_what_multiplies_no_inputs_has_no_moment():
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    found = moments(model, torch.randint(9, (5, 3)))
    assert [name for name, part in found.items() if part is not None] == ["2.weight"]
    grouped = nn.Conv1d(4, 4, 3, groups=2)
    assert moments(grouped, torch.randn(2, 4, 8))["weight"] is None


def test_a_weight_used_twice_sees_both_inputs():
    layer = nn.Linear(4, 4).double()
    x = torch.randn(5, 4).double()
    found = moments(nn.Sequential(layer, layer), x)
    torch.testing.assert_close(found["0.weight"].matrix, gram(x) + gram(layer(x).detach()))


def test_owm_is_the_recursion():
    layer = nn.Linear(5, 3).double()
    batches, alpha = [torch.randn(4, 5).double() for _ in range(3)], 0.1
    owm = gs.OWM(layer, alpha=alpha)
    projector = torch.eye(5).double()
    for x in batches:
        owm.observe((x,), loss)
        for row in x:
            k = projector @ row
            projector = projector - torch.outer(k, k) / (alpha + row @ k)
    update = [torch.randn(3, 5).double(), torch.randn(3).double()]
    weight, bias = owm(["weight", "bias"], update)
    torch.testing.assert_close(weight, update[0] @ projector)
    assert not bias.any()


def test_one_sample_is_seen_as_much_as_it_is():
    layer, x = nn.Linear(5, 3).double(), torch.randn(3, 4, 5).double()
    together, apart = gs.OWM(layer), gs.OWM(layer)
    together.observe((x,), loss)
    for one in x:
        apart.observe((one[None],), loss)
    seen = [owm.state_dict()["weight"][1] for owm in (together, apart)]
    torch.testing.assert_close(*(rows.mT @ rows for rows in seen))
    torch.testing.assert_close(seen[0].mT @ seen[0], gram(x)[None])


@pytest.mark.parametrize("layer", [nn.Linear, Turned])
@pytest.mark.parametrize("rule", [gs.Mean(), gs.UPGrad(), gs.SignAgreement(threshold=0.0)])
def test_outputs_on_observed_data_stay(layer, rule):
    torch.manual_seed(1)
    model = nn.Sequential(layer(20, 16), nn.Tanh(), layer(16, 3)).double()
    old, new = torch.randn(6, 20).double(), torch.randn(8, 20).double()
    kept = gs.NullSpace(model, rtol=1e-9)
    kept.observe((old,), loss)
    before_old, before_new = model(old).detach(), model(new).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    surgeon = gs.Surgeon(model, optimizer, rule, project=kept)
    for _ in range(5):
        surgeon.step(batch=(new,), loss=loss)
    torch.testing.assert_close(model(old).detach(), before_old, rtol=0, atol=1e-9)
    assert (model(new).detach() - before_new).abs().max() > 1e-2


def test_owm_moves_observed_outputs_less():
    x, y = torch.randn(6, 20).double(), torch.randn(8, 20).double()
    moved = []
    for alpha in (None, 1.0, 1e-4):
        torch.manual_seed(1)
        model = nn.Linear(20, 3).double()
        owm = None if alpha is None else gs.OWM(model, alpha=alpha)
        if owm is not None:
            owm.observe((x,), loss)
        before = model(x).detach()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        gs.Surgeon(model, optimizer, gs.Mean(), project=owm).step(batch=(y,), loss=loss)
        moved.append(float((model(x) - before).detach().norm()))
    assert moved[1] < 0.2 * moved[0]
    assert moved[2] < 1e-3 * moved[1]


def test_forgetting_is_kept_off_observed_inputs_too():
    model = nn.Linear(20, 3).double()
    old, forget, retain = (torch.randn(4, 20).double() for _ in range(3))
    kept = gs.NullSpace(model)
    kept.observe((old,), loss)
    before = model(old).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(), project=kept)
    surgeon.step(forget=(forget,), retain=(retain,), loss=loss)
    torch.testing.assert_close(model(old).detach(), before, rtol=0, atol=1e-12)


def test_others_are_frozen_or_left():
    layer = nn.Linear(5, 3)
    update = [torch.ones(3, 5), torch.ones(3)]
    unseen = gs.OWM(layer)(["weight", "bias"], update)
    assert all(torch.equal(a, b) for a, b in zip(unseen, update, strict=True))
    for others, expected in (("freeze", 0.0), ("leave", 1.0)):
        kept = gs.NullSpace(layer, others=others)
        kept.observe((torch.randn(2, 5),), loss)
        assert kept(["weight", "bias"], update)[1].tolist() == [expected] * 3


def test_goes_on_from_its_state():
    model = nn.Linear(5, 3)
    kept, resumed = gs.OWM(model), gs.OWM(model)
    kept.observe((torch.randn(2, 5),), loss)
    resumed.load_state_dict(copy.deepcopy(kept.state_dict()))
    update = [torch.randn(3, 5), torch.randn(3)]
    for a, b in zip(*(k(["weight", "bias"], update) for k in (kept, resumed)), strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in model.parameters())


def test_refuses_what_makes_no_sense():
    model = nn.Linear(5, 3)
    for call, message in (
        (lambda: gs.OWM([1]), "model must be a Module, got list"),
        (lambda: gs.OWM(model, alpha=-1e-3), "alpha must be at least 0, got -0.001"),
        (lambda: gs.NullSpace(model, rtol=1.0), r"rtol must be in \[0, 1\), got 1.0"),
        (lambda: gs.OWM(model, others="keep"), "others must be one of .* got 'keep'"),
        (
            lambda: gs.OWM(model).load_state_dict({"x": (1, torch.eye(2))}),
            "state is of a parameter x, which the model has not",
        ),
        (
            lambda: gs.Surgeon(model, torch.optim.SGD(model.parameters()), gs.Mean(), project=1),
            "project must be an OWM or a NullSpace, got int",
        ),
    ):
        with pytest.raises(gs.InputError, match=message):
            call()
