"""Surgeon on captured rows: the numbers of stored rows, and one forward pass where batches fit."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from tests.models import MODELS, batch, classification, make, mlp

RULES = {
    "plain": {},
    "module": {"granularity": "module"},
    "tensor": {"granularity": "tensor"},
    "small tensors left": {"granularity": "tensor", "small_tensors": "leave"},
    "retain mean": {"retain": "mean"},
    "preconditioned": {"precondition": "optimizer"},
    "preconditioned tensors": {"precondition": "optimizer", "granularity": "tensor"},
    "refined": {"refine": 1},
    "refined tensors": {"refine": 2, "granularity": "tensor", "retain": "mean"},
}


def steps(model, rule, forget, retain, loss, count=2, **way):
    """What `count` steps on a copy of the model say, and its parameters afterwards."""
    twin = copy.deepcopy(model)
    # eps: Adam would turn the roundings in a gradient that is zero into a whole step
    optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], eps=1e-2)
    surgeon = gs.Surgeon(twin, optimizer, rule, **way)
    infos = [surgeon.step(forget=forget, retain=retain, loss=loss) for _ in range(count)]
    return infos, [p.detach() for p in twin.parameters()]


def assert_same(found, expected):
    for info, other in zip(found[0], expected[0], strict=True):
        numbers = info.to_dict(), other.to_dict()
        for name in numbers[0].keys() - {"frozen", "seconds"}:
            value, wanted = (side[name] for side in numbers)
            assert value == pytest.approx(wanted, rel=1e-9, abs=1e-9), name
        assert info.frozen == other.frozen
    for a, b in zip(found[1], expected[1], strict=True):
        assert (a - b).abs().max() <= 1e-9


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_captured_steps_are_those_of_stored_rows(name, rule, together):
    model, forget, loss = make(name, size=3)
    retain = make(name, size=5)[1]
    rule = gs.OrthoGrad(alpha=0.4, **RULES[rule])
    if "attention" in name:  # softmax has no gradient of a shift: a tensor of roundings has no rank
        model.key.bias.requires_grad_(False)
    if name == "partial":  # the optimizer's metric needs all of its parameters in use
        model.unused.requires_grad_(False)
    data = forget, retain, loss
    expected = steps(model, rule, *data, rows="stored")
    assert_same(steps(model, rule, *data, together=together), expected)


def weighted(model, data):
    """Of samples with a mask of their own, in any of the structures below."""
    x, y, *rest = data.values() if isinstance(data, dict) else data
    return classification(model, (x.double(), y)) * (rest[0] if rest else 1)


def pair(first, second):
    """Batches made alike, but for one difference."""
    x, y = first
    return {
        "alike": (first, second, 1),
        "alike, in a dict": (dict(enumerate(first)), dict(enumerate(second)), 1),
        "dtype": ((x.float(), y), second, 2),
        "structure": ((x, y, torch.ones(len(y)).double()), second, 2),
        "container": ({"x": x, "y": y}, second, 2),
        "order": ({"x": x, "y": y}, dict(zip("zy", second, strict=True)), 2),
        "not asked for": (first, second, 2),
    }


@pytest.mark.parametrize("difference", pair(batch(1), batch(1)))
def test_batches_that_fit_share_a_forward_pass(difference):
    model = mlp()
    forget, retain, passes = pair(batch(2), batch(3))[difference]
    sizes = []

    def loss(model, data):
        sizes.append(gs.jacobian.batch_size(data))
        return weighted(model, data)

    way = {"together": False} if difference == "not asked for" else {}
    found = steps(model, gs.OrthoGrad(), forget, retain, loss, count=2, **way)
    # before the first pass of both is tried whether the losses are the same in one of each
    assert sizes == ([5, 2, 3, 5, 5] if passes == 1 else [2, 3, 2, 3])
    expected = steps(model, gs.OrthoGrad(), forget, retain, weighted, count=2, rows="stored")
    assert_same(found, expected)


def test_sequences_of_other_lengths_take_a_pass_each():
    model, forget, loss = make("attention", size=3)
    retain = {name: ids[:, :4] for name, ids in make("attention", size=4)[1].items()}
    data = forget, retain, loss
    expected = steps(model, gs.OrthoGrad(), *data, rows="stored")
    assert_same(steps(model, gs.OrthoGrad(), *data), expected)


def test_losses_past_a_ceiling_are_flat_in_both():
    def capped(model, data):
        return torch.minimum(classification(model, data[:2]), data[2])

    ceilings = torch.tensor([0.0, torch.inf]), torch.full((3,), torch.inf)
    data = [(*batch(len(c)), c.double()) for c in ceilings]
    expected = steps(mlp_ := mlp(), gs.OrthoGrad(), *data, capped, rows="stored")
    assert_same(steps(mlp_, gs.OrthoGrad(), *data, capped), expected)


@pytest.mark.parametrize("way", [{}, {"together": False}, {"rows": "stored"}], ids=str)
def test_the_update_is_the_only_gradient_the_optimizer_sees(way):
    model, (forget, retain) = mlp(), (batch(2), batch(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    seen = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    rule = gs.OrthoGrad()
    parts = [
        gs.DenseJacobian.from_model(model, data, classification, rows=rows)
        for data, rows in ((forget, "mean"), (retain, "samples"))
    ]
    expected = rule(gs.concat(parts))
    gs.Surgeon(model, optimizer, rule, **way).step(
        forget=forget, retain=retain, loss=classification
    )
    for grad, update in zip(seen.values(), expected, strict=True):
        torch.testing.assert_close(grad, update, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", [{}, {"rows": "stored"}], ids=str)
def test_a_parameter_frozen_later_stays(way):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(precondition="optimizer"), **way)
    data = {"forget": batch(2), "retain": batch(3), "loss": classification}
    surgeon.step(**data)
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    surgeon.step(**data)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)


@pytest.mark.parametrize("way", [{}, {"together": False}, {"rows": "stored"}], ids=str)
@pytest.mark.parametrize(
    "model,loss,message",
    [
        (mlp, lambda m, b: F.cross_entropy(m(b[0]), b[1]), r"one value per sample, \[\d\], got"),
        (mlp, lambda m, b: classification(m, b).detach(), "does not depend on the model's para"),
        (
            lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double(),
            classification,
            "BatchNorm",
        ),
    ],
    ids=["reduced", "detached", "coupled"],
)
def test_refuses_what_has_no_rows(model, loss, message, way):
    model = model()
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), gs.OrthoGrad(), **way)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gs.InputError, match=message):
        surgeon.step(forget=batch(4), retain=batch(3), loss=loss)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_one_part_that_depends_on_no_parameter_is_refused():
    # in a pass of their own, detached losses do not hide behind the others
    model = mlp()
    surgeon = gs.Surgeon(
        model, torch.optim.SGD(model.parameters(), lr=0.1), gs.OrthoGrad(), together=False
    )

    def loss(model, data):
        losses = classification(model, data)
        return losses.detach() if len(losses) == 2 else losses

    with pytest.raises(gs.InputError, match="loss does not depend on the model's parameters"):
        surgeon.step(forget=batch(2), retain=batch(3), loss=loss)


def test_refuses_rows_of_no_kind():
    with pytest.raises(gs.InputError, match=r"rows must be one of .*stored.*, got 'dense'"):
        gs.Surgeon(mlp(), torch.optim.SGD(mlp().parameters()), gs.OrthoGrad(), rows="dense")


def test_convolutions_of_channels_last():
    """Whose gradients lie in memory as the images do."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3)).double()

    def loss(model, batch):
        return model(batch[0]).flatten(1).square().mean(1)

    forget, retain = ((torch.randn(4, 3, 8, 8).double(),) for _ in range(2))
    rule = gs.OrthoGrad()
    expected = steps(model, rule, forget, retain, loss, rows="stored")
    turned = model.to(memory_format=torch.channels_last)
    forget, retain = ((x.to(memory_format=torch.channels_last),) for (x,) in (forget, retain))
    for together in (True, False):
        assert_same(steps(turned, rule, forget, retain, loss, together=together), expected)
