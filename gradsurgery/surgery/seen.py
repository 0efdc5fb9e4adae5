"""What weights have seen of inputs: kept, checked, and turned into directions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.capture.moments import added, stack
from gradsurgery.ops._inputs import check
from gradsurgery.ranks import Group

# of a parameter, rows [g, r, d] in float64 with the moments of the inputs, by the dimension these
# run along: {} where the losses do not depend on it, None where it does something else
Seen = dict[int, Tensor] | None


def both(one: Seen, other: Seen, size: int) -> Seen:
    """What a parameter of this size saw of data apart; None where it cannot be kept off both."""
    seen = added(one, other, stack)
    if size == 0:
        return {}
    if seen is None or len(seen) < 2:
        return seen
    return seen if _one_way(seen, size) else None


def moved(found: Mapping[str, Seen], device: torch.device) -> dict[str, Seen]:
    """The same on a device."""
    return {name: copied(seen, device) for name, seen in found.items()}


def of_all(
    every: Sequence[Mapping[str, Seen] | None],
    sizes: Mapping[str, int],
    devices: Mapping[str, torch.device],
    ranks: Group,
) -> dict[str, Seen]:
    """What all ranks saw, by parameter, in the order of the ranks.

    Args:
        every: of each rank, on the CPU; None of one without samples.
        sizes: of the parameters.
        devices: where they are.
        ranks: whose it is.
    """
    known = [(rank, found) for rank, found in enumerate(every) if found is not None]
    check(len(known) > 0, "batch must be given on one rank at least, got None on all")
    first, total = known[0]
    for rank, found in known[1:]:
        odd = sorted(found.keys() ^ total.keys())
        both_names = f"{ranks.name(first)} and {ranks.name(rank)}"
        check(not odd, f"model: {both_names} train different parameters, as {', '.join(odd[:1])}")
        total = {name: both(total[name], found[name], sizes[name]) for name in total}
    return {name: copied(seen, devices[name]) for name, seen in total.items()}


def copied(seen: Seen, device: torch.device | None = None) -> Seen:
    if seen is None:
        return None
    return {dim: part.detach().to(device or part.device, copy=True) for dim, part in seen.items()}


def check_fits(name: str, seen: Any, shape: torch.Size) -> None:
    """Raise where this cannot be what a parameter of this shape has seen."""
    wrong = f"state of {name} is not that of its inputs: "
    if seen is None:
        return
    check(isinstance(seen, dict), f"{wrong}expected a dict or None, got {type(seen).__name__}")
    for dim, part in seen.items():
        known = isinstance(dim, int) and not isinstance(dim, bool) and dim in (0, 1)
        check(known, f"{wrong}its keys must be the dimensions 0 or 1")
        entry = f"{wrong}[{dim}] "
        check(isinstance(part, Tensor), f"{entry}must be a Tensor, got {type(part).__name__}")
        check(part.dtype == torch.float64, f"{entry}must be float64, got {part.dtype}")
        check(
            part.layout == torch.strided and part.dim() == 3 and _divides(dim, part, shape),
            f"{entry}is {list(part.shape)}, and the parameter {list(shape)}",
        )
        check(bool(part.isfinite().all()), f"{entry}has NaN or infinity")
    alone = len(seen) < 2 or _one_way(seen, shape.numel())
    check(alone, f"{wrong}what is off its [0] would not be off its [1]")


def rounding(dtype: torch.dtype, d: int) -> float:
    """The singular value, of the largest as 1, up to which inputs may be rounding alone.

    In float64 well above what a forward pass of many layers rounds; else what float32 rounds.
    """
    return 1e-10 if dtype == torch.float64 else math.sqrt(4 * d * torch.finfo(torch.float64).eps)


def made(rows: Tensor, share: Callable[[Tensor], Tensor]) -> Tensor:
    """P = V diag(share(σ)) Vᵀ [g, d, d] of rows [g, r, d] = U diag(σ) Vᵀ; share(0) must be 1."""
    if rows.shape[-1] == 1:
        return share(torch.linalg.vector_norm(rows, dim=-2, keepdim=True).flatten(1))[..., None]
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)  # Vᵀ [g, k, d]
    left = share(values)[..., None]
    if vectors.shape[-2] == rows.shape[-1]:
        return vectors.mT @ (left * vectors)
    eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    return eye - vectors.mT @ ((1 - left) * vectors)


def _divides(dim: int, part: Tensor, shape: torch.Size) -> bool:
    """Whether a parameter is g matrices whose columns (0) or rows (1) have d elements."""
    g, _, d = part.shape
    if g == 0 or d == 0 or shape.numel() == 0:
        return False
    if dim == 0:
        return g * d in {shape[:k].numel() for k in range(len(shape) + 1)}
    ends = {shape[k:].numel() for k in range(max(len(shape), 1))}
    return d in ends and shape.numel() % (g * d) == 0


def _one_way(seen: dict[int, Tensor], size: int) -> bool:
    """Whether what keeps a parameter off one dimension's inputs leaves it off the other's."""
    g, d = seen[0].shape[0], seen[0].shape[-1]
    alike = g * d * seen[1].shape[-1] == size  # the same rows and columns
    return alike and (d == 1 or len(seen[1]) == 1)
