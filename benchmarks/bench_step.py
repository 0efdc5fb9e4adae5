"""Whole OrthoGrad steps, and Gramians alone, against a plain step and what else makes them.

A step has 16 retain samples, a row each, and 16 forget samples, one row, of a whole model; it
computes the update and hands it to the optimizer. The plain step trains on the mean of the 32.
"""

import copy

import pytest
import torch
from models import loss, make
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchjd.autogram import Engine

import gradsurgery as gs

PLAIN, TORCHJD, VMAP, QR = "plain step", "TorchJD autogram", "vmap(grad)", "vmap(grad) + QR"

# times faster than a rival at least, and extra memory of a plain step's at most; the rivals run
# are those with a target
STEPS = {
    "transformer 384x6 T64": ({PLAIN: 1 / 1.30, TORCHJD: 2.5, QR: 5}, 1.30),
    "transformer 384x6 T196": ({PLAIN: 1 / 1.12}, 1.30),
    "transformer 768x2 T16": ({PLAIN: 1 / 1.12, TORCHJD: 6, QR: 5}, 1.30),
    "MLP 6.3M": ({PLAIN: 1 / 1.15, TORCHJD: 20, QR: 20}, 1.30),
    "LoRA 384x6 T64": ({PLAIN: 1 / 1.10}, 1.15),
    "ResNet-18 GN": ({PLAIN: 1 / 1.60}, 1.50),
    "MLP 85k": ({TORCHJD: 1}, None),
}
GRAMIANS = {  # samples, times faster at least, share of the rivals' memory at most
    "MLP 6.3M": (64, {TORCHJD: 50, VMAP: 50}, {TORCHJD: 0.05, VMAP: 0.05}),
    "MLP 85k": (32, {TORCHJD: 1}, {}),
}
ROUNDS = {"MLP 6.3M": 9, "MLP 85k": 51}  # else 7
TOLERANCE = 1e-2  # of rivals: far from another update, and a flipped ReLU is no failure


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def exact_rows(model, samples):
    """Gradients of each batch's mean loss in float64, by a backward pass each."""
    model = copy.deepcopy(model).double()
    held = parameters(model)
    rows = torch.empty(len(samples), sum(p.numel() for p in held), dtype=torch.float64)
    for row, (x, y) in zip(rows, samples, strict=True):
        x = x.double() if x.is_floating_point() else x
        parts = torch.autograd.grad(loss(model, (x, y)).mean(), held)
        torch.cat([part.flatten() for part in parts], out=row)
    return rows


def ones(batch):
    """A batch as batches of one sample."""
    return [(x[None], y[None]) for x, y in zip(*batch, strict=True)]


def exact_update(model, forget, retain, alpha=0.5):
    """By the normal equations, which float64 affords at these rows' conditions."""
    rows = exact_rows(model, [forget, *ones(retain)])
    g_u, rows = rows[0], rows[1:]
    coefficients = torch.linalg.solve(rows @ rows.mT, rows @ g_u)
    return alpha * rows.mean(0) - (1 - alpha) * (g_u - coefficients @ rows)


def distance(value, exact):
    return ((value - exact).norm() / exact.norm()).item()


def update_of(step, model, optimizer):
    """The gradient that the optimizer is handed."""
    kept = []
    handle = optimizer.register_step_pre_hook(
        lambda *_: kept.append(torch.cat([p.grad.flatten() for p in parameters(model)]))
    )
    step()
    handle.remove()
    return kept[0]


