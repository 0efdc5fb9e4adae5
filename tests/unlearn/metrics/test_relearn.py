"""Relearn time: what is counted, when it ends, and what it leaves alone."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradsurgery.errors import InputError
from gradsurgery.unlearn import Finetune, FinetuneConfig
from gradsurgery.unlearn.metrics.relearn import forget_measure, relearn_steps

CONFIG = FinetuneConfig(steps=40, retain_batch=5, optimizer="sgd", lr=0.5)


def relearn(problem, original=1.0, config=CONFIG, **options):
    return relearn_steps(problem.model, problem.loss, problem.forget, original, config, **options)


@pytest.mark.parametrize("measure,original", [("accuracy", 0.9), ("loss", 0.5)])
def test_counts_the_steps_of_plain_training(measure, original, problem):
    """Stepping the same trainer by hand and looking after each step."""
    student = copy.deepcopy(problem.model)
    trainer = Finetune(
        student, problem.loss, forget=None, retain=problem.forget, config=CONFIG, seed=4
    )
    expected = None
    for record in trainer.fit():
        found = forget_measure(student, problem.loss, problem.forget, measure)
        if found >= original if measure == "accuracy" else found <= original:
            expected = record["step"]
            break
    assert expected is not None and expected > 1
    assert relearn(problem, original, measure=measure, margin=0.0, seed=4) == expected


def test_a_wider_margin_is_met_sooner(problem):
    steps = [relearn(problem, 0.2, measure="loss", margin=margin) for margin in (0.5, 0.3, 0.1)]
    assert steps == sorted(steps) and steps[0] < steps[-1]


def test_one_step_by_hand():
    """One weight at 0, one sample (x, y) = (2, 0) of two classes: logits (2w, 0), rate 1.
    Gradient of the loss: -(1 - p) 2 = -1, so w = 1 after a step and the loss log(1 + e^-2)."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            return torch.cat([x * self.w, torch.zeros_like(x)], dim=1)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    data = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([0])
    config = FinetuneConfig(steps=5, optimizer="sgd", lr=1.0)
    model, reached = Model(), math.log(1 + math.exp(-2))

    def steps(original, margin):
        return relearn_steps(model, loss, data, original, config, measure="loss", margin=margin)

    assert steps(math.log(2), 0.0) == 0
    assert steps(reached, 0.0) == 1
    assert steps(reached - 0.01, 0.01) == 1
    assert steps(reached - 0.01, 0.0) == 2


def test_nothing_forgotten_takes_no_step(problem):
    original = forget_measure(problem.model, problem.loss, problem.forget)
    assert relearn(problem, original, margin=0.0) == 0
    assert relearn(problem, original, FinetuneConfig(steps=0)) == 0


def test_what_is_not_reached_is_none(problem):
    assert relearn(problem, 1.0, FinetuneConfig(steps=2, lr=1e-9)) is None
    assert relearn(problem, 1.0, FinetuneConfig(steps=0)) is None


def test_a_margin_that_rounds_is_still_met(problem):
    """0.8 - 0.1 is above 0.7 in floating point; 7 of 10 right is back."""
    logits = torch.eye(3, dtype=torch.float64)[[0] * 10]
    model = nn.Linear(3, 3, bias=False).double()
    model.weight.data = torch.eye(3, dtype=torch.float64)
    data = {"image": logits, "label": torch.tensor([0] * 7 + [1] * 3)}
    assert 0.8 - 0.1 > 7 / 10
    assert relearn_steps(model, problem.loss, data, 0.8, CONFIG, margin=0.1) == 0


def test_measuring_less_often_gives_a_multiple_or_the_cap(problem):
    """Whole batches at a low rate: the loss falls with every step."""
    options = {"retain_batch": 64, "optimizer": "sgd", "lr": 0.1}

    def steps(cap, every):
        config = FinetuneConfig(steps=cap, **options)
        return relearn(problem, 0.5, config, measure="loss", margin=0.0, every=every)

    exact = steps(200, 1)
    assert exact is not None and exact > 8
    assert steps(200, 4) == math.ceil(exact / 4) * 4
    assert steps(exact + 1, 1000) == exact + 1
    assert steps(exact - 1, 1000) is None


def test_leaves_the_model_and_the_random_state_alone(problem):
    problem.model.append(nn.Dropout(0.0)).train()
    problem.model[1].eval()
    modes = [module.training for module in problem.model.modules()]
    start = copy.deepcopy(problem.model.state_dict())
    state = torch.get_rng_state()
    relearn(problem)
    forget_measure(problem.model, problem.loss, problem.forget)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in problem.model.modules()] == modes
    for key, value in problem.model.state_dict().items():
        assert torch.equal(value, start[key])
    assert all(p.grad is None for p in problem.model.parameters())


def test_the_same_seed_gives_the_same_number_with_random_layers(problem):
    problem.model.insert(2, nn.Dropout(0.5))
    seen = []

    def loss(model, batch):
        found = problem.loss(model, batch)
        if found.requires_grad:
            seen.append(found.sum().item())
        return found

    def found(global_seed, seed):
        """The number, and every loss of a step to the bit."""
        seen.clear()
        torch.manual_seed(global_seed)
        args = (problem.model, loss, problem.forget, 0.3, CONFIG)
        return relearn_steps(*args, measure="loss", margin=0.0, seed=seed), tuple(seen)

    first = found(1, 7)
    assert found(2, 7) == first
    assert found(1, 8) != first


def test_measures_in_evaluation_mode(problem):
    problem.model.append(nn.Dropout(0.9)).train()
    found = {forget_measure(problem.model, problem.loss, problem.forget, "loss") for _ in range(3)}
    assert len(found) == 1


def test_takes_pairs_and_loaders(problem):
    pairs = (problem.forget["image"], problem.forget["label"])

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    expected = forget_measure(problem.model, problem.loss, problem.forget, "loss")
    loader = DataLoader(TensorDataset(*pairs), batch_size=5, shuffle=True)
    for data in (pairs, loader):
        assert forget_measure(problem.model, loss, data, "loss") == pytest.approx(expected)
        steps = {relearn_steps(problem.model, loss, data, 0.95, CONFIG) for _ in range(2)}
        assert len(steps) == 1 and None not in steps


def test_unusable_options_are_named(problem):
    for options, message in (
        ({"measure": "f1"}, "measure must be accuracy or loss, got f1"),
        ({"original": math.nan}, "original must be finite, got nan"),
        ({"margin": -0.1}, "margin must be finite and at least 0, got -0.1"),
        ({"margin": math.inf}, "margin must be finite"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"config": FinetuneConfig(stop="target")}, "config.stop must be never, got target"),
        ({"config": FinetuneConfig(lr=0.0)}, "lr must be positive"),
    ):
        with pytest.raises(InputError, match=message):
            relearn(problem, **options)
    empty = {key: value[:0] for key, value in problem.forget.items()}
    for data, message in ((None, "forget: there is nothing"), (empty, "forget: no samples")):
        with pytest.raises(InputError, match=message):
            relearn_steps(problem.model, problem.loss, data, 1.0, CONFIG)
