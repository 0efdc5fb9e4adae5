"""Second moments of the inputs that weights multiply, from what a Jacobian keeps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradsurgery.capture.convolution import ConvolutionUse
from gradsurgery.capture.uses import MatrixUse, Use, Within


class Moment(NamedTuple):
    """Of a parameter seen as a matrix, its first dimension by all others."""

    dim: int  # along which inputs run, 0 or 1
    matrix: Tensor  # [d, d] float64, the sum of x xᵀ over tokens


def moment(uses: Sequence[Use]) -> Moment | None:
    """None if there are no uses, or one is no product of one matrix with activations."""
    found = [_of(use) for use in uses]
    if not found or any(part is None for part in found):
        return None
    parts = [part for part in found if part is not None]
    if any(part.dim != parts[0].dim for part in parts):
        return None
    return Moment(parts[0].dim, torch.stack([part.matrix for part in parts]).sum(0))


def _of(use: Use) -> Moment | None:
    if isinstance(use, Within):  # some rows of a taller parameter: inputs are alike for all
        inner = _of(use.inner)
        return inner if inner is not None and inner.dim == 1 else None
    if isinstance(use, ConvolutionUse):
        use = use.matrices()
    if not isinstance(use, MatrixUse) or use.left.dim() != 3:
        return None
    inputs = (use.left if use.inputs == "left" else use.right).flatten(0, 1).double()
    return Moment(0 if use.inputs == "left" else 1, inputs.mT @ inputs)
