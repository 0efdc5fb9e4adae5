"""Second moments of the inputs that weights multiply, from what a Jacobian keeps."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from gradsurgery.capture.convolution import ConvolutionUse
from gradsurgery.capture.uses import EmbeddingUse, MatrixUse, Use, Within


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
    convolution, or the rows of an embedding, d = 1 then, each multiplied by 1 where it is picked.
    Both dimensions are there for a parameter used both ways, as a tied embedding is. `row`: over
    the blocks of one row of the Jacobian only.
    """
    if uses is None:
        return None
    total: dict[int, Tensor] | None = {}
    for use in uses:
        part = use if row is None else use.select((use.rows == row).nonzero().flatten())
        total = added(total, _of(part))
    return total


def added(
    one: dict[int, Tensor] | None, other: dict[int, Tensor] | None
) -> dict[int, Tensor] | None:
    """The moments of both; None where they see a parameter in different ways."""
    if one is None or other is None:
        return None
    total = dict(one)
    for dim, matrices in other.items():
        before = total.get(dim)
        if before is not None and before.shape != matrices.shape:
            return None
        total[dim] = matrices if before is None else before.to(matrices.device) + matrices
    return total


def _of(use: Use) -> dict[int, Tensor] | None:
    if isinstance(use, Within):  # some rows of a taller parameter: inputs are alike for all
        inner = _of(use.inner)
        return inner if inner is not None and _ungrouped(inner) else None
    if isinstance(use, EmbeddingUse):
        return {0: use.counts().double().view(-1, 1, 1)}
    if isinstance(use, ConvolutionUse):
        # sample by sample: patches are k times the input
        each = [use.select(slice(k, k + 1)) for k in range(use.n)]
        parts = [part.matrices() for part in each if isinstance(part, ConvolutionUse)]
    elif isinstance(use, MatrixUse):
        parts = [use]
    else:
        return None
    if not parts:
        return None
    total: Tensor | None = None
    for part in parts:
        inputs = part.left if part.inputs == "left" else part.right
        inputs = inputs if inputs.dim() == 4 else inputs.unsqueeze(1)  # [n, g, T, d]
        inputs = inputs.movedim(1, 0).flatten(1, 2).double()
        gram = inputs.mT @ inputs
        total = gram if total is None else total + gram
    return None if total is None else {0 if parts[0].inputs == "left" else 1: total}


def _ungrouped(inner: dict[int, Tensor]) -> bool:
    return set(inner) <= {1} and all(len(matrices) == 1 for matrices in inner.values())