def per_sample(model, batch):
    """Gradients of each sample by torch.func, one block [B, *p.shape] per parameter."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def one(values, x, y):
        return loss(lambda x: functional_call(model, values, (x,)), (x[None], y[None]))[0]

    with sdpa_kernel(SDPBackend.MATH):  # vmap would run the CPU's own kernel sample by sample
        return list(vmap(grad(one), in_dims=(None, 0, 0))(trained, *batch).values())


def plain_step(model, optimizer, forget, retain):
    both = together(forget, retain)

    def step():
        loss(model, both).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def torchjd_step(model, optimizer, forget, retain):
    """As its documentation has it: the Gramian, weights, the losses backward with these."""
    both, rule = together(forget, retain), gs.OrthoGrad()
    engine = Engine(model, batch_dim=0)

    def step():
        losses = loss(model, both)
        weights = rule.weights(engine.compute_gramian(losses), slice(len(forget[0])))
        losses.backward(weights.to(losses.dtype))
        optimizer.step()
        optimizer.zero_grad()

    return step


def qr_step(model, optimizer, forget, retain, alpha=0.5):
    """Per-sample gradients by vmap(grad), the projection by Householder QR."""
    held = parameters(model)

    def step():
        rows = torch.cat([block.flatten(1) for block in per_sample(model, retain)], dim=1)
        g_u = torch.autograd.grad(loss(model, forget).mean(), held)
        g_u = torch.cat([g.flatten() for g in g_u])
        q = torch.linalg.qr(rows.mT).Q
        update = alpha * rows.mean(0) - (1 - alpha) * (g_u - q @ (q.mT @ g_u))
        for p, part in zip(held, update.split([p.numel() for p in held]), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()
        optimizer.zero_grad()

    return step


RIVALS = {PLAIN: plain_step, TORCHJD: torchjd_step, QR: qr_step}


def together(*batches):
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def compare_steps(compare, name, against, target=None, memory=None, **options):
    model, batches = make(name)
    forget, retain = batches(16), batches(16)
    exact = exact_update(model, forget, retain)
    rivals = {}
    for rival in against:
        # a model of its own: TorchJD's hooks count every forward pass while its engine lives
        other = copy.deepcopy(model)
        optimizer = torch.optim.SGD(parameters(other), lr=0.0)
        rivals[rival] = RIVALS[rival](other, optimizer, forget, retain)
        if rival != PLAIN:
            assert distance(update_of(rivals[rival], other, optimizer), exact) < TOLERANCE
    optimizer = torch.optim.SGD(parameters(model), lr=0.0)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(), **options)

    def ours():
        surgeon.step(forget=forget, retain=retain, loss=loss)

    error = distance(update_of(ours, model, optimizer), exact)
    size = exact.numel()
    del exact
    compare(
        ours,
        rivals,
        nbytes=3 * 4 * size,  # the weights read forward and backward, the update written
        error=error,
        result_bytes=0,
        target=target,
        memory_target={PLAIN: memory} if memory else None,
        rounds=ROUNDS.get(name, 7),
    )


@pytest.mark.parametrize("name", STEPS)
def bench_orthograd_step(compare, name):
    target, memory = STEPS[name]
    compare_steps(compare, name, target, target, memory)


@pytest.mark.parametrize("name", ["MLP 0.7M", "CNN 0.1M"])
def bench_orthograd_step_stored(compare, name):
    compare_steps(compare, name, (PLAIN, QR), rows="stored")


@pytest.mark.parametrize("name", GRAMIANS)
def bench_sample_gramian(compare, name):
    """The Gramian of every sample's gradient, the forward pass included."""
    samples, target, memory = GRAMIANS[name]
    model, batches = make(name)
    batch = batches(samples)
    rows = exact_rows(model, ones(batch))
    exact = rows @ rows.mT
    del rows
    other = copy.deepcopy(model)
    engine = Engine(other, batch_dim=0)

    def ours():
        with gs.tape(model) as tape:
            losses = loss(model, batch)
        return tape.jacobian(losses).gramian()

    def by_vmap():
        blocks = [block.flatten(1) for block in per_sample(model, batch)]
        return sum(block @ block.mT for block in blocks)

    rivals = {TORCHJD: lambda: engine.compute_gramian(loss(other, batch)), VMAP: by_vmap}
    rivals = {rival: rivals[rival] for rival in target}
    for gramian in rivals.values():
        assert distance(gramian(), exact) < TOLERANCE
    compare(
        ours,
        rivals,
        nbytes=2 * 4 * sum(p.numel() for p in model.parameters()),
        error=distance(ours(), exact),
        result_bytes=8 * samples**2,
        target=target,
        memory_target=memory,
        rounds=ROUNDS[name],
    )
