"""What a trainer is given, checked before anything changes: one error that names the argument."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradsurgery.errors import InputError, PositionError
from gradsurgery.optimizers import check_needs_no_closure, steppable
from gradsurgery.unlearn.objectives.base import Objective, Outputs, is_objective
from gradsurgery.unlearn.objectives.classification import Classification, integers

P = ParamSpec("P")
R = TypeVar("R")


def by_name(*first: str, others: Sequence[str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose arguments after the `first` are refused by position, all at once.

    Sets to forget and to retain are alike in kind, and what takes them in the other order would
    unlearn what should stay. Python's own error would say that keywords are missing, not why.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def checked(*args: P.args, **options: P.kwargs) -> R:
            of = type(args[0]).__name__ if first[0] == "self" else function.__name__
            if len(args) > len(first):
                allowed = " and ".join(name for name in first if name != "self")
                names = ", ".join(f"{name}=" for name in others)
                raise PositionError(
                    f"{of} takes {allowed} by position and all else by name, {names}: "
                    "a set to forget in the place of one to retain would unlearn what should stay"
                )
            return function(*args, **options)

        return checked

    return decorate


def check_model(model: Any) -> None:
    """Raise `InputError` unless `model` is a network with values that one process can train."""
    check_instance("model", model, nn.Module)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InputError(f"model: {name} has no shape yet: run one forward pass first")
        if tensor.is_meta:
            raise InputError(f"model: {name} is on the meta device and has no values: load some")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; `InputError` where there is none."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise InputError("model: no parameter requires a gradient: there is nothing to unlearn")
    return found


def check_instance(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise InputError(f"{name} must be a {kind.__name__}, got {_named(value)}")


def check_loss(loss: Any) -> None:
    if is_objective(loss):
        return
    if isinstance(loss, nn.Module) or getattr(loss, "__module__", "") == "torch.nn.functional":
        got = getattr(loss, "__name__", type(loss).__name__)
    elif callable(loss) and not isinstance(loss, type):
        return
    else:
        got = _named(loss)
    raise InputError(
        f"loss must be a function (model, batch) -> losses [B] or an Objective, got {got}: "
        "gradsurgery.unlearn.cross_entropy is one for (inputs, labels)"
    )


def checked_outputs(objective: Objective, found: Any, size: int) -> Outputs:
    """What a task said of B = `size` samples, if it is `Outputs`, on the device of its logits."""
    if type(objective) is Classification:  # which has looked itself
        return found
    task = type(objective).__name__
    if not (isinstance(found, tuple) and len(found) == 3):
        wanted = "Outputs(logits, labels, sample)"
        raise InputError(f"{task}.outputs must return {wanted}, got {_named(found)}")
    logits, *rest = found
    real = isinstance(logits, Tensor) and logits.dim() == 2 and logits.is_floating_point()
    if not real:
        got = list(logits.shape) if isinstance(logits, Tensor) else _named(logits)
        raise InputError(f"{task}.outputs: logits must be real numbers [N, C], got {got}")
    ends = {"labels": logits.shape[1], "sample": size}
    kept = []
    for (name, end), known in zip(ends.items(), rest, strict=True):
        where = f"{task}.outputs: {name}"
        known = integers(known, len(logits), where, of="row of logits")
        if len(known) and not 0 <= int(known.min()) <= int(known.max()) < end:
            least, most = int(known.min()), int(known.max())
            raise InputError(f"{where} must be in [0, {end}), got {least} to {most}")
        kept.append(known.to(logits.device))
    return Outputs(logits, *kept)


def warn_of_unused_loss(name: str, instead: str) -> None:
    warnings.warn(
        f"loss: {name} never calls it, for {instead}; with "
        "gradsurgery.unlearn.cross_entropy in its place there is no warning",
        UserWarning,
        stacklevel=4,  # past the check of names and the trainer's __init__
    )


def check_functions(**given: Callable[..., Any] | None) -> None:
    """Raise `InputError` naming the first argument that is neither None nor can be called."""
    for name, value in given.items():
        if value is not None and not callable(value):
            raise InputError(f"{name} must be a function or None, got {_named(value)}")


def check_callbacks(callbacks: Any) -> None:
    fits = isinstance(callbacks, Sequence) and all(map(callable, callbacks))
    if not fits:
        raise InputError(f"callbacks must be a sequence of functions, got {_named(callbacks)}")


def check_integer(name: str, value: Any, least: int = -(2**63)) -> int:
    """`value` as an int of 64 bits, at least `least`; NumPy's integers are some too."""
    try:
        found = operator.index(value)
    except (TypeError, RuntimeError):
        found = None
    if found is None or isinstance(value, bool):
        raise InputError(f"{name} must be an integer, got {_named(value)}")
    if found < least:
        raise InputError(f"{name} must be at least {least}, got {found}")
    if found >= 2**63:
        raise InputError(f"{name} must be less than 2**63, got {found}")
    return found


def check_plain(name: str, value: Any) -> None:
    """Raise `InputError` for an option that no configuration file could hold."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not all(part is None or isinstance(part, (bool, int, float, str)) for part in parts):
        raise InputError(f"{name} must be a plain value, got {_named(value)}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        got = repr(value) if isinstance(value, str) else _named(value)
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {got}")


def checked_optimizer(optimizer: Any, model: nn.Module) -> torch.optim.Optimizer:
    """What a function made, if it is an optimizer that can step on the gradients of a model."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer must make a torch optimizer, got {_named(optimizer)}")
    own = {id(parameter) for parameter in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(parameter) in own for parameter in held):
        raise InputError(
            "optimizer holds none of the model's parameters, but those of another, such as a copy: "
            "make it of the parameters it is given"
        )
    sparse = any(getattr(module, "sparse", False) for module in model.modules())
    if isinstance(optimizer, torch.optim.SparseAdam) and sparse:
        return optimizer
    found = steppable(optimizer)
    check_needs_no_closure(found)
    return found


def check_schedule(schedule: Any) -> None:
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise InputError("schedule: ReduceLROnPlateau needs a metric after each step; not here")
    if not (hasattr(schedule, "step") and hasattr(schedule, "state_dict")):
        raise InputError(f"schedule must make a torch scheduler, got {_named(schedule)}")


def _named(value: Any) -> str:
    """A value's type, or the class it is: never its content, which may be tensors."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
