"""Rules that work on each coordinate of the rows: no function of a Gramian."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gradsurgery.errors import NonFiniteError
from gradsurgery.jacobian import DenseJacobian, Jacobian
from gradsurgery.ops._inputs import check, check_values, flat, wide
from gradsurgery.surgery.forget_retain import directions
from gradsurgery.surgery.rule import Index, Rule, one_of


@dataclass(frozen=True, kw_only=True)
class Elementwise(Rule):
    """A rule that needs the rows themselves: m times the model's memory.

    Rows of a tape are formed for it. It computes in the rows' dtype, tensor by tensor. A subclass
    has `_edit`.
    """

    def _update(self, jacobian: Jacobian, **roles: Any) -> list[Tensor]:
        blocks = jacobian.blocks if isinstance(jacobian, DenseJacobian) else _formed(jacobian)
        rows, shapes = flat(blocks), [block.shape[1:] for block in blocks]
        for k, block in enumerate(rows):
            check_values(block, jacobian.names[k])
            finite = block.isfinite().all(1)
            if not bool(finite.all()):
                row = int((~finite).nonzero()[0])
                raise NonFiniteError(f"row {row} is not finite in {jacobian.names[k]}")
        if not jacobian.m:
            return [b.new_zeros(s) for b, s in zip(blocks, shapes, strict=True)]
        return [u.view(s) for u, s in zip(self._edit(rows, **roles), shapes, strict=True)]

    def _edit(self, *args: Any, **roles: Any) -> list[Tensor]:
        """(blocks, **roles): [n_k] each, from rows [m, n_k] each."""
        raise NotImplementedError


def _formed(jacobian: Any) -> list[Tensor]:
    parts = jacobian.materialize().split(jacobian.sizes, dim=1)
    shapes = [parameter.shape for parameter in jacobian.parameters]
    return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]


@dataclass(frozen=True, kw_only=True)
class GradDrop(Elementwise):
    """Each coordinate keeps the rows of one sign, drawn by how pure the sign is.

    P = (1 + Σ g / Σ |g|) / 2; with U uniform in [0, 1), positive values stay where P > U, negative
    ones where P < U.

    Args:
        leak: share in [0, 1] of each row that is never dropped.
        seed: of the draws.

    Just Pick a Sign, Chen et al. 2020 (arXiv:2010.06808).
    """

    formula: ClassVar[str] = "Σ_i g_i of the sign drawn by P = (1 + Σ g / Σ |g|) / 2"
    paper: ClassVar[str] = "Chen et al. 2020 (arXiv:2010.06808)"
    remembers: ClassVar[tuple[str, ...]] = ("draws",)

    leak: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.leak <= 1, f"leak must be in [0, 1], got {self.leak}")

    def _edit(self, blocks: list[Tensor]) -> list[Tensor]:
        update = []
        for rows in blocks:
            values = wide(rows)  # a draw rounded to 16 bits may be 1
            size = values.abs().sum(0)
            nonzero = size > 0
            purity = torch.where(nonzero, values.sum(0) / torch.where(nonzero, size, 1), 0)
            purity, shape = (1 + purity) / 2, size.shape
            drawn = self._draw(
                self.seed,
                lambda g, shape=shape: torch.rand(
                    shape, dtype=torch.float32, device="cpu", generator=g
                ),
            ).to(purity)
            stays = ((purity > drawn) & (rows > 0)) | ((purity < drawn) & (rows < 0))
            kept = values * (self.leak + (1 - self.leak) * stays.to(values.dtype))
            # where sizes overflow there is no purity: infinite, as the sum of rows of one sign is
            update.append(torch.where(size.isfinite(), kept.sum(0), size).to(rows.dtype))
        return update


@dataclass(frozen=True, kw_only=True)
class SignAgreement(Elementwise):
    """The mean of the rows where enough of them have one sign, zero elsewhere.

    Args:
        threshold: least |mean sign| in [0, 1]: 1 asks for all rows.

    Learning explanations that are hard to vary, Parascandolo et al. 2020 (arXiv:2009.00329).
    """

    formula: ClassVar[str] = "mean_i g_i where |mean_i sign g_i| >= threshold"
    paper: ClassVar[str] = "Parascandolo et al. 2020 (arXiv:2009.00329)"
    properties: ClassVar[frozenset[str]] = frozenset({"equivariant"})

    threshold: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.threshold <= 1, f"threshold must be in [0, 1], got {self.threshold}")

    def _edit(self, blocks: list[Tensor]) -> list[Tensor]:
        return [
            rows.mean(0) * (rows.sign().float().mean(0).abs() >= self.threshold - 1e-6)
            for rows in blocks
        ]


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(Elementwise):
    """The mean of each coordinate without its largest and its smallest values.

    Args:
        trim: how many are left out at each end; 2 trim < m.

    Byzantine-Robust Distributed Learning, Yin et al. 2018 (arXiv:1803.01498).
    """

    formula: ClassVar[str] = "mean of each coordinate without its `trim` extremes"
    paper: ClassVar[str] = "Yin et al. 2018 (arXiv:1803.01498)"
    properties: ClassVar[frozenset[str]] = frozenset({"equivariant"})

    trim: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.trim >= 0, f"trim must be 0 or more, got {self.trim}")

    def _edit(self, blocks: list[Tensor]) -> list[Tensor]:
        m = len(blocks[0])
        check(2 * self.trim < m, f"trim={self.trim} leaves none of {m} rows")
        return [rows.sort(0).values[self.trim : m - self.trim].mean(0) for rows in blocks]


@dataclass(frozen=True, kw_only=True)
class ElementwiseForgetRetain(Elementwise):
    """As `ForgetRetain`: f and r from the forget rows and the others.

    Args:
        objective: what the forget rows are gradients of, "raise" or "lower" as in `ForgetRetain`.
    """

    roles: ClassVar[tuple[str, ...]] = ("forget",)
    merges: ClassVar[tuple[str, ...]] = ("retain",)

    objective: Literal["raise", "lower"] = "raise"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("objective", self.objective, ("raise", "lower"))

    def _directions(self, blocks: list[Tensor], forget: Index) -> list[tuple[Tensor, Tensor]]:
        weights = directions(len(blocks[0]), forget, self.objective)
        both = [weights.to(block) @ block for block in blocks]
        return [(f, r) for f, r in both]


@dataclass(frozen=True, kw_only=True)
class SAGO(ElementwiseForgetRetain):
    """Coordinate by coordinate: gamma f where f and r agree in sign, alpha r where they do not.

    Where one of them is zero, they do not meet: the other stays.

    Args:
        gamma: of the forget direction.
        alpha: of the retain direction.

    SAGO, 2026 (arXiv:2604.14808).
    """

    formula: ClassVar[str] = "gamma f where f r > 0, alpha r where f r < 0"
    paper: ClassVar[str] = "2026 (arXiv:2604.14808)"

    gamma: float = 1.0
    alpha: float = 1.0

    def _edit(self, blocks: list[Tensor], forget: Index = 0) -> list[Tensor]:
        return [
            torch.where(f.sign() * r.sign() < 0, 0, self.gamma * f)
            + torch.where(f.sign() * r.sign() > 0, 0, self.alpha * r)
            for f, r in self._directions(blocks, forget)
        ]


@dataclass(frozen=True, kw_only=True)
class SalUn(ElementwiseForgetRetain):
    """f + r on the coordinates where the forget gradient is largest, zero elsewhere.

    Args:
        share: of the coordinates, those kept, in (0, 1].
        granularity: "model" or "tensor": of the whole model, or of each tensor.

    SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency, Fan et al. 2023
    (arXiv:2310.12508).
    """

    formula: ClassVar[str] = "f + r where |f| is among the largest share"
    paper: ClassVar[str] = "Fan et al. 2023 (arXiv:2310.12508)"

    share: float = 0.5
    granularity: Literal["model", "tensor"] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.share <= 1, f"share must be in (0, 1], got {self.share}")
        one_of("granularity", self.granularity, ("model", "tensor"))

    def _edit(self, blocks: list[Tensor], forget: Index = 0) -> list[Tensor]:
        both = self._directions(blocks, forget)
        sizes = [f.abs() for f, _ in both]
        if self.granularity == "model":
            counts = [len(size) for size in sizes]
            masks = self._largest(torch.cat(sizes)).split(counts)
        else:
            masks = [self._largest(size) for size in sizes]
        return [(f + r) * mask for (f, r), mask in zip(both, masks, strict=True)]

    def _largest(self, sizes: Tensor) -> Tensor:
        mask = torch.zeros_like(sizes, dtype=torch.bool)
        mask[sizes.topk(round(self.share * len(sizes))).indices] = True
        return mask
