"""Whole OrthoGrad steps, and Gramians alone, against a plain step and what else makes them.

A step has 16 retain samples, a row each, and 16 forget samples, one row, of a whole model; it
computes the update and hands it to the optimizer. The plain step trains on the mean of the 32.
"""

import copy

import pytest
import torch
from torchjd.autogram import Engine

import gradsurgery as gs
from gradsurgery.bench.models import loss, make
from gradsurgery.bench.steps import (
    PLAIN,
    QR,
    RIVALS,
    TORCHJD,
    VMAP,
    distance,
    exact_rows,
    exact_update,
    ones,
    our_step,
    parameters,
    per_sample,
    update_of,
)

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
    ours = our_step(model, optimizer, forget, retain, **options)
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
