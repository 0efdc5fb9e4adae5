"""When a step is projected: before whatever else hangs on the optimizer sees it, or not at all."""

import copy
import inspect
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradsurgery as gs


def loss(model, batch):
    return (model(batch[0]) - 1).square().sum(1)


def made(optimizer=torch.optim.Adam, dtype=torch.float32):
    """A model, a projection that has observed data, an optimizer, new data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    kept = gs.NullSpace(model)
    kept.observe((torch.randn(4, 12, dtype=dtype),), loss)
    return model, kept, optimizer(model.parameters(), lr=1e-2), torch.randn(8, 12, dtype=dtype)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    return all(map(torch.equal, one, other))


class Watching:
    """Notes the weights it sees."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, *_):
        self.seen.append(values(self.model))


class Within(torch.optim.Optimizer):
    """Has another optimizer step, and its own hooks after that."""

    def __init__(self, parameters, lr):
        self.inner = torch.optim.SGD(parameters, lr=lr)
        super().__init__(self.inner.param_groups, {"lr": lr})
        self.param_groups = self.inner.param_groups

    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        self.inner.step()


def scheduled(parameters, lr):
    optimizer = torch.optim.SGD(parameters, lr=lr)
    optimizer.kept = torch.optim.lr_scheduler.StepLR(optimizer, 5)  # wraps `step`
    return optimizer


OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "scheduled": scheduled,
    "within another": Within,
}


def surgeon_step(model, kept, optimizer, data):
    gs.Surgeon(model, optimizer, gs.Mean(), project=kept).step(batch=(data,), loss=loss)


def own_step(model, kept, optimizer, data):
    optimizer.zero_grad()
    loss(model, (data,)).mean().backward()
    with kept.steps():
        optimizer.step()


WAYS = {"surgeon": surgeon_step, "steps": own_step}


@pytest.mark.parametrize("where", ["optimizer", "everywhere"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_hangs_on_an_optimizer_sees_the_step_taken(optimizer, way, where):
    model, kept, optimizer, data = made(OPTIMIZERS[optimizer])
    watching = Watching(model)
    register = (
        optimizer.register_step_post_hook
        if where == "optimizer"
        else register_optimizer_step_post_hook
    )
    handle = register(watching)
    try:
        for _ in range(3):
            before = values(model)
            WAYS[way](model, kept, optimizer, data)
            assert not same(before, values(model))
            assert same(watching.seen[-1], values(model))
    finally:
        handle.remove()


@pytest.mark.parametrize("way", WAYS)
def test_a_mean_of_weights_is_held_as_they_are(way):
    model, kept, optimizer, data = made(dtype=torch.float64)
    past = torch.randn(4, 12, dtype=torch.float64)
    kept.observe((past,), loss)
    before = model(past).detach()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(model))
    for _ in range(5):
        WAYS[way](model, kept, optimizer, data)
    torch.testing.assert_close(averaged(past).detach(), before, rtol=0, atol=1e-12)


def test_accelerates_own_wrapper():
    accelerate = pytest.importorskip("accelerate")
    model, kept, optimizer, data = made()
    watching = Watching(model)
    optimizer.register_step_post_hook(watching)
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    for way in WAYS.values():
        way(model, kept, wrapped, data)
        assert same(watching.seen[-1], values(model))


@pytest.mark.parametrize("way", WAYS)
def test_what_a_hook_moves_is_projected_too(way):
    model, kept, optimizer, data = made(dtype=torch.float64)
    past = torch.randn(4, 12, dtype=torch.float64)
    kept.observe((past,), loss)
    before, start = model(past).detach(), values(model)
    optimizer.register_step_post_hook(lambda *_: model[0].weight.data.clamp_(-0.1, 0.1))
    WAYS[way](model, kept, optimizer, data)
    torch.testing.assert_close(model(past).detach(), before, rtol=0, atol=1e-12)
    assert (model[0].weight - start[0]).abs().max() > 0.02


def test_steps_past_hooks_are_projected_at_the_end():
    model, kept, optimizer, data = made(dtype=torch.float64)
    past = torch.randn(4, 12, dtype=torch.float64)
    kept.observe((past,), loss)
    before, start = model(past).detach(), values(model)

    def step(closure=None):
        for p in model.parameters():
            p.data.sub_(p.grad, alpha=0.1)

    optimizer.step = step
    own_step(model, kept, optimizer, data)
    torch.testing.assert_close(model(past).detach(), before, rtol=0, atol=1e-12)
    assert not same(start, values(model))


def test_several_steps_in_one_body_are_one():
    model, kept, optimizer, data = made(torch.optim.SGD, torch.float64)
    other, alike, apart, _ = made(torch.optim.SGD, torch.float64)
    watching = Watching(model)
    optimizer.register_step_post_hook(watching)
    loss(model, (data,)).mean().backward()
    loss(other, (data,)).mean().backward()
    with kept.steps():
        for _ in range(3):
            optimizer.step()
    for _ in range(3):
        with alike.steps():
            apart.step()
    torch.testing.assert_close(values(model), values(other), rtol=0, atol=1e-14)
    assert same(watching.seen[-1], values(model))


def test_other_optimizers_are_let_be():
    """As one that steps a discriminator in the same body."""
    model, kept, optimizer, data = made()
    alone, twin = nn.Linear(12, 3), nn.Linear(12, 3)
    twin.load_state_dict(alone.state_dict())
    seen = []
    another, apart = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, twin))
    another.register_step_post_hook(lambda *_: seen.append(len(another._optimizer_step_post_hooks)))
    for m in (model, alone, twin):
        loss(m, (data,)).mean().backward()
    with kept.steps():
        another.step()
        optimizer.step()
    apart.step()
    assert same(values(alone), values(twin)) and seen == [1]


