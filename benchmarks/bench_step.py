"""A whole OrthoGrad step on explicit rows against the plain-torch one and a plain training step."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import gradsurgery as gs

MODELS = {
    "MLP 0.7M": lambda: nn.Sequential(
        nn.Linear(256, 640), nn.ReLU(), nn.Linear(640, 640), nn.ReLU(), nn.Linear(640, 160)
    ),
    "CNN 0.1M": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 16, 16)),
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 100)),
    ),
}


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def reference_update(model, forget, retain, alpha=0.5):
    """Per-sample gradients by vmap(grad), the projection by Householder QR."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    rows = vmap(grad(loss), in_dims=(None, 0, 0))
    retain_rows = torch.cat([g.flatten(1) for g in rows(parameters, *retain).values()], dim=1)
    mean = torch.autograd.grad(losses(model, forget).mean(), list(model.parameters()))
    g_u = torch.cat([g.flatten() for g in mean])
    q = torch.linalg.qr(retain_rows.mT).Q
    return alpha * retain_rows.mean(0) - (1 - alpha) * (g_u - q @ (q.mT @ g_u))


@pytest.mark.parametrize("name", MODELS)
def bench_orthograd_step(compare, name):
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    forget, retain = [(torch.randn(16, 256), torch.randint(100, (16,))) for _ in range(2)]
    both = tuple(torch.cat(pair) for pair in zip(forget, retain, strict=True))
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad())

    def plain():
        optimizer.zero_grad()
        losses(model, both).mean().backward()
        optimizer.step()

    def reference():
        update = reference_update(model, forget, retain)
        for parameter, part in zip(
            model.parameters(), update.split([p.numel() for p in model.parameters()]), strict=True
        ):
            parameter.grad = part.view_as(parameter)
        optimizer.step()

    exact = reference_update(model.double(), *[(x.double(), y) for x, y in (forget, retain)])
    model.float()
    reference()
    update = torch.cat([p.grad.flatten() for p in model.parameters()])
    kept = {}
    step = optimizer.step
    optimizer.step = lambda: kept.update(
        g=torch.cat([p.grad.flatten() for p in model.parameters()])
    )
    surgeon.step(forget=forget, retain=retain, loss=losses)
    optimizer.step = step
    error = ((kept["g"] - exact).norm() / exact.norm()).item()
    size = update.numel()
    compare(
        lambda: surgeon.step(forget=forget, retain=retain, loss=losses),
        {"vmap(grad) + QR": reference, "plain step": plain},
        nbytes=4 * 17 * size,
        error=error,
    )
