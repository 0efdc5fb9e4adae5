"""Whether float32 holds what is computed of a use; what it does not hold is computed in float64."""

import torch
from torch import Tensor

from gradsurgery.capture.convolution import ConvolutionUse
from gradsurgery.capture.tokens import TokenUse
from gradsurgery.capture.uses import EmbeddingUse, MatrixUse, RowsUse, Use, Within

# Squared norms between which products of tokens that do not cancel are in range: nearer to 0 than
# what a token's lost product could add to them (`token_gramian`), and far from float32's largest
SQUARES = 2.0**-60, 2.0**60
# and with a metric, which multiplies planes that exist: what of those is lost is far smaller
SCALED = 2.0**-200, 2.0**200
VALUES = 2.0**-50, 2.0**50  # of tokens: four of them, multiplied, are in range
WEIGHTS = 2.0**-24, 2.0**24  # of rows: float32 holds values of 1e-30 and 1e30 times these
# powers of two that a backward pass may lie apart from 1, for its gradients to stay in range
PASSES = {torch.float16: 10, torch.float64: 500}
PASS = 60


def within(sizes: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Where sizes are within bounds; NaN is not."""
    return (sizes >= bounds[0]) & (sizes <= bounds[1])


def in_range(use: Use, weights: Tensor | None = None) -> bool:
    """Whether products of a use's tokens are in range, or their sum times `weights` [n].

    Tokens that are zero always are.
    """
    scales = []
    if weights is not None:
        scales = [weights.double().abs()]
        if not bool((within(scales[0], (2.0**-100, 2.0**100)) | (scales[0] == 0)).all()):
            return False
    for size in magnitudes(use):
        scaled = [size * scale.to(size.device)[:, None] for scale in scales]
        for each in (size, *scaled):
            if not bool((within(each, VALUES) | (each == 0)).all()):
                return False
    return True


def magnitudes(use: Use) -> list[Tensor]:
    """The largest value of each token, [n, tokens] float64 per side; 0 where it adds nothing."""
    if isinstance(use, Within):
        return magnitudes(use.inner)
    if any(tensor.numel() == 0 for tensor in use.values):
        return []
    if isinstance(use, (MatrixUse, TokenUse)):
        left, right = (_largest(side, -1).unsqueeze(-1) for side in (use.left, use.right))
        live = (left != 0) & (right != 0)
        return [torch.where(live, side, 0).flatten(1) for side in (left, right)]
    if isinstance(use, EmbeddingUse):
        return [torch.where(use.indices >= 0, _largest(use.grads, 2), 0)]
    if isinstance(use, ConvolutionUse):
        return [_largest(side, 2).flatten(1) for side in use.values]
    assert isinstance(use, RowsUse)
    return [_largest(use.flat, 1)[:, None]]


def _largest(tensor: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(tensor, float("inf"), dim).double()


def unit(tensors: Tensor, rows: bool = False) -> Tensor:
    """A power of two near the largest size, [], or in each row, [m]; float64. 1 of zeros."""
    largest = tensors.flatten(1 if rows else 0).abs()
    largest = largest.amax(-1) if largest.shape[-1] else largest.sum(-1)
    known = (largest > 0) & largest.isfinite()
    return torch.where(known, largest.double(), 1).log2().floor().exp2()


def scaled_parts(weights: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, float]]:
    """Weights [m] as sums of scale * part, each part in reach of a backward pass in `dtype`."""
    reach = PASSES.get(dtype, PASS)
    size = weights.abs()
    used = size > 0
    if bool((within(size, (2.0**-reach, 2.0**reach)) | ~used).all()):
        return [(weights, 1.0)]
    # sorted into parts by exponent, the largest weights first; divided by a power of two, exactly
    exponent = torch.where(used, size, 1).log2().floor()
    highest = float(exponent[used].max())
    which = ((highest - exponent) // reach).where(used, -1)
    parts = []
    for k in which[used].unique().tolist():
        scale = 2.0 ** (highest - k * reach)
        parts.append((torch.where(which == k, weights / scale, 0), scale))
    return parts
