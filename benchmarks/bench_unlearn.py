"""One step of an unlearning trainer beside one plain training step on the same samples."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from gradsurgery.unlearn import LTUConfig, LTUTrainer, OrthoGradConfig, OrthoGradTrainer
from gradsurgery.unlearn.jobs.digits import data as digits
from gradsurgery.unlearn.objectives.classification import cross_entropy
from gradsurgery.unlearn.training.trainer import make_optimizer

SAMPLES = 64  # to forget, and as many to retain
# at most so many times the plain step
# of N query sets, second order: 2.5 + 1.1 N
TARGETS = {
    "ltu, second order": 2.5 + 1.1 * LTUConfig().queries,
    "ltu, first order": 2.5,
    "orthograd": None,
}


def trainer_of(name, model, data, **options):
    sizes = {"forget_batch": SAMPLES, "retain_batch": SAMPLES, **options}
    sets = {"forget": data.forget, "retain": data.retain}
    if name == "orthograd":
        return OrthoGradTrainer(model, cross_entropy, **sets, config=OrthoGradConfig(**sizes))
    config = LTUConfig(order=name.split()[1], **sizes)
    return LTUTrainer(model, cross_entropy, **sets, config=config, validation=data.validation)


def error_of(name, start, data):
    """Of the gradient a first step descends, relative, against the same step in float64.

    The membership models are the same for both: training them magnifies rounding.
    """
    updates, auditors = [], None
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(start).to(dtype).train()
        sets = {
            key: {**getattr(data, key), "image": getattr(data, key)["image"].to(dtype)}
            for key in ("forget", "retain", "validation")
        }
        trainer = trainer_of(name, model, replace(data, **sets), optimizer="sgd", lr=1.0)
        auditors = auditors or getattr(trainer, "auditors", None)
        if auditors is not None:
            trainer.auditors = auditors
        before = parameters_to_vector(model.parameters()).detach().clone()
        trainer.update()
        updates.append((before - parameters_to_vector(model.parameters()).detach()).double())
    return ((updates[0] - updates[1]).norm() / updates[1].norm()).item()


@pytest.mark.parametrize("name", TARGETS)
def bench_trainer_step(compare, name):
    """The digits job's network, 124,426 parameters."""
    torch.manual_seed(0)
    data, start = digits.load("random", seed=0), digits.DigitsCNN()
    trainer = trainer_of(name, copy.deepcopy(start).train(), data)
    both = {
        key: torch.cat([data.forget[key][:SAMPLES], data.retain[key][:SAMPLES]])
        for key in data.forget
    }
    model = copy.deepcopy(start).train()
    optimizer = make_optimizer(list(model.parameters()), trainer.config)

    def plain():
        optimizer.zero_grad()
        loss = cross_entropy(model, both).mean()
        loss.backward()
        optimizer.step()
        loss.item()

    target = TARGETS[name]
    compare(
        trainer.update,
        {"plain step": plain},
        nbytes=sum(p.nbytes for p in start.parameters()),
        error=error_of(name, start, data),
        target=None if target is None else {"plain step": 1 / target},
    )
