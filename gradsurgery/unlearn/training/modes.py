"""Training and evaluation modes, gradients and values, given back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gradsurgery.ranks.shards import rest
from gradsurgery.spread import local


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module is in the mode it had, whatever happens inside."""
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside, each module in the mode it had afterwards."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def grads_kept(model: nn.Module) -> Iterator[None]:
    """No `.grad` inside, and afterwards each as it was, whatever happens inside."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.grad = None  # not to be zeroed in place
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


@contextmanager
def values_undone_by_errors(model: nn.Module) -> Iterator[None]:
    """Puts parameters that train and all buffers back if the body raises.

    The copy is in the CPU's memory, where there is more of it.
    """
    rest(model)
    owned = [(m, name, buffer) for m in model.modules() for name, buffer in m._buffers.items()]
    trained = [p for p in model.parameters() if p.requires_grad]
    held = [local(tensor) for tensor in (*trained, *model.buffers())]
    copies = [(tensor, tensor.to("cpu", copy=True)) for tensor in held]
    try:
        yield
    except BaseException:
        rest(model)
        with torch.no_grad():
            for module, name, buffer in owned:
                module._buffers[name] = buffer
            for tensor, saved in copies:
                tensor.copy_(saved)
        raise
