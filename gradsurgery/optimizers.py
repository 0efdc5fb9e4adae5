"""Which optimizers can be stepped on given gradients, and what runs in their steps."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gradsurgery.ops._inputs import check
from gradsurgery.spread import check_one_rank_optimizer


def steppable(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """`optimizer`, or the one that accelerate wrapped, if one step on `.grad` alone is a step.

    Raises:
        InputError: one that needs sparse gradients or a graph of its steps, or that steps on
            several ranks; the message says what to use instead.
    """
    if any(f"{base.__module__}.".startswith("accelerate.") for base in type(optimizer).__mro__):
        optimizer = _inside(optimizer)
    name = type(optimizer).__name__
    check_one_rank_optimizer(optimizer)
    check(
        not isinstance(optimizer, torch.optim.SparseAdam),
        f"optimizer: {name} steps on sparse gradients, and an update of rows is dense; use Adam",
    )
    for group in optimizer.param_groups:
        check(
            not group.get("differentiable"),
            f"optimizer: {name} has differentiable=True, and parameters are stepped in place; "
            "use differentiable=False",
        )
        check(
            not (group.get("capturable") and any(p.is_cpu for p in group["params"])),
            f"optimizer: {name} has capturable=True, which is for parameters on a GPU; "
            "use capturable=False",
        )
    return optimizer


def scaler_of(
    optimizer: torch.optim.Optimizer, given: torch.amp.GradScaler | None
) -> torch.amp.GradScaler | None:
    """The scaler given, or that of accelerate's wrapper; None where it is off."""
    scaler = getattr(optimizer, "scaler", None) if given is None else given
    check(
        scaler is None or isinstance(scaler, torch.amp.GradScaler),
        f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}",
    )
    return scaler if scaler is not None and scaler.is_enabled() else None


def check_stage(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Raise where a scaler holds gradients of this optimizer for unscaled already."""
    stage = getattr(scaler, "_per_optimizer_states", {}).get(id(optimizer), {}).get("stage")
    check(
        stage is None or stage.name == "READY",
        "scaler: it has unscaled or stepped this optimizer since its last update(), and a step "
        "does both itself: call scaler.update() first, or backward() in place of step()",
    )


def forget_stage(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """After a step that was not taken: else the next one is not unscaled."""
    getattr(scaler, "_per_optimizer_states", {}).pop(id(optimizer), None)


def check_needs_no_closure(optimizer: torch.optim.Optimizer) -> None:
    """Raise where a step computes losses several times, as that of LBFGS."""
    name = type(optimizer).__name__
    # of the class: a scheduler's wrapper around the bound method shows the function's `self`
    given = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    needed = [
        parameter.name
        for parameter in given
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    check(
        not needed,
        f"optimizer: {name}.step needs {', '.join(needed)}, to compute losses again within a step; "
        "call optimizer.step(closure) with a closure that calls optimizer.zero_grad(), "
        "surgeon.add(...) and surgeon.backward(), and returns the loss",
    )


def check_steps_now(given: torch.optim.Optimizer) -> None:
    """Raise where accelerate's wrapper would leave this step out, or a Trainer add another."""
    check(
        not _in_training_step(),
        "step: a Trainer clips gradients and steps itself after its training_step; call add for "
        "each micro-batch, and backward where self.accelerator.sync_gradients is True",
    )
    state = getattr(given, "gradient_state", None)
    check(
        getattr(state, "sync_gradients", True),
        "optimizer: accelerate's accumulate leaves this step out, to sum gradients over several, "
        "and each step of a Surgeon is a whole one; call add for each micro-batch, backward after "
        "the last, and the optimizer's own step",
    )


def _in_training_step() -> bool:
    """Whether a transformers.Trainer has called its training_step, or that of a subclass."""
    path = getattr(sys.modules.get("transformers.trainer"), "__file__", None)
    frame = None if path is None else sys._getframe()
    while frame is not None and frame.f_back is not None:
        above = frame.f_back
        if frame.f_code.co_name == "training_step" and above.f_code.co_filename == path:
            return True
        frame = above
    return False


def note_skipped(given: torch.optim.Optimizer, skipped: bool) -> None:
    """Tell accelerate's wrapper whether its scaler left a step out, which its schedulers ask."""
    if hasattr(given, "_is_overflow"):
        cast(Any, given)._is_overflow = skipped


def metric(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], reached: list[bool]
) -> list[Tensor] | None:
    """lr / (sqrt(v) + eps) of Adam's steps so far, per parameter; None before the first."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    state = optimizer.state
    known = [name for name, p in parameters.items() if "exp_avg_sq" in state.get(p, {})]
    if not known:
        return None
    found = []
    for (name, parameter), used in zip(parameters.items(), reached, strict=True):
        if not used and name not in known:  # its rows are zero in any metric
            found.append(torch.ones_like(parameter))
            continue
        check(
            name in known,
            f"precondition: the optimizer has state for some parameters only, none for {name}: "
            "let it take a step with a rule without precondition",
        )
        group, seen = groups[id(parameter)], state[parameter]
        correction = 1 - group["betas"][1] ** float(seen["step"])
        root = (seen["exp_avg_sq"] / correction).sqrt()
        found.append(group["lr"] / (root + group["eps"]))
    return found


class Note:
    """A hook of ours around an optimizer's step, which neither raises nor moves anything."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __call__(self, *_: Any) -> None:
        self.call()


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
        or not all(isinstance(hook, Note) for hook in optimizer._optimizer_step_pre_hooks.values())
        or bool(optimizer._optimizer_step_post_hooks)
        or bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks)
    )


@contextmanager
def after_steps(parameters: Iterable[Tensor], work: Callable[[], None]) -> Iterator[None]:
    """In the body, does work after each optimizer's step on any of these, before other post hooks.

    Those see what the work has made of the step. An optimizer whose class keeps torch from calling
    hooks does not call this one either.
    """
    mine, key, found = {id(p) for p in parameters}, object(), []

    def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            hooks: Any = optimizer._optimizer_step_post_hooks
            found.append(hooks)
            hooks[key] = lambda *_: work()
            hooks.move_to_end(key, last=False)

    known: Any = _global_optimizer_pre_hooks
    try:
        try:
            known[key] = before
            yield
        finally:
            _without(key, [known, *found])
    finally:  # again: an interrupt may come while the first ends
        _without(key, [known, *found])


def _without(key: object, every: list[Any]) -> None:
    for hooks in every:
        hooks.pop(key, None)


def _inside(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer in accelerate's wrapper, which leaves out steps while gradients accumulate."""
    name, inner = type(optimizer).__name__, getattr(optimizer, "optimizer", None)
    check(
        isinstance(inner, torch.optim.Optimizer),
        f"optimizer: {name} is stepped by another engine, not on given gradients; "
        "use the optimizer itself, in one process",
    )
    return cast(torch.optim.Optimizer, inner)
