"""The protocol: order of data, schedules, stopping, and resuming bit for bit."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from gradsurgery.errors import InputError
from gradsurgery.unlearn import (
    METHODS,
    Batches,
    Finetune,
    FinetuneConfig,
    NegGrad,
    NegGradConfig,
    Retrain,
    TrainerConfig,
    TrainingError,
)
from gradsurgery.unlearn.metrics.accuracy import accuracy
from gradsurgery.unlearn.objectives.classification import cross_entropy
from gradsurgery.unlearn.training.trainer import rate_share

ALL = {**METHODS, "retrain": Retrain}


def make(kind, problem, **options):
    config = kind.Config(**{"steps": 9, "lr": 0.05, "schedule": "cosine", **options})
    for size in ("forget_batch", "retain_batch"):
        if hasattr(config, size):
            setattr(config, size, 5)
    data = {"forget": problem.forget, "retain": problem.retain, "config": config}
    loss = cross_entropy if kind.instead_of_loss else problem.loss
    return kind(problem.model, loss, **data, validation=problem.validation, seed=3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_resumed_run_ends_at_the_same_bits(name, optimizer, problem):
    start = {key: value.clone() for key, value in problem.model.state_dict().items()}
    make(ALL[name], problem, optimizer=optimizer, momentum=0.9).run()
    whole = {key: value.clone() for key, value in problem.model.state_dict().items()}

    problem.model.load_state_dict(start)
    first = make(ALL[name], problem, optimizer=optimizer, momentum=0.9)
    steps = first.fit()
    for _ in range(min(4, first.total_steps())):
        next(steps)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    problem.model.load_state_dict(start)
    torch.manual_seed(99)
    second = make(ALL[name], problem, optimizer=optimizer, momentum=0.9)
    second.load_state_dict(torch.load(file, weights_only=True))
    left = [] if name == "ssd" else [5, 6, 7, 8, 9]  # one step is all of it
    assert [record["step"] for record in second.fit()] == left
    for key, value in problem.model.state_dict().items():
        assert torch.equal(value, whole[key]), key


def test_random_layers_resume_too(problem):
    problem.model.insert(1, nn.Dropout(0.5))
    start = {key: value.clone() for key, value in problem.model.state_dict().items()}
    torch.manual_seed(5)
    make(Finetune, problem).run()
    whole = problem.model[0].weight.clone()

    problem.model.load_state_dict(start)
    torch.manual_seed(5)
    first = make(Finetune, problem)
    steps = first.fit()
    for _ in range(3):
        next(steps)
    state = first.state_dict()
    torch.manual_seed(6)
    second = make(Finetune, problem)
    second.load_state_dict(state)
    second.run()
    assert torch.equal(problem.model[0].weight, whole)


@pytest.mark.parametrize("n,size", [(10, 3), (7, 7), (5, 64), (1, 1)])
def test_an_epoch_repeats_no_sample(n, size):
    batches = Batches({"x": torch.arange(n)}, size, seed=1)
    for _ in range(3):
        seen = torch.cat([next(batches)["x"] for _ in range(batches.per_epoch)])
        assert len(seen.unique()) == len(seen) == n // batches.size * batches.size


def test_a_batch_depends_on_its_number_alone():
    data = {"x": torch.arange(23)}
    walked = Batches(data, 4, seed=2)
    order = [next(walked)["x"] for _ in range(40)]
    for number in (39, 0, 17):
        jumped = Batches(data, 4, seed=2)
        jumped.drawn = number
        assert torch.equal(next(jumped)["x"], order[number])


def test_schedules_end_where_they_should():
    constant, cosine, onecycle = (
        [rate_share(TrainerConfig(schedule=kind), step, 100) for step in range(100)]
        for kind in ("constant", "cosine", "onecycle")
    )
    assert set(constant) == {1.0}
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[0] > 0.995 and cosine[-1] < 0.005
    assert max(onecycle) == pytest.approx(1.0, rel=0.05)
    assert 25 <= onecycle.index(max(onecycle)) <= 35
    assert onecycle[0] < 0.075 and onecycle[-1] < 0.005


@pytest.mark.parametrize(
    "stop,expected", [("never", 8), ("target", 6), ("validation", 3)], ids=lambda value: str(value)
)
def test_stops_at_the_first_probe_past_the_bar(stop, expected, problem):
    accuracies = iter([1.0, 0.8, 0.4, 0.2])

    def probe(model):
        return {"forget_accuracy": next(accuracies), "validation_accuracy": 0.9}

    config = NegGradConfig(steps=8, stop=stop, target=0.5)
    trainer = NegGrad(
        problem.model,
        problem.loss,
        forget=problem.forget,
        retain=None,
        config=config,
        probe=probe,
        probe_every=3,
    )
    records = list(trainer.fit())
    assert records[0] == {"step": 0, "seconds": 0.0, **records[0]}
    assert trainer.step == expected
    assert trainer.stopped == (stop != "never")


def test_divergence_is_an_error_that_names_the_step(problem):
    def broken(model, batch):
        return problem.loss(model, batch) * float("nan")

    trainer = Finetune(
        problem.model, broken, forget=None, retain=problem.retain, config=FinetuneConfig(steps=3)
    )
    with pytest.raises(TrainingError, match="a loss of the batch is not finite at step 1 of Finet"):
        trainer.run()


def test_divergence_of_a_gradient_is_the_same_error(problem):
    """The loss is finite and its gradient is not: the surgeon finds it before the model moves."""
    start, loss = problem.model[0].weight.clone(), problem.loss

    def broken(model, batch):
        losses = loss(model, batch)
        return losses + (losses - losses.detach()).abs().sqrt()

    problem.loss = broken
    trainer = make(METHODS["orthograd"], problem)
    with pytest.raises(TrainingError, match=r"at step 1 of OrthoGradTrainer: lower the learning"):
        trainer.run()
    assert torch.equal(problem.model[0].weight, start)


def test_missing_data_is_named(problem):
    with pytest.raises(InputError, match="forget: NegGrad needs this data, got None"):
        NegGrad(problem.model, problem.loss, forget=None, retain=None, config=NegGradConfig())


def test_empty_data_is_named(problem):
    empty = {"image": torch.empty(0, 6), "label": torch.empty(0, dtype=torch.int64)}
    with pytest.raises(InputError, match="no samples to draw batches from"):
        NegGrad(problem.model, problem.loss, forget=empty, retain=None, config=NegGradConfig())


def test_ragged_data_is_named(problem):
    ragged = {"image": torch.zeros(4, 6), "label": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(InputError, match=r"share one leading dimension, got \[3, 4\]"):
        NegGrad(problem.model, problem.loss, forget=ragged, retain=None, config=NegGradConfig())


def test_frozen_model_is_named(problem):
    problem.model.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter requires a gradient"):
        make(Finetune, problem)


def test_stopping_measures_the_sets_itself_after_every_step(problem):
    """Up the forget loss until the forget set looks unseen, or is at a target; not a step more."""
    optimizer = torch.optim.Adam(problem.model.parameters(), 0.05)
    while accuracy(problem.model, problem.forget) < 1:
        optimizer.zero_grad()
        problem.loss(problem.model, problem.forget).mean().backward()
        optimizer.step()
    for stop, target in (("validation", 0.0), ("target", 0.25)):
        fresh = copy.deepcopy(problem)
        trainer = make(NegGrad, fresh, stop=stop, target=target, steps=400, schedule="constant")
        records = list(trainer.fit())
        assert 1 < trainer.step < 400
        assert records[-1]["forget_accuracy"] == accuracy(fresh.model, fresh.forget)
        ends = [
            each["forget_accuracy"] <= each.get("validation_accuracy", target) for each in records
        ]
        assert ends == [False] * trainer.step + [True], stop


def test_stopping_may_look_more_rarely(problem):
    for stop, target in (("target", 0.0), ("target", 1.0)):
        fresh = copy.deepcopy(problem)
        chosen = {"stop": stop, "target": target, "stop_every": 4, "lr": 1e-6, "steps": 10}
        trainer = make(NegGrad, fresh, schedule="constant", **chosen)
        seen = [each["step"] for each in trainer.fit() if "forget_accuracy" in each]
        assert seen == ([0] if target == 1 else [0, 4, 8, 10])


def test_measuring_for_a_stop_draws_nothing_that_training_draws(problem):
    """A loader that shuffles draws from torch's generator in every pass."""
    ends = []
    for stop in ("never", "target"):
        fresh = copy.deepcopy(problem)
        each = [{k: v[i] for k, v in fresh.forget.items()} for i in range(12)]
        fresh.forget = DataLoader(each, batch_size=5, shuffle=True)
        torch.manual_seed(0)
        make(NegGrad, fresh, stop=stop, target=0.0, lr=1e-3).run()
        ends.append(fresh.model[0].weight)
    assert torch.equal(*ends)


def test_stopping_needs_sets_to_measure_or_a_probe(problem):
    problem.validation = None
    message = "validation: stop = validation needs this data, or a probe, got None"
    with pytest.raises(InputError, match=message):
        make(Finetune, problem, stop="validation")


@pytest.mark.parametrize(
    "option,value",
    [
        ("steps", -1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("target", 1.5),
        ("forget_batch", 0),
        ("forget_ceiling", 0.0),
        ("forget_ceiling", float("nan")),
    ],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(InputError, match=f"--neggrad.{option.replace('_', '-')} must be .* got"):
        NegGradConfig(**{option: value}).check("neggrad")
