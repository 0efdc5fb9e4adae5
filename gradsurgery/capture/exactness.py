"""Whether a Jacobian's numbers are those of a loop of backward passes over the same losses."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.capture.factored import FactoredJacobian
from gradsurgery.capture.graph import roots
from gradsurgery.capture.snapshot import as_before, functions

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# The loop rounds each entry of a gradient to its dtype, once for each use of a parameter, and what
# of a tensor cancels leaves its roundings. So in 16 bits, 4 eps of the whole row are allowed; else
# a tensor counts by itself, or by this share of the row if it is less.
SHARES = {torch.float64: 1e-2, torch.float32: 1e-2, torch.bfloat16: 1.0, torch.float16: 1.0}
WEIGHTS = (1.0, -0.7)


def loop(losses: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Each parameter's gradients of every loss, [len(losses), p.numel()], by autograd alone."""
    rows = []
    with as_before(functions([roots(losses)[0]])) as snapshot:
        # Functions are called once for each loss, and must find what they kept
        for each in losses:
            snapshot.put_back()
            grads = torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True)
            rows.append(snapshot.owned(grads))
    return [
        torch.stack([torch.zeros_like(p) if g is None else g.to_dense() for g in column]).reshape(
            len(losses), -1
        )
        for p, column in zip(parameters, zip(*rows, strict=True), strict=True)
    ]


def gramian_errors(
    jacobian: FactoredJacobian, exact: Sequence[Tensor], share: float
) -> list[float]:
    grams = torch.stack([rows.double() @ rows.double().mT for rows in exact])
    norms = grams.diagonal(dim1=1, dim2=2).sqrt()  # [L, m]
    norms = torch.maximum(norms, share * norms.square().sum(0).sqrt())
    scale = norms.unsqueeze(1) * norms.unsqueeze(2)
    away = (jacobian.gramian(per="tensor") - grams).abs()
    return _relative(away, scale).flatten(1).amax(1).tolist()


def update_errors(jacobian: FactoredJacobian, exact: Sequence[Tensor], share: float) -> list[float]:
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, device=exact[0].device)
    sums = [weights @ rows.double() for rows in exact]
    norms = torch.stack([each.norm() for each in sums])
    scale = torch.maximum(norms, share * norms.norm())

    def errors(found: Sequence[Tensor | None], times: float = 1) -> Tensor:
        pairs = zip(found, sums, strict=True)
        away = [((0 if a is None else a.double().flatten()) - times * b).norm() for a, b in pairs]
        return _relative(torch.stack(away), times * scale)

    parameters, largest = jacobian.parameters, [errors(jacobian.combine(weights))]
    before = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        jacobian._add(jacobian._weights(weights), release=False, hooks=False)
        grads = [p.grad for p in parameters]
        shared = _shared(grads)
        largest += [errors(grads), torch.where(torch.tensor(shared), math.inf, 0.0).to(scale)]
        if not any(shared):
            for grad in grads:
                if grad is not None:
                    grad *= 0.5  # as clipping does
            jacobian._add(jacobian._weights(weights), release=False, hooks=False)
            largest += [errors([p.grad for p in parameters], 1.5)]
            largest += [errors(jacobian.combine(weights))]
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
    return torch.stack(largest).amax(0).tolist()


def _shared(grads: Sequence[Tensor | None]) -> list[bool]:
    """Which share memory with another, or have values that share it."""
    # `.grad` that shares memory would be scaled twice by what scales it in place
    storages = [grad.untyped_storage()._cdata if grad is not None else None for grad in grads]
    return [
        grad is not None
        and (storages.count(storage) > 1 or grad.untyped_storage().nbytes() < grad.nbytes)
        for grad, storage in zip(grads, storages, strict=True)
    ]


def _relative(away: Tensor, scale: Tensor) -> Tensor:
    """Infinite where it is not a number."""
    return torch.where(away == 0, away, away / scale).nan_to_num(nan=math.inf, posinf=math.inf)


def values(jacobian: FactoredJacobian) -> list[Tensor]:
    derived = [use for part in jacobian._derived for _, uses in part.leaves for use in uses]
    uses = [use for mine in jacobian._uses for use in mine]
    return [*jacobian.parameters, *(t for use in (*uses, *derived) for t in use.values)]


def coarsest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype with fewest digits: under autocast that of the products."""
    dtypes = {t.dtype for t in tensors if t.dtype in TOLERANCES}
    return max(dtypes, key=lambda dtype: TOLERANCES[dtype])
