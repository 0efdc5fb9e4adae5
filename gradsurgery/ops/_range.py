"""Rows of float64 too short for their squares, brought into range by powers of two.

Squares of values under 1e-162 are zero in float64, and lose digits from 1e-154 on. What depends on
the directions of rows alone need not care.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# squared norms from here on are sums of squares that float64 holds to its rounding, or that do not
# count beside the others, up to 1e10 values
LEAST = 1e-280


def factors(blocks: Sequence[Tensor], squares: Tensor, wait: bool = True) -> Tensor | None:
    """Powers of two, [m], that bring rows [m, n_k] of these squared norms into range; 1 for others.

    None where there is nothing to do: of 16- and 32-bit rows, float64 holds every square. Without
    `wait`, a GPU's rows are not looked at, and all of them have a factor.
    """
    if blocks[0].dtype != torch.float64:
        return None
    short = squares < LEAST
    if wait and not bool(short.any()):
        return None
    sizes = [block.abs().amax(1) for block in blocks if block.shape[1]]
    largest = torch.stack(sizes).amax(0) if sizes else torch.zeros_like(squares)
    short = short & (largest > 0)
    if wait and not bool(short.any()):
        return None
    exponents = torch.frexp(largest).exponent.clamp(min=-1022)  # 2^1022 is a float64
    return torch.where(short if wait else largest > 0, -exponents, 0).double().exp2()


def times(blocks: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """Rows [m, n_k] times their factors."""
    return [block * scale[:, None] for block in blocks]
