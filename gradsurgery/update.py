"""From rows to an update in `.grad`."""

from typing import cast

import torch
from torch import Tensor, nn

from gradsurgery.capture import FactoredJacobian
from gradsurgery.collect import Collected
from gradsurgery.grads import add_to, own, run_hooks
from gradsurgery.jacobian import DenseJacobian, Jacobian, SummedRows
from gradsurgery.optimizers import metric
from gradsurgery.ranks import Group, RanksJacobian
from gradsurgery.ranks.places import grad_of, whole_of
from gradsurgery.surgery import Rule, Solution


def solve(
    rule: Rule, optimizer: torch.optim.Optimizer, rows: Collected, ranks: Group
) -> tuple[Solution, Tensor | list[Tensor]]:
    """What the rule says of the rows, and the update: weights, or a tensor per parameter."""
    jacobian, given = rows.jacobian, {}
    for role in ("second", "memory"):  # no rule has both
        if role in rows.counts:
            given[role] = slice(jacobian.m - rows.counts[role], None)
    if "retain_loss" in rule.roles:
        given["retain_loss"] = rows.means["retain"]
    weighting = rule.weighting
    if weighting is None:
        gramian, update = jacobian.gramian(), rule(jacobian, **given)
        ranks.settled("rule")
        return Solution(torch.empty(0), gramian), [
            ranks.first_(part.contiguous()) for part in update
        ]
    columns = dict(zip(jacobian.names, jacobian.parameters or (), strict=True))
    known = weighting.precondition and metric(optimizer, columns, rows.reached)
    if known and ranks:
        ranks.settled("metric")
        known = list(map(whole_of, known))
    solution = weighting.solve(jacobian, metric=known or None, **given)
    if ranks:  # unlike processors may round it differently
        ranks.settled("rule")
        solution = solution._replace(weights=ranks.weights(solution.weights))
    return solution, solution.weights


def add_update(
    rows: Collected,
    solution: Solution,
    update: Tensor | list[Tensor],
    weights: Tensor,
    scale: float,
) -> None:
    """Add wᵀ J, or a given update, times `scale`, to `.grad`; `weights` are w, on the CPU."""
    if rows.outside is not None:
        rows.outside.backward(_times(solution.weights, scale))
    jacobian = rows.jacobian
    if isinstance(update, Tensor) and not _is_stored(jacobian):
        made = cast(FactoredJacobian | SummedRows | RanksJacobian, jacobian)
        made.backward(_times(weights, scale), release=True)
        return
    if isinstance(update, Tensor):
        whole = jacobian.combine(_times(update, scale))
    else:
        whole = own([_times(each, scale) for each in update])
    parameters = jacobian.parameters or []
    for parameter, grad, used in zip(parameters, whole, rows.reached, strict=True):
        # one that no loss depends on has no gradient, as in an ordinary step: no decay
        if used:
            with torch.no_grad():
                add_to(parameter, grad_of(grad, parameter))
                run_hooks(parameter)


def _times(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else tensor * scale


def _is_stored(jacobian: Jacobian) -> bool:
    return isinstance(getattr(jacobian, "parts", jacobian), DenseJacobian)


def fits(weights: Tensor, gram: Tensor, parameters: dict[str, nn.Parameter], scale: float) -> bool:
    """Whether an update is known to be in range: no value is larger than its norm, sqrt(wᵀ G w).

    Weights and Gramian on the CPU, which a GPU is not waited for.
    """
    if weights.shape != gram.shape[:1]:  # one for each tensor, or none
        return False
    limit = min(torch.finfo(parameter.dtype).max for parameter in parameters.values())
    square = weights.double() @ gram @ weights.double()
    return bool(square.clamp_min(0).sqrt() * abs(scale) <= limit / 2)
