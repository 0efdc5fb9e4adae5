"""Inputs that weights multiply, and their second moments, from what a Jacobian keeps."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gradsurgery.capture.convolution import ConvolutionUse
from gradsurgery.capture.tokens import TokenUse
from gradsurgery.capture.uses import EmbeddingUse, MatrixUse, Use, Within

_Made = Callable[[Tensor], Tensor]
_Put = Callable[[Tensor, Tensor], Tensor]


class Moment(NamedTuple):
    """Of a parameter seen as a matrix, its first dimension by all others."""

    dim: int  # along which inputs run, 0 or 1
    matrix: Tensor  # [d, d] float64, the sum of x xᵀ over tokens


def moment(uses: Sequence[Use] | None) -> Moment | None:
    """None if there are no uses, or they are not products of one matrix with activations."""
    found = moments(uses)
    if uses is None or found is None or len(found) != 1:
        return None
    ((dim, matrices),) = found.items()
    dense = matrices.shape[0] == 1 and not any(isinstance(use, EmbeddingUse) for use in uses)
    return Moment(dim, matrices[0]) if dense else None


def moments(uses: Sequence[Use] | None, row: int | None = None) -> dict[int, Tensor] | None:
    """The sums of x xᵀ by the dimension that inputs run along; None if a use is no such product.

    [g, d, d] float64, of the g matrices that the parameter is, one below the other: the groups of a
    convolution, or the lines of an embedding, d = 1 then, each multiplied by 1 where it is picked.
    Both dimensions are there for a parameter used both ways, as a tied embedding is. `row`: over
    the blocks of one row of the Jacobian only.
    """
    return _total(uses, row, _gram, torch.add)


def stacked(uses: Sequence[Use] | None) -> dict[int, Tensor] | None:
    """As `moments`, the inputs themselves: [g, r, d] float64, or fewer rows of the same moments.

    A singular value σ of these rows is an eigenvalue σ² of the moments, where rounding hides it
    below 1e-8 of the largest.
    """
    return _total(uses, None, _same, stack)


def stack(one: Tensor, other: Tensor) -> Tensor:
    """Rows [g, r, d] of the moments of both, at most 2d of them."""
    # R of a QR has the same moments as the rows, in d of them: wait for 2d, since each costs d^3
    rows = torch.cat([one.to(other.device), other], -2)
    r, d = rows.shape[-2:]
    if d == 1:
        return torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    return torch.linalg.qr(rows, mode="r").R if r > 2 * d else rows


def _total(
    uses: Sequence[Use] | None, row: int | None, made: _Made, put: _Put
) -> dict[int, Tensor] | None:
    if uses is None:
        return None
    total: dict[int, Tensor] | None = {}
    for use in uses:
        part = use if row is None else use.select((use.rows.tensor == row).nonzero().flatten())
        total = added(total, _of(part, made, put), put)
    return total


def added(
    one: dict[int, Tensor] | None, other: dict[int, Tensor] | None, put: _Put
) -> dict[int, Tensor] | None:
    """What both see, put together; None where they see a parameter in different ways."""
    if one is None or other is None:
        return None
    total = dict(one)
    for dim, part in other.items():
        before = total.get(dim)
        if before is not None and _sizes(before) != _sizes(part):
            return None
        total[dim] = part if before is None else put(before.to(part.device), part)
    return total


def _sizes(part: Tensor) -> tuple[int, int]:
    return part.shape[0], part.shape[-1]


def _gram(inputs: Tensor) -> Tensor:
    return inputs.mT @ inputs


def _same(inputs: Tensor) -> Tensor:
    return stack(inputs[:, :0], inputs)


def _of(use: Use, made: _Made, put: _Put) -> dict[int, Tensor] | None:
    if isinstance(use, Within):  # some lines of a taller parameter: inputs are the same for all
        inner = _of(use.inner, made, put)
        return inner if inner is not None and _ungrouped(inner) else None
    if isinstance(use, EmbeddingUse):
        # an index is a one-hot input: x x^T is diagonal, and counts how often a line was picked
        counts = use.counts().double().view(-1, 1, 1)
        return {0: counts if made is _gram else counts.sqrt()}
    if isinstance(use, TokenUse):
        inputs = use.left if use.inputs == "left" else use.right
        tokens = dict(use.each())
        each = [
            made(inputs[tokens.get(k, slice(0, 0))].double().unsqueeze(0))
            for k in range(use.matrices)
        ]
        # rows of zeros, where others have more, have no part in moments
        most = max(part.shape[1] for part in each)
        padded = [F.pad(part, (0, 0, 0, most - part.shape[1])) for part in each]
        return {0 if use.inputs == "left" else 1: torch.cat(padded)}
    if isinstance(use, ConvolutionUse):
        # sample by sample: patches are k times the input
        each = [use.select(slice(k, k + 1)) for k in range(use.n)]
        parts = [part.matrices() for part in each if isinstance(part, ConvolutionUse)]
    elif isinstance(use, MatrixUse):
        parts = [use]
    else:
        return None
    total: dict[int, Tensor] | None = None
    for part in parts:
        inputs = part.left if part.inputs == "left" else part.right
        inputs = inputs if inputs.dim() == 4 else inputs.unsqueeze(1)  # [n, g, T, d]
        inputs = made(inputs.movedim(1, 0).flatten(1, 2).double())
        one = {0 if part.inputs == "left" else 1: inputs}
        total = one if total is None else added(total, one, put)
    return total


def _ungrouped(inner: dict[int, Tensor]) -> bool:
    return set(inner) <= {1} and all(len(part) == 1 for part in inner.values())
