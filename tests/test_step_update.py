"""What a step's update is in `.grad`: as a backward pass would leave it, on every path."""

import pytest
import torch
from torch import nn

import gradsurgery as gs

WAYS = {
    "captured": {},
    "in parts": {"micro_batch": 3},
    "stored": {"rows": "stored"},
}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.mark.parametrize("rule", [gs.Sum, gs.PCGrad, gs.GradDrop])
@pytest.mark.parametrize("dtype,scale", [(torch.float16, 3e4), (torch.float32, 2e38)])
def test_an_update_that_overflows_moves_nothing(rule, dtype, scale, way):
    model = nn.Linear(2, 1, bias=False).to(dtype)
    before = model.weight.detach().clone()
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=1e-6), rule(), **way)
    with pytest.raises(gs.NonFiniteError, match=f"overflows {dtype}"):
        surgeon.step(loss=lambda m, x: m(x)[:, 0] * scale, batch=torch.ones(8, 2, dtype=dtype))
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_an_update_whose_elements_fit_is_taken(way):
    """Their sum overflows, none of them does."""
    model = nn.Linear(8, 1, bias=False).half()
    before = model.weight.detach().clone()
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=1e-6), gs.Sum(), **way)
    surgeon.step(loss=lambda m, x: m(x)[:, 0] * 6e3, batch=torch.ones(8, 8).half())
    torch.testing.assert_close(model.weight, before - 0.048, rtol=0, atol=1e-3)
