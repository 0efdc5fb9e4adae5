"""CAGrad: near the mean row, the direction that serves the worst row best."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gradsurgery.ops import conflict_averse_weights
from gradsurgery.ops._inputs import check
from gradsurgery.surgery.rule import Weighting, one_of


@dataclass(frozen=True, kw_only=True)
class CAGrad(Weighting):
    """The d that makes min_i ⟨g_i, d⟩ greatest within |d - g₀| ≤ c |g₀|, g₀ the mean row.

    Args:
        c: radius in units of |g₀|, 0 or more. From 1 on, no row is opposed.
        rescale: divides d by 1 (0), 1 + c² (1) or 1 + c (2).

    Conflict-Averse Gradient Descent for Multi-task Learning, Liu et al. 2021 (arXiv:2110.14048).
    """

    formula: ClassVar[str] = "argmax min_i ⟨g_i, d⟩, |d - g₀| <= c |g₀|"
    paper: ClassVar[str] = "Liu et al. 2021 (arXiv:2110.14048)"
    properties: ClassVar[frozenset[str]] = frozenset({"equivariant"})

    c: float = 0.5
    rescale: Literal[0, 1, 2] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.c >= 0, f"c must be 0 or more, got {self.c}")
        one_of("rescale", self.rescale, (0, 1, 2))

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        weights = conflict_averse_weights(gram, self.c, rtol=rtol, noise=rtol**2)
        return weights / (1, 1 + self.c**2, 1 + self.c)[self.rescale]
