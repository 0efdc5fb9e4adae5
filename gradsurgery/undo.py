"""What an error must not leave half done: buffers, parameters, the optimizer's state."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def runs_foreign_code(optimizer: torch.optim.Optimizer) -> bool:
    """Whether anything but torch's own optimizer can raise in `optimizer.step()`."""
    kind = type(optimizer)
    step = vars(optimizer).get("step", kind.step)
    if getattr(step, "_wrapped_by_lr_sched", False):  # counts steps, for a warning
        step = step.__wrapped__
    return (
        not kind.__module__.startswith("torch.optim.")
        or not kind.step.__module__.startswith("torch.optim.")
        or step is not kind.step
        or bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
        or bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks)
    )


@contextmanager
def buffers_undone_by_errors(model: nn.Module) -> Iterator[None]:
    """Puts the model's buffers back if the body raises: a forward pass may update them."""
    undo = _buffers(model)
    try:
        yield
    except BaseException:
        undo()
        raise


@contextmanager
def buffers_undone(model: nn.Module) -> Iterator[None]:
    """The same whether it raises or not."""
    undo = _buffers(model)
    try:
        yield
    finally:
        undo()


def _buffers(model: nn.Module) -> Callable[[], None]:
    """What puts them back as they are."""
    owned = [(m, name, b) for m in model.modules() for name, b in m._buffers.items()]
    copies = {id(b): (b, b.detach().clone()) for b in model.buffers()}

    def undo() -> None:
        with torch.no_grad():
            for module, name, buffer in owned:
                module._buffers[name] = buffer
            for buffer, saved in copies.values():
                buffer.copy_(saved)

    return undo


@contextmanager
def undone_by_errors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Puts parameters and optimizer state back if the body raises; holds a copy of both."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {id(p): p for p in (*held, *model.parameters())}
    copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    state = {p: {k: (v, _copy(v)) for k, v in s.items()} for p, s in optimizer.state.items()}
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for key, tensor in tensors.items():
                tensor.copy_(copies[key])
            for parameter in [p for p in optimizer.state if p not in state]:
                del optimizer.state[parameter]
            for parameter, entries in state.items():
                for name, (value, saved) in entries.items():
                    kept = value.copy_(saved) if isinstance(value, Tensor) else saved
                    optimizer.state[parameter][name] = kept
            for group, option in zip(optimizer.param_groups, options, strict=True):
                group.update(option)
        raise


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