@contextmanager
def nothing_left(*optimizers):
    def counts():
        known = [o._optimizer_step_post_hooks for o in optimizers]
        every = [*known, _global_optimizer_pre_hooks, _global_optimizer_post_hooks]
        return list(map(len, every))

    before = counts()
    yield
    assert counts() == before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_no_hook_stays(way, error):
    model, kept, optimizer, data = made()

    def fails(*_):
        if error is not None:
            raise error

    optimizer.register_step_post_hook(fails)
    before = values(model)
    with nothing_left(optimizer):
        if error is None:
            WAYS[way](model, kept, optimizer, data)
        else:
            with pytest.raises(error):
                WAYS[way](model, kept, optimizer, data)
            assert same(before, values(model))
    assert copy.deepcopy(optimizer).state_dict().keys() == optimizer.state_dict().keys()


class AtLine:
    """An interrupt at the k-th line, call or return of what projects a step."""

    places = ("gradsurgery/optimizers.py", "surgery/inputs.py", "gradsurgery/undo.py")

    def __init__(self, k):
        self.left = k

    def __enter__(self):
        sys.settrace(self.trace)

    def __exit__(self, *_):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        name = "/".join(Path(frame.f_code.co_filename).parts[-2:])
        if name not in self.places and frame.f_code.co_name != "step":
            return None
        # one in a generator that is being closed would be swallowed
        if "/torch/" in frame.f_code.co_filename or frame.f_code.co_name == "<genexpr>":
            return None
        if event == "return" and frame.f_code.co_flags & inspect.CO_GENERATOR:
            return self.trace  # it would be raised in a generator that waits, as no signal is
        self.left -= 1
        if self.left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self.trace


def test_an_interrupt_anywhere_leaves_a_step_whole_or_not_begun():
    start, kept, optimizer, data = made(torch.optim.SGD)
    optimizer.register_step_post_hook(lambda *_: None)
    before = values(start)
    surgeon = gs.Surgeon(start, optimizer, gs.Mean(), project=kept)
    surgeon.step(batch=(data,), loss=loss)
    after, outcomes, k = values(start), {"undone": 0, "whole": 0}, 0
    while True:
        k += 1
        with torch.no_grad():
            for p, value in zip(start.parameters(), before, strict=True):
                p.copy_(value)
        with nothing_left(optimizer):
            place = AtLine(k)
            try:
                with place:
                    surgeon.step(batch=(data,), loss=loss)
            except KeyboardInterrupt:
                whole = same(values(start), after)
                assert whole or same(values(start), before)
                outcomes["whole" if whole else "undone"] += 1
            else:
                assert place.left > 0
                break
    assert outcomes["undone"] > 100 and outcomes["whole"] > 2, outcomes
