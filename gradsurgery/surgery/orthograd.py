"""OrthoGrad: forget along what is orthogonal to every retain gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from gradsurgery.jacobian import Jacobian
from gradsurgery.ops import projection_weights
from gradsurgery.ops._inputs import check, to_device
from gradsurgery.surgery.rule import (
    Index,
    Solution,
    Weighting,
    chosen,
    grouped_gramian,
    one_of,
    split,
)


@dataclass(frozen=True, kw_only=True)
class OrthoGrad(Weighting):
    """Unlearning by gradient ascent orthogonal to the retain samples' gradients.

    g⊥ = g_u - its projection on span{g_1 .. g_k},  update = α mean_i g_i - (1 - α) g⊥

    Rows are gradients of losses that training would lower: g_u of the mean loss of the forget
    samples, g_i of retain sample i alone. An optimizer that descends the update lowers the retain
    losses and RAISES the forget loss; with α = 0 no retain loss changes to first order.
    Equal to weights of the rows, a function of their Gramian alone.

    A forget loss made to forget (NPO, SimNPO, DPO) is to be lowered. With `objective="lower"` the
    update is α mean_i g_i + (1 - α) g⊥, which descends that loss too.

    `forget` names the forget rows, by default row 0, g_u is their mean; all others retain, but
    those named in `memory`, past directions: g⊥ is orthogonal to these too, and they are not
    descended.

    Args:
        alpha: α in [0, 1], the share of ordinary descent on the retain loss.
        granularity: "model" projects whole gradients; "tensor" each parameter tensor apart, as
            the authors' code does; "module" all tensors of one module together.
        objective: what the forget rows are gradients of: "raise", an ordinary loss, as in the
            paper; "lower", a loss made to forget, as in `ForgetRetain`.
        retain: "samples" protects each retain sample; "mean" only their mean, the paper's
            ablation.
        rtol: relative distance to the span below which a retain row counts as dependent on the
            others; None for sqrt(8 m eps) of float64.
        refine: correction passes after the projection; 0 suffices up to a condition of 1e6.
        small_tensors: for "tensor" and "module": k retain rows span a tensor of k values or
            fewer, whose g⊥ is then zero: "project" accepts that, "leave" exempts such tensors
            from the projection. `Solution.frozen` names them either way.
        precondition: None, or "optimizer": orthogonality in the optimizer's metric, so that the
            step, not the gradient, is orthogonal to the retain gradients. Needs `Surgeon` and
            Adam or AdamW. A choice of this library: where the authors' code replaces gradients by
            Adam directions before projecting, this weights the inner products by
            lr / (sqrt(v) + eps). What this gradient adds to the step is then orthogonal but for
            its own share in v: cosines of 2e-4 after 1000 steps, 3e-2 after the first. The
            momentum of earlier steps is not: with betas[0] = 0.9 cosines of 0.1 and more remain.

    Go Beyond Your Means: Unlearning with Per-Sample Gradient Orthogonalization,
    Shamsian et al. 2025 (arXiv:2503.02312).
    """

    formula: ClassVar[str] = "a r + (1 - a) (f - proj(f on span g_i)), a = alpha"
    paper: ClassVar[str] = "Shamsian et al. 2025 (arXiv:2503.02312)"
    roles: ClassVar[tuple[str, ...]] = ("forget", "memory")

    alpha: float = 0.5
    objective: Literal["raise", "lower"] = "raise"
    retain: Literal["samples", "mean"] = "samples"
    rtol: float | None = None
    refine: int = 0
    small_tensors: Literal["project", "leave"] = "project"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")
        check(self.refine >= 0, f"refine must be 0 or more, got {self.refine}")
        check(self.rtol is None or 0 <= self.rtol < 1, f"rtol must be in [0, 1), got {self.rtol}")
        one_of("objective", self.objective, ("raise", "lower"))
        one_of("retain", self.retain, ("samples", "mean"))
        one_of("small_tensors", self.small_tensors, ("project", "leave"))

    # an option decides what for other rules the class does
    @property
    def merges(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("retain",) if self.retain == "mean" else ()

    def _weights(self, gram: Tensor, rtol: float, forget: Index = 0, memory: Index = ()) -> Tensor:
        # α/k + (1-α) c_i for retain rows, (1-α) c_i for the memory's, -(1-α) for the forget row;
        # where the forget loss is to be lowered, α - 1 in the place of 1 - α
        select = self._select(gram.shape[-1], forget, memory).on(gram.device)
        coefficients, *_ = self._project(gram, select, rtol)
        return self._mix(coefficients, select)

    def solve(
        self,
        jacobian: Jacobian,
        *given: Index,
        metric: Sequence[Tensor] | None = None,
        **roles: Any,
    ) -> Solution:
        """Weights for the rows of a Jacobian, with the granularity and the metric asked for."""
        select = self._select(jacobian.m, **self._named(given, roles))
        grams, groups = grouped_gramian(jacobian, self.granularity, metric)
        select = select.on(grams.device)
        coefficients, rank, gram = self._project(grams, select, None)
        frozen = _small(jacobian.sizes, groups, coefficients.shape[-1])
        exempt = [g for g, small in enumerate(frozen) if small and self.small_tensors == "leave"]
        if exempt:
            coefficients = _without(coefficients, exempt)
        for _ in range(self.refine):
            coefficients = self._refined(jacobian, coefficients, grams, groups, select, metric)
            coefficients = _without(coefficients, exempt)

        # |g⊥|² = (1, -c) K (1, -c)ᵀ, group by group
        parts = torch.cat([torch.ones_like(coefficients[:, :1]), -coefficients], dim=1)
        kept = (parts.unsqueeze(1) @ gram @ parts.unsqueeze(2)).sum().clamp(min=0)
        whole = gram[:, 0, 0].sum()
        weights = self._mix(coefficients, select)
        return Solution(
            weights=weights[0] if self.granularity == "model" else weights[groups],
            gramian=grams.sum(0),
            rank=rank,
            kept_norm=torch.where(whole > 0, kept / whole, 0).sqrt(),
            frozen=[name for name, g in zip(jacobian.names, groups, strict=True) if frozen[g]],
        )

    def _select(self, m: int, forget: Index = 0, memory: Index = ()) -> "_Selection":
        rows, rest = split(m, forget, "forget", "retain")
        past = chosen(memory, m, "memory")
        known = set(past)
        both = sorted(known & set(rows))
        check(not both, f"forget and memory both select rows {both}")
        retain = [i for i in rest if i not in known]
        check(len(retain) > 0, "memory selects all retain rows")
        k = 1 if self.retain == "mean" else len(retain)
        each = self.retain == "samples" and len(rows) == 1
        if each and rows + retain + past == list(range(m)):
            return _Selection(None, k)
        select = torch.zeros(1 + k + len(past), m, dtype=torch.float64, device="cpu")
        select[0, rows] = 1 / len(rows)
        if self.retain == "mean":
            select[1, retain] = 1 / len(retain)
        else:
            select[range(1, 1 + k), retain] = 1
        select[range(1 + k, len(select)), past] = 1
        return _Selection(select, k)

    def _project(
        self, gramian: Tensor, select: "_Selection", rtol: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        gram = select.gramian(gramian)
        rtol = self.rtol if self.rtol is not None else rtol
        c, rank, _ = projection_weights(gram[..., 1:, 1:], gram[..., 1:, 0], rtol=rtol)
        return c, rank, gram

    def _mix(self, coefficients: Tensor, select: "_Selection") -> Tensor:
        up, k = 1 - self.alpha if self.objective == "raise" else self.alpha - 1, select.retain
        kept = up * coefficients
        retain = kept[..., :k] + self.alpha / k
        forget = kept.new_full((*kept.shape[:-1], 1), -up)
        return select.weights(torch.cat([forget, retain, kept[..., k:]], dim=-1))

    def _refined(
        self,
        jacobian: Jacobian,
        coefficients: Tensor,
        grams: Tensor,
        groups: list[int],
        select: "_Selection",
        metric: Sequence[Tensor] | None,
    ) -> Tensor:
        """c + K⁺ J g⊥, with g⊥ formed and multiplied rather than predicted."""
        parts = torch.cat([torch.ones_like(coefficients[:, :1]), -coefficients], dim=1)
        parts = select.weights(parts)
        perp = jacobian.combine(parts[groups])
        if metric is not None:
            perp = [p * weight for p, weight in zip(perp, metric, strict=True)]
        rest = torch.zeros_like(parts)
        into = torch.tensor(groups, device=rest.device)
        rest.index_add_(0, into, jacobian.products(perp).to(rest.device))
        gram, products = select.gramian(grams), select.products(rest)[:, 1:]
        correction, *_ = projection_weights(gram[:, 1:, 1:], products, rtol=self.rtol)
        return coefficients + correction


class _Selection(NamedTuple):
    """The mean forget row and the rows to be orthogonal to, as averages of the rows.

    Of m rows given 1 + k + p: the k retain rows come before the p of the memory.
    """

    matrix: Tensor | None  # [1 + k + p, m] float64; None where each row given is one, in order
    retain: int  # k

    def on(self, device: torch.device) -> "_Selection":
        return self if self.matrix is None else self._replace(matrix=to_device(self.matrix, device))

    def gramian(self, gramian: Tensor) -> Tensor:
        """[..., 1 + k + p, 1 + k + p] from [..., m, m]."""
        s = self.matrix
        return gramian if s is None else s @ gramian @ s.mT

    def products(self, products: Tensor) -> Tensor:
        """[..., 1 + k + p] from those of the rows given, [..., m]."""
        return products if self.matrix is None else products @ self.matrix.mT

    def weights(self, parts: Tensor) -> Tensor:
        """Weights [..., m] of the rows given, from those of the averages."""
        return parts if self.matrix is None else parts @ self.matrix


def _without(coefficients: Tensor, groups: Sequence[int]) -> Tensor:
    """Zero for these groups; [g, k]."""
    out = torch.zeros(len(coefficients), 1, dtype=torch.bool, device="cpu")
    out[groups] = True
    return coefficients.masked_fill(out.to(coefficients.device), 0)


def _small(sizes: Sequence[int], groups: Sequence[int], k: int) -> list[bool]:
    """[g]: groups with no more values than there are rows to be orthogonal to."""
    totals = [0] * (max(groups) + 1)
    for size, g in zip(sizes, groups, strict=True):
        totals[g] += size
    return [total <= k for total in totals]
