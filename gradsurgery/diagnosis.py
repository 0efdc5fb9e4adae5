"""What the rows of a Gramian are to each other: cosines, conflicts, ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.extras import package
from gradsurgery.jacobian import Jacobian
from gradsurgery.ops import projection_weights
from gradsurgery.ops._inputs import as_gramian, check, check_gramian_finite, check_values, shown


@dataclass(frozen=True)
class Diagnosis:
    """Figures of m rows; `print` shows them, `plot` draws the cosines, `to_dict` is for logs."""

    norms: Tensor  # [m] float64
    cosines: Tensor  # [m, m] float64; 0 with a zero row
    conflict_rate: float  # share of the pairs of rows with a negative cosine, in [0, 1]
    rank: int  # how many rows are no combination of others, as far as the Gramian resolves
    # exp of the entropy of the singular values of the unit rows, as shares of their sum: from 1,
    # for parallel rows, to m, for orthogonal ones
    effective_rank: float
    removed: Tensor  # [m] float64 in [0, 1]: share of a row's norm in the span of the others
    frozen: list[str]  # tensors with fewer values than rows: a projection off the others leaves 0
    labels: list[str]  # of the rows

    @property
    def conflicts(self) -> list[tuple[str, str, float]]:
        """Pairs of rows with a negative cosine, and that, the worst first."""
        i, j = (self.cosines.triu(1) < 0).nonzero(as_tuple=True)
        found = [
            (self.labels[a], self.labels[b], float(self.cosines[a, b]))
            for a, b in zip(i.tolist(), j.tolist(), strict=True)
        ]
        return sorted(found, key=lambda pair: pair[2])

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        tensors = {name: getattr(self, name).tolist() for name in ("norms", "cosines", "removed")}
        return {**vars(self), **tensors, "conflicts": [list(pair) for pair in self.conflicts]}

    def __str__(self) -> str:
        m = len(self.labels)
        width = max([len("row"), *map(len, self.labels[:16])])
        lines = [
            f"{m} rows, rank {self.rank}, effective rank {self.effective_rank:.2f}, "
            f"{self.conflict_rate:.0%} of pairs in conflict",
            f"{'row':<{width}}  {'norm':>9}  {'in others':>9}  conflicts  worst cosine",
        ]
        off = self.cosines - torch.eye(m, dtype=torch.float64, device="cpu")
        for i in range(min(m, 16)):
            others = torch.cat([off[i, :i], off[i, i + 1 :]])
            count = int((others < 0).sum())
            worst = f"{float(others.min()):12.3f}" if m > 1 else f"{'-':>12}"
            lines.append(
                f"{self.labels[i]:<{width}}  {float(self.norms[i]):9.3g}  "
                f"{float(self.removed[i]):9.1%}  {count:9d}  {worst}"
            )
        if m > 16:
            lines.append(f"... and {m - 16} more rows")
        if self.frozen:
            named = ", ".join(self.frozen[:4]) + (", ..." if len(self.frozen) > 4 else "")
            lines.append(f"{len(self.frozen)} tensors would freeze: {named}")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draws the cosines as a heat map and returns the matplotlib axes."""
        pyplot = package("matplotlib.pyplot", "cli", "plot")
        if ax is None:
            _, ax = pyplot.subplots(figsize=(4.8, 4), layout="constrained")
        image = ax.imshow(self.cosines.numpy(), cmap="RdBu", vmin=-1, vmax=1)
        m = len(self.labels)
        if m <= 24:
            ax.set_xticks(range(m), self.labels, rotation=90)
            ax.set_yticks(range(m), self.labels)
        if m <= 10:
            for i in range(m):
                for j in range(m):
                    value = float(self.cosines[i, j])
                    color = "white" if abs(value) > 0.6 else "black"
                    ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
        ax.set_title(f"cosines of the rows: {self.conflict_rate:.0%} of pairs in conflict")
        ax.figure.colorbar(image, ax=ax, shrink=0.85)
        return ax


def diagnose(rows: Tensor | Jacobian, labels: list[str] | None = None) -> Diagnosis:
    """Cosines, conflicts and ranks of the rows of a Jacobian or of a Gramian [m, m].

    Args:
        rows: a Jacobian, which also tells the tensors that would freeze, or a Gramian.
        labels: a name for each row; None for their numbers.

    Raises:
        InputError: a batch of Gramians, or labels that are not m.
        NonFiniteError: a row with NaN or infinity.
    """
    if isinstance(rows, type) or not (isinstance(rows, Tensor) or hasattr(rows, "gramian")):
        raise InputError(f"rows must be a Jacobian or a Gramian, got {type(rows).__name__}")
    gramian = rows if isinstance(rows, Tensor) else rows.gramian()
    check_values(gramian, "rows")
    check(gramian.dim() == 2, f"rows must be a Gramian [m, m], got {list(gramian.shape)}")
    gram = as_gramian(gramian).detach().cpu()
    check_gramian_finite(gram)
    m = len(gram)
    square = gram.diagonal()
    limit = 1e-3 * (square.abs().sqrt()[:, None] * square.abs().sqrt()) + 1e-300
    check(
        bool((square >= 0).all()) and bool(((gram - gram.mT).abs() <= limit).all()),
        "rows must be a Gramian: it is not symmetric, or has a negative square; "
        "of rows [m, n], pass gs.gramian(rows)",
    )
    if labels is not None:
        plain = isinstance(labels, Sequence) and not isinstance(labels, str)
        named = plain and all(isinstance(label, str) for label in labels)
        check(named, f"labels must be a list of names, got {shown(labels)}")
    names = [str(i) for i in range(m)] if labels is None else list(labels)
    check(len(names) == m, f"labels has {len(names)} names for {m} rows")
    norms = gram.diagonal().clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / torch.where(norms > 0, norms, 1), 0)
    cosines = (gram * scale[:, None] * scale).clamp(-1, 1)
    pairs = m * (m - 1) / 2
    values = torch.linalg.eigvalsh(cosines).clamp_min(0).sqrt() if m else norms
    shares = values / values.sum() if bool(values.any()) else values
    # each row against all others: it is zero in its own Gramian
    apart = 1 - torch.eye(m, dtype=torch.float64, device="cpu")
    removed = torch.zeros(m, dtype=torch.float64, device="cpu")
    for rows_of in torch.arange(m, device="cpu").split(
        64
    ):  # m Gramians of m rows at once would be large
        others = cosines * apart[rows_of, :, None] * apart[rows_of, None, :]
        products = cosines[rows_of] * apart[rows_of]
        c, _, _ = projection_weights(others.to(gramian.dtype), products)
        removed[rows_of] = (c * products).sum(-1).clamp(0, 1).sqrt()
    _, rank, _ = projection_weights(cosines.to(gramian.dtype), torch.zeros_like(norms))
    frozen = []
    if not isinstance(rows, Tensor):
        frozen = [n for n, size in zip(rows.names, rows.sizes, strict=True) if size < m]
    return Diagnosis(
        norms=norms,
        cosines=cosines,
        conflict_rate=float((cosines.triu(1) < 0).sum() / pairs) if pairs else 0.0,
        rank=int(rank),
        effective_rank=float(torch.special.entr(shares).sum().exp()) if bool(values.any()) else 0.0,
        removed=removed,
        frozen=frozen,
        labels=names,
    )
