"""What becomes a parameter's `.grad`: memory of its own, laid out like the parameter."""

import sys
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.errors import NonFiniteError
from gradsurgery.spread import local

# a GPU's backward pass runs in a thread of its own, which lets go of what it returned a bit later
MOMENT, MOMENTS = 1e-4, 10  # s, and how many in all


def own(grads: list[Any]) -> list[Any]:
    """Tensors and None, as a backward pass returned them, each in memory that nothing else holds.

    Autograd hands one tensor to all parameters that were added, views of one to those that were
    stacked or expanded, and whatever a function's backward returns. What only this list holds stays
    as it is; all else is replaced in the list by a dense copy.
    """
    fresh = [torch.empty(1, device="cpu"), torch.empty(1, device="cpu").view(1, 1)]
    alone = [_holders(fresh, k) for k in range(2)]
    moments = MOMENTS
    for k in range(len(grads)):  # a variable would be one more that holds the tensor
        if grads[k] is None:
            continue
        dense, on_cpu = _dense(grads[k]), grads[k].is_cpu
        while dense and not on_cpu and moments and _holders(grads, k) not in alone:
            time.sleep(MOMENT)
            moments -= 1
        if not (dense and _holders(grads, k) in alone):
            grads[k] = grads[k].to_dense().clone(memory_format=torch.contiguous_format)
    return grads


def _holders(tensors: list[Any], k: int) -> tuple[int, ...]:
    """How many hold tensor k, its memory, and the tensor it is a view of."""
    tensor = tensors[k]
    storage = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    counts = sys.getrefcount(tensor), tensor._use_count(), storage
    base = tensor._base
    return counts if base is None else (*counts, sys.getrefcount(base), base._use_count())


def _dense(tensor: Tensor) -> bool:
    """Whether every value has a place of its own, and there are no gaps."""
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return tensor.layout == torch.strided
    return tensor.stride() == torch.empty_like(tensor, device="meta").stride()


def add_to(parameter: Tensor, grad: Tensor) -> None:
    """Add to `.grad` what is in memory of its own, which may become it."""
    if parameter.grad is None:
        parameter.grad = _laid_out(grad.detach(), parameter)
    elif parameter.grad.layout != torch.strided:
        parameter.grad = grad + parameter.grad
    else:
        parameter.grad += grad  # in place: others may hold it, as views of a bucket do


def _laid_out(grad: Tensor, parameter: Tensor) -> Tensor:
    if grad.is_contiguous() and parameter.is_contiguous():
        return grad
    out = torch.empty_like(parameter, dtype=grad.dtype)
    return grad if grad.stride() == out.stride() else out.copy_(grad)


def part(parameters: Iterable[Tensor]) -> None:
    """Copy gradients that autograd left in others' memory, as it does where views were added."""
    found = [
        (p.grad.data_ptr(), p, p.grad)
        for p in parameters
        if p.grad is not None and p.grad.layout == torch.strided
    ]
    end = 0
    for start, parameter, grad in sorted(found, key=lambda each: each[0]):
        if start < end:
            parameter.grad = grad.clone()
        else:
            end = start + grad.nbytes


def run_hooks(parameter: Tensor) -> None:
    """Those registered to run once all of a parameter's gradient is there."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    for hook in list(hooks.values()):
        hook(parameter)


def check_held(parameters: dict[str, nn.Parameter]) -> None:
    """Raise where the update of finite rows is more than its dtype holds."""
    grads = {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
    if not grads:
        return
    # one wait for all: the sum over an infinity or a NaN is one, and of what is finite it may be
    device = next(iter(grads.values())).device
    sums = [grad.sum().to(device, torch.float64) for grad in grads.values()]
    if bool(torch.stack(sums).isfinite().all()):
        return
    for name, grad in grads.items():
        if not bool(grad.isfinite().all()):
            raise NonFiniteError(
                f"rows: the update of {name} overflows {grad.dtype}; scale the losses down"
            )
