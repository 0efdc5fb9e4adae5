"""What acts on losses otherwise than by products with its inputs is found by trying."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from gradsurgery.surgery.trial import acting_otherwise


def found(function, parameters, moments):
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        names = acting_otherwise(parameters, moments, function, function())
    assert all(torch.equal(p, kept[name]) for name, p in parameters.items())
    return names


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_products_are_told_from_norms(dtype, scale):
    torch.manual_seed(0)
    x = torch.randn(4, 12).to(dtype)
    weight = nn.Parameter((scale * torch.randn(3, 12)).to(dtype))
    moments = {"w": {1: (x.double().mT @ x.double())[None]}}
    assert found(lambda: (x @ weight.mT + 1).square().sum(), {"w": weight}, moments) == []
    norm = found(lambda: (x @ weight.mT + weight.norm()).square().sum(), {"w": weight}, moments)
    assert norm == ["w"]


def test_only_what_acts_is_named():
    torch.manual_seed(0)
    named = {name: nn.Parameter(torch.randn(3).double()) for name in "abc"}
    a, b, c = named.values()
    assert found(lambda: a.sum() + 0 * b.sum() + 1, named, {name: {} for name in "abc"}) == ["a"]
    for name in "ab":  # each alone does nothing
        named[name].data.zero_()
    product = found(lambda: (a * b).sum() + 0 * c.sum() + 1, named, {name: {} for name in "abc"})
    assert product == ["a", "b", "c"]


def test_what_a_parameter_is_not_seen_by_may_do_anything():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 4).double())
    picked = torch.tensor([1, 3])
    counts = torch.bincount(picked, minlength=5).double().view(-1, 1, 1)
    assert found(lambda: weight[picked].square().sum(), {"w": weight}, {"w": {0: counts}}) == []
    assert found(lambda: weight.square().sum(), {"w": weight}, {"w": {0: counts}}) == ["w"]


class Scaled(nn.Module):
    """Outputs times a norm that no gradient flows through, where a sample says so."""

    def __init__(self, inputs=6):
        super().__init__()
        self.w, self.o = nn.Linear(inputs, 8), nn.Linear(8, 3)

    def forward(self, x, hidden=None):
        norm = self.w.weight.detach().norm()
        scale = norm if hidden is None else torch.where(hidden, norm, 1)[:, None]
        return self.o(torch.tanh(self.w(x))) * scale


def masked(model, batch):
    return F.cross_entropy(model(*batch[:-1]), batch[-1], reduction="none", ignore_index=-100)


def case(samples, inputs=6):
    torch.manual_seed(0)
    return Scaled(inputs).double(), torch.randn(samples, inputs).double()


@pytest.mark.parametrize("samples", [2, 6, 20], ids=["few", "all directions", "more"])
def test_a_first_sample_whose_loss_is_flat_hides_nothing(samples):
    model, x = case(samples)
    y = torch.tensor([-100, *(1 for _ in range(samples - 1))])
    kept = gs.NullSpace(model)
    kept.observe((x, y), masked)
    assert kept.not_held == ["w.weight", "w.bias", "o.bias"]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_one_sample_alone_meets_is_found(at):
    model, x = case(3)
    hidden = torch.arange(3) == at
    kept = gs.NullSpace(model)
    kept.observe((x, hidden, torch.ones(3, dtype=torch.long)), masked)
    assert kept.not_held == ["w.weight", "w.bias", "o.bias"]
    kept = gs.NullSpace(model)
    kept.observe((x, torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.long)), masked)
    assert kept.not_held == ["w.bias", "o.bias"]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: F.relu(-50 - model(batch[0])).sum(1),  # a margin that is met
        lambda model, batch: masked(model, (batch[0], torch.full((len(batch[0]),), -100))),
    ],
    ids=["margin", "ignored"],
)
def test_losses_that_show_nothing_are_refused(loss, samples):
    model, x = case(samples)
    kept = gs.OWM(model)
    with pytest.raises(gs.InputError, match="loss is flat on the data observed"):
        kept.observe((x,), loss)
    assert kept.not_held == []


def test_many_samples_of_few_directions_are_products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x = torch.randn(64, 40).double() * 10.0 ** -torch.arange(40).div(4.0).double()
    kept = gs.NullSpace(model)
    kept.observe((x, torch.ones(64, dtype=torch.long)), masked)
    assert kept.not_held == ["0.bias", "2.bias"]


def test_a_norm_is_found_under_autocast():
    model, x = case(3)
    model, x = model.float(), x.float()
    kept = gs.NullSpace(model)
    with torch.autocast("cpu", torch.bfloat16):
        kept.observe((x,), lambda m, b: m(b[0]).float().square().sum(1))
    assert kept.not_held == ["w.weight", "w.bias", "o.bias"]
