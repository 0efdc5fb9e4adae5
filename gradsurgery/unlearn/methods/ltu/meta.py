"""Gradients through a tuning step: what lowers a loss now and another one after the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gradsurgery.errors import InputError
from gradsurgery.ops.group_norm import group_norm

Scalar = Callable[[nn.Module], Tensor]  # a function of a model -> []
Grads = list[Tensor | None]


def own(grads: Grads, total: Tensor) -> tuple[Grads, Tensor]:
    """Gradients and a sum of one process, which are all there is."""
    return grads, total


def meta_gradient(
    model: nn.Module,
    tune: Sequence[Scalar],
    test: Sequence[Scalar],
    rate: float,
    *,
    weight: float = 1.0,
    order: Literal["first", "second"] = "second",
    of_all: Callable[[Grads, Tensor], tuple[Grads, Tensor]] = own,
) -> tuple[Grads, Tensor, Tensor]:
    """The gradient of L(t) + w M(t - a grad L(t)) at the model's parameters t.

    With g = grad L(t), H the Hessian of L at t and v = grad M(t - a g), it is g + w (v - a H v);
    first order leaves out the last term. H v is a derivative of g along v, never a matrix.

    Args:
        model: its parameters that require gradients are t, and are left alone.
        tune: L as a sum of functions, model -> scalar, one or more.
        test: M, likewise. Where there are several, each graph is let go before the next is made.
        rate: a, 0 or more.
        weight: w.
        of_all: where several ranks have parts of L and M, as of their samples: given the
            gradients and the sum of its own functions, those of all ranks. Called on each as often.

    Returns:
        the gradient, one tensor [*p.shape] per parameter, None where neither L nor M depends on
        it; L(t) and M at the tuned parameters.

    Model-Agnostic Meta-Learning, Finn et al. 2017 (arXiv:1703.03400).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("model: no parameter requires a gradient")
    exact = order == "second" and rate > 0
    whole = exact and len(tune) == 1  # one graph serves both derivatives
    draws = [_Draws(parameters[0].device) for _ in tune]
    with _twice_differentiable(exact):
        values = (drawn.kept(part, model) for drawn, part in zip(draws, tune, strict=True))
        grads, before = _gradient(values, parameters, whole)
    detached, before = of_all([None if g is None else g.detach() for g in grads], before)
    with _moved(parameters, detached, rate):
        ahead, after = _gradient((part(model) for part in test), parameters)
    ahead, after = of_all(ahead, after)
    if weight != 1:
        ahead = [None if v is None else weight * v for v in ahead]
    result = [_sum(grad, v) for grad, v in zip(detached, ahead, strict=True)]
    if exact:
        # of several parts each is computed again, with the same draws of dropout: no more than
        # one graph is held
        bent: Grads = [None] * len(parameters)
        for drawn, part in zip(draws, tune, strict=True):
            with _twice_differentiable(True):
                again = [] if whole else [drawn.again(part, model)]
                first = grads if whole else _gradient(again, parameters, graph=True)[0]
                curved = _curved(first, parameters, ahead)
            bent = [_sum(total, more) for total, more in zip(bent, curved, strict=True)]
        bent, _ = of_all(bent, before)
        result = [
            _sum(total, None if more is None else -rate * more)
            for total, more in zip(result, bent, strict=True)
        ]
    return result, before, after


@contextmanager
def _twice_differentiable(wanted: bool) -> Iterator[None]:
    """Kernels that fuse attention have no second derivative, and group norm has a faster one.

    Around derivatives too: activation checkpointing computes there again what it did before.
    """
    if not wanted:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), _FasterGroupNorm():
        yield


class _FasterGroupNorm(TorchFunctionMode):
    """Inside it `F.group_norm`, and so `nn.GroupNorm`, is ours."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        chosen = group_norm if func is F.group_norm else func
        return chosen(*args, **(kwargs or {}))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


@contextmanager
def _moved(parameters: list[nn.Parameter], grads: Grads, rate: float) -> Iterator[None]:
    """Parameters at t - a g inside. Their data is exchanged, not the parameters: whoever holds
    them, under whatever name, computes at the tuned point, also where it recomputes."""
    held = [p.data for p in parameters]
    try:
        for p, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                p.data = p.data.sub(grad.detach(), alpha=rate)
        yield
    finally:
        for p, data in zip(parameters, held, strict=True):
            p.data = data


class _Draws:
    """torch's generators before a function, so that it can be computed again, draws and all."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = [device] if device.type == "cuda" else []

    def kept(self, function: Scalar, model: nn.Module) -> Tensor:
        self.states = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self.cuda]
        return function(model)

    def again(self, function: Scalar, model: nn.Module) -> Tensor:
        with torch.random.fork_rng(self.cuda):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.cuda, self.states[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            return function(model)


def _gradient(
    values: Iterable[Tensor], parameters: Sequence[Tensor], graph: bool = False
) -> tuple[Grads, Tensor]:
    """Of the sum of scalars, and that sum."""
    grads: Grads = [None] * len(parameters)
    total = torch.zeros(())
    for value in values:
        parts = torch.autograd.grad(value, parameters, create_graph=graph, allow_unused=True)
        grads = [_sum(a, b) for a, b in zip(grads, parts, strict=True)]
        total = total.to(value) + value.detach()
    return grads, total


def _curved(grads: Grads, parameters: Sequence[Tensor], along: Grads) -> Sequence[Tensor | None]:
    """H v, of grads with a graph; those of a linear loss have none."""
    bent = [
        (grad, v)
        for grad, v in zip(grads, along, strict=True)
        if grad is not None and grad.requires_grad and v is not None
    ]
    if not bent:
        return [None] * len(parameters)
    outputs, vectors = zip(*bent, strict=True)
    return torch.autograd.grad(outputs, parameters, vectors, allow_unused=True)
