"""A step that raises, wherever it does, leaves model, `.grad` and optimizer as they were."""

import copy
from types import MethodType

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import gradsurgery as gs
from tests.models import assert_same_state, batch, classification, mlp, state_of
from tests.test_step import WAYS, surgeon_of


class Boom(Exception):
    pass


class Counting(nn.Module):
    """A module that changes a buffer in every forward."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.register_buffer("calls", torch.zeros(()))

        self.register_buffer("twice", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.twice = self.twice + 2
        return self.layers(x)


def _fails_at_once(model, data):
    classification(model, data)
    raise Boom


def _fails_on_retain(model, data):
    """The forget batch, of 2, is done when the retain batch fails: of 3, or of 1 under vmap."""
    losses = classification(model, data)
    if len(losses) != 2:
        raise Boom
    return losses


def _failing_rule(monkeypatch):
    def solve(*args, **kwargs):
        raise Boom

    monkeypatch.setattr(gs.OrthoGrad, "solve", solve)


def _nan_loss(model, data):
    return classification(model, data) * float("nan")


def _hook(when):
    def fail(*args):
        raise Boom

    return lambda optimizer: getattr(optimizer, f"register_step_{when}_hook")(fail)


def _fail_midway(optimizer):
    """One parameter updated, another not, as a device error in a loop would leave it."""
    original = optimizer.step

    def step():
        last = optimizer.param_groups[0]["params"][-1]
        last_grad, last.grad = last.grad, None
        original()
        last.grad = last_grad
        raise Boom

    optimizer.step = step


def _fail_in_a_subclass(optimizer):
    """It inherits `step`, which calls what it overrides."""

    class Mine(type(optimizer)):
        def _init_group(self, *args):
            super()._init_group(*args)
            raise Boom

    optimizer.__class__ = Mine


def _fail_in_the_class(monkeypatch):
    original = torch.optim.Adam.step

    def step(self):
        original(self)
        raise Boom

    monkeypatch.setattr(torch.optim.Adam, "step", step)


def _fail_below_a_scheduler(optimizer):
    """A scheduler replaces `step` too, over a replacement that was there before."""

    def step(self):
        type(self).step(self)
        raise Boom

    optimizer.step = MethodType(step, optimizer)
    torch.optim.lr_scheduler.ConstantLR(optimizer)


def _fail_globally(monkeypatch):
    """A hook of every optimizer."""

    def fail(*args):
        raise Boom

    monkeypatch.setitem(_global_optimizer_post_hooks, -1, fail)


FAILURES = {
    "first loss": (lambda m, o: None, _fails_at_once, Boom),
    "second loss": (lambda m, o: None, _fails_on_retain, Boom),
    "nan": (lambda m, o: None, _nan_loss, gs.NonFiniteError),
    "rule": (lambda m, o: _failing_rule(m), classification, Boom),
    "before the optimizer": (lambda m, o: _hook("pre")(o), classification, Boom),
    "after the optimizer": (lambda m, o: _hook("post")(o), classification, Boom),
    "after any optimizer": (lambda m, o: _fail_globally(m), classification, Boom),
    "in the optimizer": (lambda m, o: _fail_midway(o), classification, Boom),
    "in a subclass": (lambda m, o: _fail_in_a_subclass(o), classification, Boom),
    "in the class": (lambda m, o: _fail_in_the_class(m), classification, Boom),
    "below a scheduler": (lambda m, o: _fail_below_a_scheduler(o), classification, Boom),
}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_raises_changes_nothing(failure, steps_before, way, monkeypatch, impl):
    model = Counting()
    surgeon, optimizer = surgeon_of(model, **way)
    for _ in range(steps_before):
        surgeon.step(forget=batch(2), retain=batch(3), loss=classification)
    model.layers[0].weight.grad = torch.randn(8, 6).double()
    prepare, loss, error = FAILURES[failure]
    prepare(monkeypatch, optimizer)
    before = state_of(model, optimizer)
    with pytest.raises(error):
        surgeon.step(forget=batch(2), retain=batch(3), loss=loss)
    assert_same_state(before, state_of(model, optimizer))


def test_it_goes_on_after_a_failure_as_if_there_had_been_none(way, impl):
    model = mlp()
    twin = copy.deepcopy(model)
    data = [(batch(2), batch(3)) for _ in range(4)]
    for m, fail in ((model, True), (twin, False)):
        surgeon, optimizer = surgeon_of(m, **way)
        for forget, retain in data:
            if fail:
                handle = optimizer.register_step_post_hook(lambda *_: (_ for _ in ()).throw(Boom))
                with pytest.raises(Boom):
                    surgeon.step(forget=forget, retain=retain, loss=classification)
                handle.remove()
            surgeon.step(forget=forget, retain=retain, loss=classification)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_of_torchs_own_optimizer_copies_no_parameter(monkeypatch):
    """What is copied is at most a buffer, and weights of rows, of which there are as many as no
    parameter has values: the model here is all parameters, under a scheduler."""
    model = mlp()
    surgeon, optimizer = surgeon_of(model)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    shapes = {p.shape for p in model.parameters()}
    clone, copied = torch.Tensor.clone, []
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda t, **k: copied.append(t.shape) or clone(t, **k)
    )
    surgeon.step(forget=batch(2), retain=batch(4), loss=classification)
    assert not shapes.intersection(copied)
    optimizer.register_step_post_hook(lambda *_: None)
    surgeon.step(forget=batch(2), retain=batch(4), loss=classification)
    assert shapes <= set(copied)


def _adds_a_group(optimizer, group):
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def _changes_options(optimizer, group):
    group["lr"].mul_(0.5)
    group["new"] = 1
    group["weight_decay"] = 0.5
    del group["eps"]
    group["list"].append(3)


def _drops_parameters(optimizer, group):
    del group["params"][1:]
    optimizer.param_groups.clear()


def _loads(optimizer, group):
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})


@pytest.mark.parametrize("change", [_adds_a_group, _changes_options, _drops_parameters, _loads])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_hook_that_raises_leaves_groups_and_their_options(change, when):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.05))
    group = optimizer.param_groups[0]
    group["list"] = [1, 2]
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad())
    surgeon.step(forget=batch(2), retain=batch(3), loss=classification)
    before, options, held = state_of(model, optimizer), dict(group), list(group["params"])

    def hook(*_):
        change(optimizer, group)
        raise Boom

    handle = getattr(optimizer, f"register_step_{when}_hook")(hook)
    with pytest.raises(Boom):
        surgeon.step(forget=batch(2), retain=batch(3), loss=classification)
    handle.remove()
    assert_same_state(before, state_of(model, optimizer))
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0] is group
    assert list(map(id, group["params"])) == list(map(id, held))
    assert group["lr"] is options["lr"]
    assert float(group["lr"]) == pytest.approx(0.05)
    assert {k: group[k] for k in group if k != "params"} == {
        **{k: v for k, v in options.items() if k != "params"},
        "list": [1, 2],
    }
    surgeon.step(forget=batch(2), retain=batch(3), loss=classification)


def test_what_cannot_be_put_back_hides_no_error_and_no_gradient(monkeypatch):
    model = mlp()
    surgeon, optimizer = surgeon_of(model)
    grads = [torch.randn_like(p) for p in model.parameters()]
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad

    def broken(self):
        raise RuntimeError("a device is gone")

    monkeypatch.setattr("gradsurgery.undo._Taken.put_back", broken)
    _hook("pre")(optimizer)
    with pytest.raises(Boom):
        surgeon.step(forget=batch(2), retain=batch(3), loss=classification)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}])
def test_torchs_own_error_counts_no_step(options):
    model = mlp().float()
    optimizer = torch.optim.Adam(model.parameters(), **options)
    surgeon = gs.Surgeon(model, optimizer, gs.UPGrad())
    x, y = batch(3)
    surgeon.step(batch=(x.float(), y), loss=classification)
    for entries in optimizer.state.values():
        entries["exp_avg"] = entries["exp_avg"][..., :-1].clone()  # a state of other shapes
    before = state_of(model, optimizer)
    with pytest.raises(RuntimeError):
        surgeon.step(batch=(x.float(), y), loss=classification)
    assert_same_state(before, state_of(model, optimizer))


def test_buffers_that_cannot_be_written_to_do_not_hide_an_error():
    model = nn.Linear(3, 2)
    model.register_buffer("expanded", torch.zeros(1).expand(4))
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), gs.UPGrad())

    def loss(model, batch):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        surgeon.step(batch=torch.randn(4, 3), loss=loss)
