"""An interrupt anywhere in a step leaves it whole or not begun."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurgery as gs
from tests.models import assert_same_state, batch, classification, mlp, state_of


class Counting(nn.Module):
    """A forward pass changes a buffer."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layers(x)


class Own(torch.optim.SGD):
    """Steps past the version counters of parameters."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=group["lr"])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "own": lambda p: Own(p, lr=0.1),
    "hooked": lambda p: _hooked(torch.optim.Adam(p, lr=0.1)),
}
WAYS = {"captured": {}, "in parts": {"micro_batch": 2}, "stored": {"rows": "stored"}}


def _hooked(optimizer):
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def _made(optimizer, way):
    torch.manual_seed(0)
    model = Counting()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    rule = gs.PCGrad()
    surgeon = gs.Surgeon(model, optimizer, rule, **WAYS[way])
    surgeon.step(batch=batch(3), loss=classification)
    next(model.parameters()).grad = torch.ones(8, 6).double()
    return surgeon, batch(3)


def _state(surgeon):
    rule = {f"rule.{name}": value.clone() for name, value in surgeon.rule.state_dict().items()}
    return {**state_of(surgeon.model, surgeon.optimizer), **rule}


class AtOperation(TorchDispatchMode):
    """An interrupt at the k-th operation, if torch's own optimizer is not at work."""

    stride = 3  # of what is tried: a step has hundreds

    def __init__(self, k):
        super().__init__()
        self.left = k

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0 and not _in_optimizer(sys._getframe(1)):
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


class AtLine:
    """An interrupt at the k-th line, call or return of what orders a step and what undoes it."""

    stride = 1
    places = (
        ("gradsurgery/step.py", "step"),
        ("gradsurgery/step.py", "_update"),
        ("gradsurgery/update.py", "add_update"),
    )

    def __init__(self, k):
        self.left = k

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        name = "/".join(Path(frame.f_code.co_filename).parts[-2:])
        if name != "gradsurgery/undo.py" and (name, frame.f_code.co_name) not in self.places:
            return None
        self.left -= 1
        if self.left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self.trace


def _in_optimizer(frame):
    while frame is not None:
        if f"torch{'/'}optim{'/'}" in frame.f_code.co_filename.replace("\\", "/"):
            return True
        frame = frame.f_back
    return False


def _outcomes(optimizer, way, at):
    """Interrupts at every place in turn, until a step ends first: how many undone, how many whole.

    Every outcome is compared: all as before, or all as after.
    """
    surgeon, data = _made(optimizer, way)
    before = _state(surgeon)
    surgeon.step(batch=data, loss=classification)
    after = _state(surgeon)
    assert not torch.equal(after["rule.draws"], before["rule.draws"])
    counts = {"undone": 0, "whole": 0}
    start = copy.deepcopy(_made(optimizer, way)[0])
    k = 1 - at.stride
    while True:
        k += at.stride
        surgeon = copy.deepcopy(start)  # without `.grad`
        next(surgeon.model.parameters()).grad = torch.ones(8, 6).double()
        try:
            with at(k) as place:
                surgeon.step(batch=data, loss=classification)
        except KeyboardInterrupt:
            found = _state(surgeon)
            moved = not torch.equal(found["model.layers.0.weight"], before["model.layers.0.weight"])
            assert_same_state(after if moved else before, found)
            counts["whole" if moved else "undone"] += 1
        else:
            if place.left > 0:  # else it was in the optimizer
                return counts


@pytest.mark.parametrize("way", WAYS)
def test_at_any_operation(way):
    counts = _outcomes("sgd", way, AtOperation)
    assert counts["undone"] > 20


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_at_any_line(optimizer):
    counts = _outcomes(optimizer, "captured", AtLine)
    assert counts["undone"] > 50
    assert counts["whole"] > 2


@pytest.mark.parametrize("way", [w for w in WAYS if w != "captured"])
def test_at_any_line_of_other_ways(way):
    counts = _outcomes("sgd", way, AtLine)
    assert counts["undone"] > 50
    assert counts["whole"] > 2


def test_what_is_told_is_known_before_parameters_move(monkeypatch):
    surgeon, data = _made("sgd", "captured")
    before = _state(surgeon)

    def fails(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("gradsurgery.info.StepInfo", fails)
    with pytest.raises(MemoryError):
        surgeon.step(batch=data, loss=classification)
    assert_same_state(before, _state(surgeon))
