"""What is kept of the rows of samples while others are added."""

import copy

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.test_step_add import HOLDS, cut, surgeon_of


def lora(width=32, rank=2):
    """Narrow beside their tokens, as adapters are."""
    model = nn.Sequential(
        nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False), nn.LayerNorm(width)
    )
    return model.double()


def squares(model, x):
    return model(x).pow(2).mean((1, 2))


def held_bytes(surgeon):
    storages = {}
    for each in surgeon._added._samples:
        for use in (use for uses in each.jacobian._uses for use in uses):
            for tensor in use.values:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    for sums in surgeon._added._sums.values():
        for total in sums._totals:
            storages[total.data_ptr()] = total.nbytes
    return sum(storages.values())


def test_rows_smaller_than_pairs_are_kept_in_their_place():
    model = lora()
    samples, count = 3, sum(p.numel() for p in model.parameters())
    sizes = {}
    for hold in HOLDS:
        surgeon = surgeon_of(model, gs.OrthoGrad(), hold=hold)
        for _ in range(4):
            x = torch.randn(samples, 50, 32).double()
            surgeon.add(forget=x, retain=x, loss=squares)
        surgeon._added._fold()
        sizes[hold] = held_bytes(surgeon)
    # the rows of all samples, and one sum for all forget batches
    assert sizes["auto"] == sizes["rows"] == 8 * count * (4 * samples + 1)
    assert sizes["pairs"] > 10 * sizes["auto"]


def test_pairs_smaller_than_rows_are_kept_as_they_are():
    model = nn.Linear(64, 64, bias=False).double()
    surgeon = surgeon_of(model, gs.PCGrad())
    for _ in range(2):
        surgeon.add(batch=torch.randn(3, 2, 64).double(), loss=squares)
    surgeon._added._fold()
    assert held_bytes(surgeon) == 2 * 3 * 2 * (64 + 64) * 8


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_rows_that_float32_would_lose_are_formed_in_float64(size):
    # gradients of each sample are products of tokens, near the ends of float32's range
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    x = torch.randn(4, 30, 4) * size

    def loss(net, given):
        return (net(given) * size).sum((1, 2))

    exact = copy.deepcopy(model).double()
    rows = torch.autograd.functional.jacobian(
        lambda w: ((x.double() @ w.T) * size).sum((1, 2)), exact.weight.detach()
    ).flatten(1)
    surgeon = surgeon_of(model, gs.PCGrad(), hold="rows")
    for part in cut(x, 1, 3):
        surgeon.add(batch=part, loss=loss)
    gram = surgeon.backward().gramian
    torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-5, atol=0)
