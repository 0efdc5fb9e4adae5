"""A step along eight micro-batches of 2 + 2 samples, against a plain step that accumulates as many.

Each forget sample of all micro-batches goes into one row, each retain sample is a row: 17 rows.
"""

import copy

import pytest
import torch

import gradsurgery as gs
from gradsurgery.bench.models import loss, make
from gradsurgery.bench.steps import PLAIN, distance, exact_update, parameters, together, update_of

PARTS, SAMPLES = 8, 2
# times faster than the plain step at least, and extra memory of a plain step's at most
STEPS = {
    "LoRA 256x8 T256, checkpoints": (1 / 1.15, 1.5),
    "transformer 256x8 T256": (1 / 1.15, 2.0),
}


@pytest.mark.parametrize("hold", ["auto", "pairs"])
@pytest.mark.parametrize("name", STEPS)
def bench_accumulated_step(compare, name, hold):
    target, memory = STEPS[name]
    model, batches = make(name)
    parts = [(batches(SAMPLES), batches(SAMPLES)) for _ in range(PARTS)]
    forget, retain = (together(*side) for side in zip(*parts, strict=True))
    exact = exact_update(model, forget, retain)
    other = copy.deepcopy(model)
    plain_optimizer = torch.optim.SGD(parameters(other), lr=0.0)
    optimizer = torch.optim.SGD(parameters(model), lr=0.0)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(), hold=hold)

    def plain():
        for pair in parts:
            (loss(other, together(*pair)).mean() / PARTS).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    def ours():
        for part in parts:
            surgeon.add(forget=part[0], retain=part[1], loss=loss)
        surgeon.backward()
        optimizer.step()
        optimizer.zero_grad()

    error = distance(update_of(ours, model, optimizer), exact)
    size = exact.numel()
    del exact
    compare(
        ours,
        {PLAIN: plain},
        nbytes=3 * 4 * size,
        error=error,
        result_bytes=0,
        target={PLAIN: target} if hold == "auto" else None,
        memory_target={PLAIN: memory},
        rounds=5,
    )
