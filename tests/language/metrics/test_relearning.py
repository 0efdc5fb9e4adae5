"""Steps until a forgotten set is known again: by hand, on a copy, the same for a seed."""

import copy
import math

import pytest
import torch

import gradsurgery as gs
from gradsurgery import language
from gradsurgery.errors import TrainingError
from gradsurgery.language import metrics
from tests.language.metrics.test_scores import learned
from tests.language.tiny import SAMPLES, batch, made

FORGET = [batch(SAMPLES[:2]), batch(SAMPLES[2:])]


def mean(model, measure):
    scores = metrics.merged(
        metrics.token_scores(model, FORGET[0]),
        metrics.token_scores(model, {**FORGET[1], "id": torch.arange(3)}),
    )
    values = metrics.probability(scores) if measure == "probability" else metrics.losses(scores)
    return metrics.Sums.of(values).mean


def steps_of_plain_training(model, target, measure, lr, seed):
    """By definition, two batches in an order drawn for each pass over them."""
    student = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0)
    generator, order = torch.Generator().manual_seed(seed), []
    for step in range(1, 100):
        order = order or torch.randperm(2, generator=generator).tolist()
        optimizer.zero_grad()
        language.NLL()(student, FORGET[order.pop()]).mean().backward()
        optimizer.step()
        value = mean(student, measure)
        if value >= target if measure == "probability" else value <= target:
            return step
    return 100


@pytest.mark.parametrize("measure", ["probability", "loss"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_number_is_that_of_plain_training(measure, seed):
    model, target = made(), mean(learned(), measure)
    expected = steps_of_plain_training(model, target, measure, 0.03, seed)
    assert 3 < expected < 50
    before = copy.deepcopy(model.state_dict())
    drawn = torch.random.get_rng_state()
    options = {"lr": 0.03, "measure": measure, "seed": seed}
    assert metrics.relearn_steps(model, FORGET, target, **options) == expected
    # looked at every fourth step only, it is the next multiple of 4
    found = metrics.relearn_steps(model, FORGET, target, every=4, **options)
    assert found == 4 * math.ceil(expected / 4)
    assert metrics.relearn_steps(model, FORGET, target, steps=expected - 1, **options) is None
    # the model and what torch draws are as before
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_forgot_nothing_needs_no_step_and_a_margin_helps():
    model = learned()
    there = mean(model, "probability")
    assert metrics.relearn_steps(model, FORGET, there) == 0
    assert metrics.relearn_steps(model, FORGET, there + 0.1, margin=0.1) == 0
    assert metrics.relearn_steps(model, FORGET, mean(model, "loss"), measure="loss") == 0
    assert metrics.relearn_steps(model, FORGET, there + 0.1, lr=1e-9, steps=2) is None


def test_an_optimizer_of_one_s_own_and_what_is_frozen():
    model = made()
    for parameter in (model.words.weight, model.places.weight):
        parameter.requires_grad_(False)
    given = []

    def sgd(parameters):
        given.extend(parameters)
        return torch.optim.SGD(given, lr=5.0)

    assert metrics.relearn_steps(model, FORGET, 0.05, optimizer=sgd, steps=50) in range(1, 51)
    assert len(given) == len(list(model.parameters())) - 2


def test_what_is_refused():
    model = made()
    for options, message in (
        ({"measure": "accuracy"}, "measure must be one of"),
        ({"margin": -1}, "margin must be 0 or more"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"lr": math.nan}, "lr must be a number"),
        ({"original": math.nan}, "original must be a number"),
        ({"batches": []}, "batches must be a sequence"),
        ({"batches": iter(FORGET)}, "batches must be a sequence"),
    ):
        with pytest.raises(gs.InputError, match=message):
            metrics.relearn_steps(model, **{"batches": FORGET, "original": 0.5, **options})
    with pytest.raises(TrainingError, match="stopped being finite"):
        metrics.relearn_steps(
            model, FORGET, 0.9, optimizer=lambda p: torch.optim.SGD(p, lr=1e200), steps=9
        )
    with pytest.raises(gs.InputError, match="no parameter that trains"):
        metrics.relearn_steps(model.requires_grad_(False), FORGET, 0.9)
