"""Whether parameters act on losses by their products with inputs alone, tried out."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# Of the sum of squares of inputs, what counts as nothing: a trial then moves by its root, 1e-7,
# along an input.
EPS = 1e-14


def acting_otherwise(
    parameters: dict[str, nn.Parameter],
    seen: dict[str, dict[int, Tensor]],
    loss: Callable[[], Tensor],
    before: Tensor,
) -> list[str]:
    """Names of parameters that change a loss though they are moved off the inputs it has seen.

    As a norm of weights does that no gradient flows through: autograd's graph does not show it.

    Args:
        seen: the moments of a parameter's inputs, [g, d, d] by dimension, as `moments` has them.
        loss: the loss, [], of the parameters as they are at the moment.
        before: what it is.
    """
    free = {name: _step(parameters[name]) for name in seen}
    off = {name: _off(free[name], moments) for name, moments in seen.items()}

    def change(steps: dict[str, Tensor], names: Iterable[str]) -> float:
        kept = {name: parameters[name].data for name in names}
        try:
            for name, value in kept.items():  # another tensor: a graph that awaits its backward
                parameters[name].data = value + steps[name].to(value.dtype)  # pass has this one
            return float((loss() - before).abs())
        finally:
            for name, value in kept.items():
                parameters[name].data = value

    with torch.no_grad():
        # a step rounded to few bits is off the inputs no longer, nor does a loss resolve it
        eps = max(torch.finfo(t.dtype).eps for t in (before, *(parameters[name] for name in seen)))
        scales = [abs(float(before)), change(free, free)]
        limit = (1e-7 + 30 * eps) * max(scale for scale in scales if math.isfinite(scale))
        found, rest = [], list(seen)
        while not change(off, rest) <= limit:
            found += [name for name in rest if not change(off, [name]) <= limit] or rest
            rest = [name for name in rest if name not in found]
    return found


def _step(parameter: nn.Parameter) -> Tensor:
    """A random direction in float64, as long as the parameter, or 0.1 an element where it is 0."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    step = torch.randn(parameter.shape, dtype=torch.float64, device="cpu", generator=generator)
    size = float(parameter.detach().double().norm()) / math.sqrt(max(parameter.numel(), 1))
    return step.to(parameter.device) * (size or 0.1)


def _off(step: Tensor, moments: dict[int, Tensor]) -> Tensor:
    """A step without what inputs see of it: multiplied by eps (Σ x xᵀ + eps)⁻¹."""
    shape = step.shape
    for dim, matrices in moments.items():
        g, d, _ = matrices.shape
        total = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        eps = torch.where(total > 0, EPS * total, 1)
        shifted = matrices + eps * torch.eye(d, dtype=matrices.dtype, device=matrices.device)
        planes = step.reshape(g, d, -1) if dim == 0 else step.reshape(g, -1, d).mT
        planes = eps * torch.linalg.solve(shifted, planes)
        step = planes if dim == 0 else planes.mT
    return step.reshape(shape)
