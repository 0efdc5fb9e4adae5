"""What acts on losses otherwise than by products with its inputs is found by trying."""

import pytest
import torch
from torch import nn

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
