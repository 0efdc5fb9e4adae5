"""Parameters that are thawed, replaced, added or frozen during a run: moved, or named."""

import copy

import pytest
import torch
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn import METHODS, Finetune, Retrain, SalUn
from gradsurgery.unlearn.objectives.classification import cross_entropy

CLASSES = 3
OPTIONS = {
    "ssd": {"alpha": 0.01, "dampening": 0.1},
    "ltu": {"feedback": "random_label"},
    "gru": {"retain_momentum": 0.0},
}
STEPPED = [name for name in METHODS if name != "ssd"]


def samples(n):
    return torch.randn(n, 6), torch.arange(n) % CLASSES


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def everything(parameters):
    """What a user writes who will thaw parameters later."""
    return lambda given: torch.optim.SGD(parameters, lr=0.1)


def made(name, model, optimizer=None, **options):
    kind = METHODS.get(name, Retrain)
    config = kind.Config(**{"steps": 4, "lr": 0.1, **OPTIONS.get(name, {}), **options})
    forget = None if kind is Retrain else samples(12)
    return kind(
        model, cross_entropy, forget=forget, retain=samples(24), config=config, optimizer=optimizer
    )


@pytest.mark.parametrize("name", [*STEPPED, "retrain"])
def test_a_thawed_parameter_that_the_optimizer_lacks_is_named(name):
    model = net()
    model[0].requires_grad_(False)
    trainer = made(name, model)
    steps = trainer.fit()
    next(steps)
    before = copy.deepcopy(trainer.state_dict())
    model[0].requires_grad_(True)
    with pytest.raises(InputError, match=r"^model: 0.weight trains, but the optimizer does not ho"):
        next(steps)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before["model"][key]), key
    assert trainer.step == before["step"]
    assert trainer.batches.keys() == before["batches"].keys()
    for kind, drawn in before["batches"].items():
        assert trainer.batches[kind].state_dict() == drawn


@pytest.mark.parametrize("name", [*STEPPED, "retrain"])
def test_a_replaced_parameter_is_named(name):
    model = net()
    steps = made(name, model).fit()
    next(steps)
    model[2].bias = nn.Parameter(torch.zeros(CLASSES))
    with pytest.raises(InputError, match=r"^model: 2.bias trains, .*add_param_group, or make a n"):
        next(steps)
    assert torch.equal(model[2].bias, torch.zeros(CLASSES))


@pytest.mark.parametrize("name", [n for n in STEPPED if n != "salun"])
def test_a_thawed_parameter_that_the_optimizer_holds_moves(name):
    model = net()
    model[0].requires_grad_(False)
    trainer = made(name, model, everything(list(model.parameters())))
    steps = trainer.fit()
    next(steps)
    start = model[0].weight.detach().clone()
    model[0].requires_grad_(True)
    next(steps)
    next(steps)
    assert not torch.equal(model[0].weight, start)


def test_it_moves_as_in_an_ordinary_step():
    model = net().double()
    model[0].requires_grad_(False)
    images, labels = samples(24)
    retain = images.double(), labels
    config = Finetune.Config(steps=3, lr=0.1, optimizer="sgd", momentum=0.9, retain_batch=24)
    twin = copy.deepcopy(model)
    plain = torch.optim.SGD(twin[2].parameters(), lr=0.1, momentum=0.9)
    trainer = Finetune(model, cross_entropy, forget=None, retain=retain, config=config)
    steps = trainer.fit()
    for number in range(3):
        if number == 1:
            for each, optimizer in ((model, trainer.optimizer), (twin, plain)):
                each[0].requires_grad_(True)
                optimizer.add_param_group({"params": list(each[0].parameters())})
        next(steps)
        plain.zero_grad()
        cross_entropy(twin, retain).mean().backward()
        plain.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_group_added_follows_the_schedule_from_its_own_rate():
    model = net()
    model[0].requires_grad_(False)
    trainer = made("finetune", model, schedule="cosine")
    steps = trainer.fit()
    next(steps)
    model[0].requires_grad_(True)
    trainer.optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    for _ in range(2):
        next(steps)
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates[1] == pytest.approx(rates[0] / 10)


def test_a_run_with_a_group_added_is_resumed():
    def begin(model):
        trainer = made("finetune", model, schedule="cosine", optimizer=None)
        model[0].requires_grad_(True)
        trainer.optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
        return trainer

    torch.manual_seed(0)
    model = net()
    model[0].requires_grad_(False)
    start = copy.deepcopy(model)
    torch.manual_seed(1)
    trainer = begin(model)
    steps = trainer.fit()
    next(steps)
    state = trainer.state_dict()
    list(steps)
    torch.manual_seed(1)
    again = begin(start)
    again.load_state_dict(state)
    again.run()
    for ours, theirs in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_group_taken_away_is_named():
    model = net()

    def two(parameters):
        return torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1)

    trainer = made("finetune", model, two)
    steps = trainer.fit()
    next(steps)
    trainer.optimizer.param_groups.pop()
    with pytest.raises(InputError, match="it had 4 groups of parameters and has 3"):
        next(steps)


@pytest.mark.parametrize("name", [*STEPPED, "retrain"])
def test_a_frozen_parameter_stays_and_the_others_go_on(name):
    model = net()
    steps = made(name, model).fit()
    next(steps)
    model[0].requires_grad_(False)
    frozen, free = (model[k].weight.detach().clone() for k in (0, 2))
    next(steps)
    next(steps)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[2].weight, free)


@pytest.mark.parametrize("name", [*STEPPED, "retrain"])
def test_a_model_frozen_whole_is_named(name):
    model = net()
    steps = made(name, model).fit()
    next(steps)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter requires a gradient"):
        next(steps)


@pytest.mark.parametrize("name", STEPPED)
def test_what_a_function_for_the_optimizer_left_out_stays(name):
    model = net()
    start = model[0].weight.detach().clone()
    made(name, model, lambda _: torch.optim.SGD(model[2].parameters(), lr=0.1)).run()
    assert torch.equal(model[0].weight, start)


def test_salun_names_a_weight_it_has_not_ranked():
    model = net()
    model[0].requires_grad_(False)
    trainer = made("salun", model, everything(list(model.parameters())))
    steps = trainer.fit()
    next(steps)
    model[0].requires_grad_(True)
    with pytest.raises(InputError, match=r"0.weight trains, but SalUn ranked its weights without"):
        next(steps)


def test_gru_names_what_its_average_is_not_of():
    model = net()
    steps = made("gru", model, retain_momentum=0.5).fit()
    next(steps)
    model[0].requires_grad_(False)
    with pytest.raises(InputError, match="GRU remembers an average over other parameters"):
        next(steps)


def test_salun_keeps_the_masks_of_those_that_train_on():
    model = net()
    trainer = made("salun", model, saliency=0.5)
    assert isinstance(trainer, SalUn)
    steps = trainer.fit()
    next(steps)
    model[0].weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    list(steps)
    masks = dict(zip(before, trainer.masks, strict=True))
    for name, p in model.named_parameters():
        assert torch.equal(p[~masks[name]], before[name][~masks[name]]), name


@pytest.mark.parametrize("thawed", [False, True])
def test_ssd_dampens_what_trains_at_its_step(thawed):
    model = net()
    model[0].requires_grad_(not thawed)
    trainer = made("ssd", model)
    start = model[0].weight.detach().clone()
    model[0].requires_grad_(thawed)
    trainer.run()
    assert torch.equal(model[0].weight, start) != thawed
