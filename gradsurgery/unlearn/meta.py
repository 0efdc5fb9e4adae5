"""Gradients through a tuning step: what lowers a loss now and another one after the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradsurgery.errors import InputError

Objective = Callable[[nn.Module], Tensor]  # -> a scalar


class _Holder(nn.Module):
    """A module whose forward is an objective, so that functional_call swaps the parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, objective: Objective) -> Tensor:
        return objective(self.model)


def meta_gradient(
    model: nn.Module,
    tune: Sequence[Objective],
    test: Sequence[Objective],
    rate: float,
    *,
    order: Literal["first", "second"] = "second",
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradient of L(t) + M(t - a grad L(t)) at the model's parameters t.

    With g = grad L(t), H the Hessian of L at t and v = grad M(t - a g), it is g + v - a H v; first
    order leaves out the last term. H v is a derivative of g along v, never a matrix.

    Args:
        model: its parameters that require gradients are t, and are left alone.
        tune: L as a sum of objectives, model -> scalar, one or more.
        test: M, likewise. Where there are several, each graph is let go before the next is made.
        rate: a, 0 or more.

    Returns:
        the gradient, one tensor [*p.shape] per parameter; L(t) and M at the tuned parameters.

    Model-Agnostic Meta-Learning, Finn et al. 2017 (arXiv:1703.03400).
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise InputError("model: no parameter requires a gradient")
    parameters = list[Tensor](named.values())
    exact = order == "second" and rate > 0
    whole = exact and len(tune) == 1  # one graph serves both derivatives
    # kernels that fuse attention have no second derivative
    with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
        grads, before = _gradient((part(model) for part in tune), parameters, graph=whole)
        tuned = {
            f"model.{name}": p.detach().sub(grad.detach(), alpha=rate).requires_grad_()
            for (name, p), grad in zip(named.items(), grads, strict=True)
        }
        holder = _Holder(model)
        values = (functional_call(holder, tuned, (part,)) for part in test)
        ahead, after = _gradient(values, list(tuned.values()))
        result = [grad.detach() + v for grad, v in zip(grads, ahead, strict=True)]
        if exact:
            # of several parts each is computed again: no more than one graph is held
            for part in tune:
                first = grads if whole else _gradient([part(model)], parameters, graph=True)[0]
                for total, curved in zip(result, _curved(first, parameters, ahead), strict=True):
                    total.sub_(curved, alpha=rate)
    return result, before, after


def _gradient(
    values: Iterable[Tensor], parameters: list[Tensor], graph: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Of the sum of scalars, and that sum."""
    grads, total = [], torch.zeros(())
    for value in values:
        parts = torch.autograd.grad(value, parameters, create_graph=graph, materialize_grads=True)
        grads = [a + b for a, b in zip(grads, parts, strict=True)] if grads else list(parts)
        total = total.to(value) + value.detach()
    return grads, total


def _curved(grads: list[Tensor], parameters: list[Tensor], along: list[Tensor]) -> list[Tensor]:
    """H v, of grads with a graph; those of a linear loss have none."""
    bent = [(grad, v) for grad, v in zip(grads, along, strict=True) if grad.requires_grad]
    if not bent:
        return [torch.zeros_like(p) for p in parameters]
    outputs, vectors = zip(*bent, strict=True)
    return list(torch.autograd.grad(outputs, parameters, vectors, materialize_grads=True))
