"""Whether parameters act on losses by their products with inputs alone, tried out."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# Of the sum of squares of inputs, what counts as nothing: a trial then moves by its root, 1e-7,
# along each direction that inputs have.
EPS = 1e-14
# The share of a parameter that it is moved by to see whether losses are flat: in bfloat16 too it
# is a few units in the last place.
SMALL = 1 / 64


def acting_otherwise(
    parameters: dict[str, nn.Parameter],
    seen: dict[str, dict[int, Tensor]],
    losses: Callable[[], Tensor],
    before: Tensor,
) -> list[str]:
    """Names of parameters that change losses though they are moved off the inputs these have seen.

    As a norm of weights does that no gradient flows through: autograd's graph does not show it.

    Args:
        seen: the moments of a parameter's inputs, [g, d, d] by dimension, as `moments` has them.
        losses: those of the parameters as they are at the moment, of any shape.
        before: what they are.
    """
    free = {name: _step(parameters[name]) for name in seen}
    off = {name: _off(free[name], moments) for name, moments in seen.items()}

    def change(names: list[str]) -> float:
        return float((_moved(parameters, off, names, losses) - before).abs().sum())

    with torch.no_grad():
        # a step rounded to few bits is off the inputs no longer, nor does a loss resolve it
        dtypes = {before.dtype, *(parameters[name].dtype for name in seen)}
        if torch.is_autocast_enabled(before.device.type):
            dtypes.add(torch.get_autocast_dtype(before.device.type))
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        rounding = min(30 * eps, 0.06)  # in bfloat16 30 units would hide a norm
        d = max((m.shape[-1] for each in seen.values() for m in each.values()), default=1)
        scales = before.abs(), (_moved(parameters, free, seen, losses) - before).abs()
        known = [torch.where(scale.isfinite(), scale, 0) for scale in scales]
        limit = (math.sqrt(EPS * d) + rounding) * float(torch.maximum(*known).sum())
        found, rest = [], list(seen)
        while not change(rest) <= limit:
            found += [name for name in rest if not change([name]) <= limit] or rest
            rest = [name for name in rest if name not in found]
    return found


def sensitive(
    parameters: dict[str, nn.Parameter], losses: Callable[[], Tensor], before: Tensor
) -> int | None:
    """Of the losses [B], one that a small step of parameters changes most; None where none does.

    A loss that is flat, as one of ignored labels or of a margin that is met, shows nothing.
    """
    steps = {name: SMALL * _step(parameter) for name, parameter in parameters.items()}
    with torch.no_grad():
        moved = (_moved(parameters, steps, steps, losses) - before).abs().double()
    moved = torch.where(moved.isnan(), torch.inf, moved)
    return int(moved.argmax()) if bool(moved.any()) else None


def _moved(
    parameters: dict[str, nn.Parameter],
    steps: dict[str, Tensor],
    names: Iterable[str],
    losses: Callable[[], Tensor],
) -> Tensor:
    """The losses, with steps of these names taken."""
    kept = {name: parameters[name].data for name in names}
    try:
        for name, value in kept.items():  # another tensor: a graph that awaits its backward
            parameters[name].data = value + steps[name].to(value.dtype)  # pass has this one
        torch.clear_autocast_cache()  # of parameters in few bits, by what they were
        return losses()
    finally:
        for name, value in kept.items():
            parameters[name].data = value
        torch.clear_autocast_cache()


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
