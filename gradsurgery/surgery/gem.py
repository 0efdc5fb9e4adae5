"""GEM and A-GEM: the gradient nearest to this one that opposes no gradient of the memory."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.ops import cone_weights
from gradsurgery.ops._inputs import check, to_device
from gradsurgery.surgery.forget_retain import off
from gradsurgery.surgery.rule import Index, Weighting, mean_of, split


@dataclass(frozen=True, kw_only=True)
class GEM(Weighting):
    """The vector nearest to g with ⟨x, g_k⟩ ≥ 0 for every row g_k of the memory.

    g is the mean of the rows that are not `memory`: by default of row 0, the others being it.

    Args:
        margin: the least multiplier of each memory row in the dual program, 0 or more: it leans the
            update towards the memory.

    Gradient Episodic Memory for Continual Learning, Lopez-Paz and Ranzato 2017 (arXiv:1706.08840).
    """

    formula: ClassVar[str] = "argmin |x - g|, ⟨x, g_k⟩ >= 0 for all k of the memory"
    paper: ClassVar[str] = "Lopez-Paz and Ranzato 2017 (arXiv:1706.08840)"
    roles: ClassVar[tuple[str, ...]] = ("memory",)
    merges: ClassVar[tuple[str, ...]] = ("batch",)

    margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.margin >= 0, f"margin must be 0 or more, got {self.margin}")

    def _weights(self, gram: Tensor, rtol: float, memory: Index = slice(1, None)) -> Tensor:
        m = gram.shape[-1]
        past, now = split(m, memory, "memory", "current")
        given = mean_of(now, m)
        given[past] = self.margin
        given = to_device(given, gram.device)
        pick = torch.zeros(len(past), m, dtype=gram.dtype, device="cpu")
        pick[range(len(past)), past] = 1
        pick = to_device(pick, gram.device)
        products = -(gram @ given).unsqueeze(-2) @ pick.mT
        dual, _ = cone_weights(pick @ gram @ pick.mT, products, rtol=rtol, noise=rtol**2)
        return given + dual.squeeze(-2) @ pick


@dataclass(frozen=True, kw_only=True)
class AGEM(Weighting):
    """g without its part against the mean of the memory rows, if it opposes that.

    g is the mean of the rows that are not `memory`: by default of row 0, the others being it.

    Efficient Lifelong Learning with A-GEM, Chaudhry et al. 2018 (arXiv:1812.00420).
    """

    formula: ClassVar[str] = "g - min(0, ⟨g, r⟩) / |r|² r, r the mean of the memory"
    paper: ClassVar[str] = "Chaudhry et al. 2018 (arXiv:1812.00420)"
    roles: ClassVar[tuple[str, ...]] = ("memory",)
    merges: ClassVar[tuple[str, ...]] = ("batch", "memory")

    def _weights(self, gram: Tensor, rtol: float, memory: Index = slice(1, None)) -> Tensor:
        m = gram.shape[-1]
        past, now = split(m, memory, "memory", "current")
        pair = to_device(torch.stack([mean_of(now, m), mean_of(past, m)]), gram.device)
        return off(pair @ gram @ pair.mT, 0, 1) @ pair
