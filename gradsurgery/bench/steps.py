"""Whole OrthoGrad steps and what they are timed beside, and their update in float64.

A step has some retain samples, a row each, and as many forget samples, one row, of a whole model;
it computes the update and hands it to the optimizer. The plain step trains on the mean of all.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradsurgery as gs
from gradsurgery.bench.models import Batch, loss

PLAIN, TORCHJD, VMAP, QR = "plain step", "TorchJD autogram", "vmap(grad)", "vmap(grad) + QR"
ALPHA = 0.5  # OrthoGrad's
Step = Callable[[], object]


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def together(*batches: Sequence[Tensor]) -> Batch:
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return x, y


def ones(batch: Batch) -> list[Batch]:
    """A batch as batches of one sample."""
    return [(x[None], y[None]) for x, y in zip(*batch, strict=True)]


def exact_rows(model: nn.Module, samples: Sequence[Batch]) -> Tensor:
    """Gradients of each batch's mean loss in float64, by a backward pass each."""
    model = copy.deepcopy(model).double()
    held = parameters(model)
    shape = len(samples), sum(p.numel() for p in held)
    rows = torch.empty(shape, dtype=torch.float64, device=held[0].device)
    for row, (x, y) in zip(rows, samples, strict=True):
        x = x.double() if x.is_floating_point() else x
        parts = torch.autograd.grad(loss(model, (x, y)).mean(), held)
        torch.cat([part.flatten() for part in parts], out=row)
    return rows


def exact_update(model: nn.Module, forget: Batch, retain: Batch) -> Tensor:
    """By the normal equations, which float64 affords at these rows' conditions."""
    rows = exact_rows(model, [forget, *ones(retain)])
    g_u, rows = rows[0], rows[1:]
    coefficients = torch.linalg.solve(rows @ rows.mT, rows @ g_u)
    return ALPHA * rows.mean(0) - (1 - ALPHA) * (g_u - coefficients @ rows)


def distance(value: Tensor, exact: Tensor) -> float:
    return ((value - exact).norm() / exact.norm()).item()


def update_of(step: Step, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """The gradient that the optimizer is handed."""
    kept: list[Tensor] = []

    def keep(*_: object) -> None:
        kept.append(torch.cat([p.grad.flatten() for p in parameters(model) if p.grad is not None]))

    handle = optimizer.register_step_pre_hook(keep)
    try:
        step()
    finally:
        handle.remove()
    return kept[0]


def per_sample(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Gradients of each sample by torch.func, one block [B, *p.shape] per parameter."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(lambda x: functional_call(model, values, (x,)), (x[None], y[None]))[0]

    with sdpa_kernel(SDPBackend.MATH):  # vmap would run the CPU's own kernel sample by sample
        return list(vmap(grad(one), in_dims=(None, 0, 0))(trained, *batch).values())


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, forget: Batch, retain: Batch
) -> Step:
    both = together(forget, retain)

    def step() -> None:
        loss(model, both).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def torchjd_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, forget: Batch, retain: Batch
) -> Step:
    """As its documentation has it: the Gramian, weights, the losses backward with these."""
    from torchjd.autogram import Engine

    both, rule = together(forget, retain), gs.OrthoGrad(alpha=ALPHA)
    engine = Engine(model, batch_dim=0)

    def step() -> None:
        losses = loss(model, both)
        weights = rule.weights(engine.compute_gramian(losses), slice(len(forget[0])))
        losses.backward(weights.to(losses.dtype))
        optimizer.step()
        optimizer.zero_grad()

    return step


def qr_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, forget: Batch, retain: Batch
) -> Step:
    """Per-sample gradients by vmap(grad), the projection by Householder QR."""
    held = parameters(model)

    def step() -> None:
        rows = torch.cat([block.flatten(1) for block in per_sample(model, retain)], dim=1)
        parts = torch.autograd.grad(loss(model, forget).mean(), held)
        g_u = torch.cat([g.flatten() for g in parts])
        q = torch.linalg.qr(rows.mT).Q
        update = ALPHA * rows.mean(0) - (1 - ALPHA) * (g_u - q @ (q.mT @ g_u))
        for p, part in zip(held, update.split([p.numel() for p in held]), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    forget: Batch,
    retain: Batch,
    **options: object,
) -> Step:
    """`options` are `Surgeon`'s."""
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(alpha=ALPHA), **options)  # pyright: ignore[reportArgumentType]
    return lambda: surgeon.step(forget=forget, retain=retain, loss=loss)


RIVALS = {PLAIN: plain_step, TORCHJD: torchjd_step, QR: qr_step}
