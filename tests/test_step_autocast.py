"""Rows added under autocast: rounding of sums over samples is not taken for a hook's work."""

import copy

import pytest
import torch

import gradsurgery as gs
from tests.models import batch, mlp


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


def hooked(hook):
    def between(h):
        if h.requires_grad:
            h.register_hook(hook)
        return h

    return between


def in_autocast(between):
    def loss(model, data):
        x, y = data
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model[2](between(model[1](model[0](x))))
        return torch.nn.functional.cross_entropy(logits.float(), y, reduction="none")

    return loss


def in_float32(model, data):
    """In a model in float64."""
    h = Identity.apply(torch.tanh(model[0](data[0]))).float()
    logits = torch.nn.functional.linear(h, model[2].weight.float(), model[2].bias.float())
    return torch.nn.functional.cross_entropy(logits.double(), data[1], reduction="none")


def as_(dtype, size):
    x, y = batch(size)
    return x.to(dtype), y


@pytest.mark.parametrize(
    "loss,dtype",
    [
        (in_autocast(hooked(lambda g: g * 1)), torch.float32),
        (in_autocast(Identity.apply), torch.float32),
        (in_float32, torch.float64),
    ],
    ids=["hook", "function", "float32 in float64"],
)
@pytest.mark.parametrize("rule", [gs.NGDiff, gs.OrthoGrad])
def test_a_sum_over_samples_may_be_rounded(rule, loss, dtype):
    models = [mlp().to(dtype)]
    models.append(copy.deepcopy(models[0]))
    data = {"forget": as_(dtype, 5), "retain": as_(dtype, 6)}
    surgeons = [gs.Surgeon(m, torch.optim.SGD(m.parameters(), lr=0.1), rule()) for m in models]
    surgeons[0].add(**data, loss=loss)
    infos = [surgeons[0].step(), surgeons[1].step(**data, loss=loss)]
    torch.testing.assert_close(infos[0].gramian, infos[1].gramian, rtol=2e-2, atol=1e-4)


def test_a_hook_that_clips_is_refused_there_too():
    model = mlp().float()
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), gs.OrthoGrad())
    model[0].weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    with pytest.raises(gs.InputError, match=r"0\.weight.* not linear in its gradient"):
        surgeon.add(forget=as_(torch.float32, 6), loss=in_autocast(lambda h: h))
