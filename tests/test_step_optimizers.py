"""Every optimizer of torch.optim steps as on an ordinary gradient, or is refused by name."""

import copy
import inspect
import types

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.models import batch, classification, mlp

KINDS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}
# LBFGS is stepped by a closure: see the tests of `add`
STEPPED = [name for name in KINDS if name not in ("LBFGS", "SparseAdam")]
OPTIONS = ("foreach", "fused", "maximize")
ALL = [(name, None) for name in STEPPED] + [
    (name, option)
    for name in STEPPED
    for option in OPTIONS
    if option in inspect.signature(KINDS[name]).parameters
]


def biasless():
    """Muon steps matrices only."""
    model = mlp()
    model[0].bias = model[2].bias = None
    return model


def twins(name, **options):
    models = [biasless() if name == "Muon" else mlp()]
    models.append(copy.deepcopy(models[0]))
    return models, [KINDS[name](m.parameters(), **options) for m in models]


def plain(model, optimizer, data):
    optimizer.zero_grad()
    classification(model, data).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_equal(models):
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name,option", ALL, ids=str)
def test_steps_as_on_an_ordinary_gradient(name, option):
    models, optimizers = twins(name, **({} if option is None else {option: True}))
    start = models[0][0].weight.detach().clone()
    surgeon = gs.Surgeon(models[0], optimizers[0], gs.Mean())
    for _ in range(3):
        data = batch(4)
        surgeon.step(batch=data, loss=classification)
        plain(models[1], optimizers[1], data)
    assert not torch.equal(models[0][0].weight, start)
    assert_equal(models)


@pytest.mark.parametrize("rows", ["captured", "stored"])
def test_a_schedule_goes_on(rows):
    models, optimizers = twins("SGD", lr=0.1, momentum=0.9, nesterov=True)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8) for o in optimizers]
    surgeon = gs.Surgeon(models[0], optimizers[0], gs.Mean(), rows=rows)
    for _ in range(6):
        data = batch(4)
        surgeon.step(batch=data, loss=classification)
        plain(models[1], optimizers[1], data)
        for schedule in schedules:
            schedule.step()
    assert_equal(models)


def test_names_an_optimizer_of_sparse_gradients():
    model = mlp()
    with pytest.raises(gs.InputError, match=r"optimizer: SparseAdam steps on sparse.*; use Adam"):
        gs.Surgeon(model, torch.optim.SparseAdam(model.parameters()), gs.UPGrad())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("option", ["differentiable", "capturable"])
def test_names_an_option_that_parameters_cannot_have(name, option):
    if option not in inspect.signature(KINDS[name]).parameters:
        return
    model = mlp()
    optimizer = KINDS[name](model.parameters(), **{option: True})
    with pytest.raises(gs.InputError, match=f"optimizer: {name} has {option}=True"):
        gs.Surgeon(model, optimizer, gs.UPGrad())


def test_a_step_of_ones_own_that_needs_more_than_gradients_is_named():
    class Searching(torch.optim.SGD):
        def step(self, losses, closure=None):  # type: ignore[override]
            raise AssertionError

    model = mlp()
    surgeon = gs.Surgeon(model, Searching(model.parameters(), lr=0.1), gs.UPGrad())
    with pytest.raises(gs.InputError, match=r"Searching\.step needs losses"):
        surgeon.step(batch=batch(3), loss=classification)


def test_an_optimizer_of_ones_own_steps():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        def step(self, *args, closure=None, **kwargs):  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad, alpha=group["lr"])

    models, optimizers = twins("SGD", lr=0.1)
    optimizers[0] = Own(models[0].parameters())
    data = batch(4)
    gs.Surgeon(models[0], optimizers[0], gs.Mean()).step(batch=data, loss=classification)
    plain(models[1], optimizers[1], data)
    assert_equal(models)


def test_sparse_embeddings_step_on_dense_gradients():
    models = [nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 4)).double()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    data = torch.randint(9, (5,)), torch.randint(4, (5,))
    with pytest.warns(UserWarning, match="no formula for EmbeddingBackward0"):
        gs.Surgeon(models[0], optimizers[0], gs.Mean()).step(batch=data, loss=classification)
    plain(models[1], optimizers[1], data)
    assert_equal(models)


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: it steps, or not, what it holds."""

    __module__ = "accelerate.optimizer"

    def __init__(self, optimizer, scaler=None):
        self.optimizer, self.scaler = optimizer, scaler
        self.gradient_state = types.SimpleNamespace(sync_gradients=True)

    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self, closure=None):  # type: ignore[override]
        """Accumulates: no step."""


def test_steps_what_accelerate_wrapped():
    models, optimizers = twins("Adam", lr=0.1)
    data = batch(4)
    rule = gs.Mean(precondition="optimizer")
    surgeon = gs.Surgeon(models[0], Wrapper(optimizers[0]), rule)
    surgeon.step(batch=data, loss=classification)
    plain(models[1], optimizers[1], data)
    assert_equal(models)


def test_accelerates_own_wrapper_steps():
    accelerate = pytest.importorskip("accelerate")
    models, optimizers = twins("AdamW", lr=0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(models[0], optimizers[0])
    surgeon = gs.Surgeon(model, optimizer, gs.Mean())
    for _ in range(3):
        data = batch(4)
        with accelerator.accumulate(model):
            surgeon.step(batch=data, loss=classification)
        plain(models[1], optimizers[1], data)
    assert_equal(models)


def test_a_step_that_accelerate_would_leave_out_is_named():
    models, optimizers = twins("Adam", lr=0.1)
    wrapper = Wrapper(optimizers[0])
    surgeon = gs.Surgeon(models[0], wrapper, gs.Mean())
    wrapper.gradient_state.sync_gradients = False
    with pytest.raises(gs.InputError, match=r"accumulate leaves this step out.*call add"):
        surgeon.step(batch=batch(4), loss=classification)
    assert_equal(models)
    assert not optimizers[0].state


@pytest.mark.parametrize(
    "wrapped,message",
    [
        (lambda o: Wrapper(o, scaler=object()), "scaler must be a torch.amp.GradScaler, got obj"),
        (lambda o: Wrapper(type("Engine", (), {"param_groups": o.param_groups})()), "another eng"),
    ],
)
def test_names_a_wrapper_that_does_not_step_given_gradients(wrapped, message):
    model = mlp()
    with pytest.raises(gs.InputError, match=message):
        gs.Surgeon(model, wrapped(torch.optim.SGD(model.parameters())), gs.UPGrad())
