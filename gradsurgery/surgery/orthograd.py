"""OrthoGrad: climb the forget loss along what is orthogonal to every retain gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gradsurgery.jacobian import DenseJacobian, Jacobian
from gradsurgery.ops import projection_weights
from gradsurgery.ops._inputs import check

Index = int | slice | Sequence[int] | Tensor


class Solution(NamedTuple):
    """Weights of an update and what was found on the way; g groups of tensors."""

    weights: Tensor  # [m], or [L, m] where tensors are projected apart
    gramian: Tensor  # [m, m] float64, of whole rows
    rank: Tensor  # [g] int64, of the retain rows of each group
    kept_norm: Tensor  # [] float64, |g⊥| / |g_u| in [0, 1]
    frozen: list[str]  # tensors no larger than the number of retain rows, whose g⊥ is zero


@dataclass(frozen=True, kw_only=True)
class OrthoGrad:
    """Unlearning by gradient ascent orthogonal to the retain samples' gradients.

    g⊥ = g_u - its projection on span{g_1 .. g_k},  update = α mean_i g_i - (1 - α) g⊥

    Rows are gradients of losses that training would lower: g_u of the mean loss of the forget
    samples, g_i of retain sample i alone. An optimizer that descends the update lowers the retain
    losses and RAISES the forget loss; with α = 0 no retain loss changes to first order.
    Equal to weights of the rows, a function of their Gramian alone.

    Args:
        alpha: α in [0, 1], the share of ordinary descent on the retain loss.
        granularity: "model" projects whole gradients; "tensor" each parameter tensor apart, as
            the authors' code does; "module" all tensors of one module together.
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

    alpha: float = 0.5
    granularity: Literal["model", "module", "tensor"] = "model"
    retain: Literal["samples", "mean"] = "samples"
    rtol: float | None = None
    refine: int = 0
    small_tensors: Literal["project", "leave"] = "project"
    precondition: Literal["optimizer"] | None = None

    def __post_init__(self) -> None:
        check(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")
        check(self.refine >= 0, f"refine must be 0 or more, got {self.refine}")
        check(self.rtol is None or 0 <= self.rtol < 1, f"rtol must be in [0, 1), got {self.rtol}")
        for name, allowed in (
            ("granularity", ("model", "module", "tensor")),
            ("retain", ("samples", "mean")),
            ("small_tensors", ("project", "leave")),
            ("precondition", (None, "optimizer")),
        ):
            value = getattr(self, name)
            check(value in allowed, f"{name} must be one of {allowed}, got {value!r}")

    def weights(self, gramian: Tensor, forget: Index = 0) -> Tensor:
        """Weights of the update from a Gramian.

        Args:
            gramian: [..., m, m].
            forget: the forget rows, one or several indices, a slice or a mask [m]; g_u is their
                mean. All other rows retain.

        Returns:
            [..., m] float64: (α/k + (1-α) c_i) for retain rows, -(1-α) for the forget row.
        """
        check(
            isinstance(gramian, Tensor), f"gramian must be a Tensor, got {type(gramian).__name__}"
        )
        check(
            gramian.dim() >= 2 and gramian.shape[-1] == gramian.shape[-2],
            f"gramian must be [..., m, m], got {list(gramian.shape)}",
        )
        select = self._select(gramian.shape[-1], forget, gramian.device)
        coefficients, *_ = self._project(gramian, select)
        return self._mix(coefficients, select)

    def __call__(
        self, rows: Tensor | Sequence[Tensor] | Jacobian, forget: Index = 0
    ) -> Tensor | list[Tensor]:
        """The update, for rows [m, n], a sequence of [m, *p.shape], or a Jacobian."""
        given = isinstance(rows, (Tensor, Sequence))
        jacobian = DenseJacobian(rows) if given else rows
        update = jacobian.combine(self.solve(jacobian, forget).weights)
        return update[0] if isinstance(rows, Tensor) else update

    def solve(
        self, jacobian: Jacobian, forget: Index = 0, metric: Sequence[Tensor] | None = None
    ) -> Solution:
        """Weights for the rows of a Jacobian, with the granularity and the metric asked for."""
        select = self._select(jacobian.m, forget, None)
        if self.granularity == "model":
            grams = jacobian.gramian(metric=metric)[None]
            groups = [0] * len(jacobian.names)
        else:
            groups = self._groups(jacobian.names)
            per_tensor = jacobian.gramian(per="tensor", metric=metric)
            grams = per_tensor.new_zeros(max(groups) + 1, *per_tensor.shape[1:])
            grams.index_add_(0, torch.tensor(groups, device=grams.device), per_tensor)
        select = select.to(grams.device)
        coefficients, rank, gram = self._project(grams, select)
        frozen = _small(jacobian.sizes, groups, select.shape[0] - 1)
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

    def _select(self, m: int, forget: Index, device: torch.device | None) -> Tensor:
        """[1 + k, m]: the mean forget row and the rows to be orthogonal to, as averages of rows."""
        if isinstance(forget, Tensor) and forget.dtype == torch.bool:
            check(forget.shape == (m,), f"forget must be a mask [{m}], got {list(forget.shape)}")
            chosen = set(forget.nonzero().flatten().tolist())
        elif isinstance(forget, slice):
            chosen = set(range(m)[forget])
        else:
            indices = _indices(forget)
            for i in indices:
                check(-m <= i < m, f"forget={i} is out of range for {m} rows")
            chosen = {i % m for i in indices}
        count = len(chosen)
        check(0 < count < m, f"forget selects {count} of {m} rows; need a forget and a retain row")
        retain = [i for i in range(m) if i not in chosen]
        rows = 2 if self.retain == "mean" else 1 + len(retain)
        select = torch.zeros(rows, m, dtype=torch.float64, device="cpu")
        select[0, sorted(chosen)] = 1 / count
        if self.retain == "mean":
            select[1, retain] = 1 / len(retain)
        else:
            select[range(1, 1 + len(retain)), retain] = 1
        return select.to(device)

    def _project(self, gramian: Tensor, select: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gram = select @ gramian.double() @ select.mT
        c, rank, _ = projection_weights(gram[..., 1:, 1:], gram[..., 1:, 0], rtol=self.rtol)
        return c, rank, gram

    def _mix(self, coefficients: Tensor, select: Tensor) -> Tensor:
        k = coefficients.shape[-1]
        retain = self.alpha / k + (1 - self.alpha) * coefficients
        forget = torch.full_like(coefficients[..., :1], self.alpha - 1)
        return torch.cat([forget, retain], dim=-1) @ select

    def _groups(self, names: list[str]) -> list[int]:
        """The group of each tensor."""
        if self.granularity == "tensor":
            return list(range(len(names)))
        modules = [name.rpartition(".")[0] for name in names]
        order = {module: g for g, module in enumerate(dict.fromkeys(modules))}
        return [order[module] for module in modules]

    def _refined(
        self,
        jacobian: Jacobian,
        coefficients: Tensor,
        grams: Tensor,
        groups: list[int],
        select: Tensor,
        metric: Sequence[Tensor] | None,
    ) -> Tensor:
        """c + K⁺ J g⊥, with g⊥ formed and multiplied rather than predicted."""
        parts = torch.cat([torch.ones_like(coefficients[:, :1]), -coefficients], dim=1) @ select
        perp = jacobian.combine(parts[groups])
        if metric is not None:
            perp = [p * weight for p, weight in zip(perp, metric, strict=True)]
        rest = torch.zeros_like(parts)
        into = torch.tensor(groups, device=rest.device)
        rest.index_add_(0, into, jacobian.products(perp).to(rest.device))
        gram = select @ grams @ select.mT
        products = (rest @ select.mT)[:, 1:]
        correction, *_ = projection_weights(gram[:, 1:, 1:], products, rtol=self.rtol)
        return coefficients + correction


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


def _indices(forget: int | Sequence[int] | Tensor) -> list[int]:
    given: Any = forget.tolist() if isinstance(forget, Tensor) else forget
    values = list(given) if isinstance(given, (list, tuple, range)) else [given]
    check(
        all(isinstance(i, int) and not isinstance(i, bool) for i in values),
        f"forget must be an index, indices, a slice or a mask, got {forget!r}",
    )
    return values
