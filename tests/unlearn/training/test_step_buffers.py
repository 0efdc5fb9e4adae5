"""A step that raises puts buffers back, though its forward pass wrote to parameters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradsurgery.unlearn import METHODS, Finetune, FinetuneConfig, Retrain

ALL = {**METHODS, "retrain": Retrain}
CLASSES = 3


class Broken(Exception):
    pass


class Bag(nn.Module):
    """Its embedding shrinks rows in each forward pass, and a buffer counts these passes."""

    seen: torch.Tensor

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(10, 8, max_norm=0.5)
        self.head = nn.Linear(8, CLASSES)
        self.register_buffer("seen", torch.zeros(()))
        self.left = None

    def forward(self, x):
        self.seen += 1
        out = self.head(self.rows(x).mean(1))
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Broken
        return out


def samples(n):
    return torch.randint(10, (n, 4)), torch.arange(n) % CLASSES


def made(kind, model, **options):
    sizes = {f"{k}_batch": 5 for k in ("forget", "retain") if hasattr(kind.Config, f"{k}_batch")}
    config = kind.Config(steps=4, lr=0.5, **sizes)
    forget = None if kind is Retrain else samples(12)
    loss = options.pop("loss", own_loss)
    return kind(
        model, loss, forget=forget, retain=samples(24), config=config, overlap="allow", **options
    )


def own_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def enlarged(model):
    """Rows larger than their limit: the next forward pass writes to the parameter."""
    with torch.no_grad():
        model.rows.weight.mul_(10)


@pytest.mark.parametrize("name", ["finetune", "graddiff", "l1_sparse", "neggrad", "retrain"])
def test_buffers_come_back_though_the_forward_pass_wrote_to_parameters(name):
    model = Bag()
    trainer = made(ALL[name], model)
    steps = trainer.fit()
    next(steps)
    enlarged(model)
    before = copy.deepcopy(model.state_dict())
    model.left = 0
    with pytest.raises(Broken):
        next(steps)
    assert not torch.equal(model.rows.weight, before["rows.weight"])  # else this tries nothing
    assert torch.equal(model.seen, before["seen"])
    assert torch.equal(model.head.weight, before["head.weight"])


def test_an_update_of_ones_own_is_undone_with_what_the_forward_pass_wrote():
    class Own(Finetune):
        def update(self):
            super().update()
            raise Broken

    model = Bag()
    enlarged(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Broken):
        made(Own, model).run()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_buffers_of_a_step_that_moved_parameters_stay(monkeypatch):
    """Else they would be those of before it, beside parameters of after it."""
    model = Bag()
    config = FinetuneConfig(steps=2, lr=0.1, retain_batch=5)
    trainer = Finetune(model, own_loss, forget=None, retain=samples(24), config=config)

    update = Finetune.update

    def interrupted(self):
        update(self)
        raise KeyboardInterrupt

    interrupted.__module__ = Finetune.__module__
    start = model.head.weight.detach().clone()
    monkeypatch.setattr(Finetune, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert not torch.equal(model.head.weight, start)
    assert model.seen == 1


def test_no_hook_stays_with_the_optimizer():
    trainer = made(Finetune, Bag())
    trainer.run()
    assert not trainer.optimizer._optimizer_step_pre_hooks


def test_a_parameter_outside_of_the_model_does_not_move_by_an_old_gradient():
    outside = nn.Parameter(torch.ones(3))
    outside.grad = grad = torch.ones(3)

    def optimizer(parameters):
        return torch.optim.SGD([*parameters, outside], lr=0.1)

    for name, options in (("finetune", {}), ("gru", {}), ("ltu", {"feedback": "random_label"})):
        model = nn.Sequential(nn.Linear(6, CLASSES))
        forget, retain = ((torch.randn(n, 6), torch.arange(n) % CLASSES) for n in (12, 24))
        data = {"forget": forget, "retain": retain}
        kind = METHODS[name]
        config = kind.Config(steps=2, **options)
        kind(model, own_loss, **data, config=config, optimizer=optimizer).run()
        assert torch.equal(outside.data, torch.ones(3)) and outside.grad is grad
