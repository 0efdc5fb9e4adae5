"""torchjd's aggregators and weightings, computed by this library's rules; torchjd is not needed.

Names, calls and results are theirs: an aggregator maps a matrix [m, n] to a vector [n], a weighting
a Gramian [m, m] to weights [m], in its dtype and on its device; torchjd's own `jac_to_grad` takes
them. What differs: results are those of the definitions, without the small constants that theirs
add, so that no scale of the rows is lost, and a row with NaN raises. Arguments that only tune an
approximation (projector, norm_eps, epsilon, max_iters, eps, optim_niter) are accepted and not
needed; options are no attributes. Rules that draw take a seed from torch's global generator when
they are made, and their state is in `state_dict()`. Not here: Krum, PCD, ExcessMTL, CRMOGM, MoDo,
SDMGrad, and `scale_mode` other than "min".
"""

import inspect
import sys
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from gradsurgery import surgery
from gradsurgery.errors import InputError
from gradsurgery.ops import combine, gramian
from gradsurgery.ops._inputs import check, check_dense, check_values

R = TypeVar("R", bound=surgery.Rule)

# weights that no Gramian decides
BLIND = (surgery.Mean, surgery.Sum, surgery.Constant, surgery.Random)


class _Ruled(nn.Module, Generic[R]):
    def __init__(self, rule: R) -> None:
        super().__init__()
        self.rule = rule
        theirs = sys.modules.get("torchjd.aggregation")
        if theirs is not None:  # to their code, these are of their kinds
            theirs.Weighting.register(Weighting)
            theirs.GramianWeightedAggregator.register(Aggregator)
            theirs.Aggregator.register(Elementwise)

    def reset(self) -> None:
        """Forgets what former calls left, and begins again with the first draws."""
        self.rule.load_state_dict({})

    def get_extra_state(self) -> dict[str, Any]:
        return self.rule.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule})"


class Weighting(_Ruled[surgery.Weighting]):
    """A rule as a function of a Gramian [m, m]."""

    def forward(self, gramian: Tensor, /) -> Tensor:
        check_dense(gramian, "gramian")
        check(gramian.dim() == 2, f"gramian must be a matrix, got {list(gramian.shape)}")
        return self.rule.weights(gramian).to(gramian.dtype)


class _OfMatrix(nn.Module):
    """A weighting as a function of a matrix [m, n]."""

    def __init__(self, inner: Weighting) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, matrix: Tensor, /) -> Tensor:
        m = len(matrix)
        blind = isinstance(self.inner.rule, BLIND)
        gram = matrix.new_zeros(m, m, dtype=torch.float64) if blind else gramian(matrix)
        weights = self.inner(gram)
        return weights.to(torch.float32 if matrix.dtype.itemsize == 2 else matrix.dtype)


class Aggregator(_Ruled[surgery.Weighting]):
    """A rule as a function of a matrix [m, n]."""

    def __init__(self, rule: surgery.Weighting) -> None:
        super().__init__(rule)
        self.gramian_weighting = Weighting(rule)
        self.weighting = _OfMatrix(self.gramian_weighting)

    def forward(self, matrix: Tensor, /) -> Tensor:
        return cast(Tensor, combine(matrix, self.weighting(_matrix(matrix))))


class Elementwise(_Ruled[surgery.Elementwise]):
    """A rule as a function of a matrix [m, n] that is no sum of its rows."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        return self.rule(_matrix(matrix))


def _matrix(matrix: Tensor) -> Tensor:
    check_dense(matrix, "matrix")
    check(matrix.dim() == 2, f"matrix must be [m, n], got {list(matrix.shape)}")
    return matrix


def _upgrad(pref_vector: Tensor | None = None, projector: Any = None) -> surgery.Weighting:
    return surgery.UPGrad(preference=_preference(pref_vector))


def _dualproj(pref_vector: Tensor | None = None, projector: Any = None) -> surgery.Weighting:
    return surgery.DualProj(preference=_preference(pref_vector))


def _cagrad(c: float, norm_eps: float = 0.0001) -> surgery.Weighting:
    return surgery.CAGrad(c=c)


def _mgda(epsilon: float = 0.001, max_iters: int = 100) -> surgery.Weighting:
    return surgery.MGDA()


def _nashmtl(
    n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
) -> surgery.Weighting:
    check(update_weights_every == 1, "update_weights_every must be 1: every call is solved")
    return surgery.NashMTL(max_norm=max_norm or None)


def _pcgrad() -> surgery.Weighting:
    return surgery.PCGrad(seed=_seed())


def _gradvac(beta: float = 0.5, eps: float = 1e-8) -> surgery.Weighting:
    return surgery.GradVac(beta=beta, seed=_seed())


def _imtlg() -> surgery.Weighting:
    return surgery.IMTLG()


def _alignedmtl(pref_vector: Tensor | None = None, scale_mode: str = "min") -> surgery.Weighting:
    if scale_mode != "min":
        raise InputError(f"scale_mode must be 'min', got {scale_mode!r}")
    return surgery.AlignedMTL(preference=_preference(pref_vector))


def _fairgrad(alpha: float, max_iters: int | None = None) -> surgery.Weighting:
    return surgery.Mean() if alpha == 0 else surgery.FairGrad(alpha=alpha)


def _config(pref_vector: Tensor | None = None) -> surgery.Weighting:
    return surgery.ConFIG(preference=_preference(pref_vector))


def _constant(weights: Tensor) -> surgery.Weighting:
    return surgery.Constant(values=_list("weights", weights))


def _random() -> surgery.Weighting:
    return surgery.Random(seed=_seed())


def _graddrop(leak: float = 0.0) -> surgery.GradDrop:
    check(not isinstance(leak, Tensor), "leak must be a number, the same for all rows")
    return surgery.GradDrop(leak=leak, seed=_seed())


def _trimmedmean(trim_number: int) -> surgery.TrimmedMean:
    return surgery.TrimmedMean(trim=trim_number)


def _list(name: str, vector: Any) -> list[float]:
    check_values(vector, name)
    check(
        vector.dim() == 1 and (vector.is_floating_point() or vector.dtype == torch.int64),
        f"{name} must be a vector of numbers, got {vector.dtype} {list(vector.shape)}",
    )
    return vector.tolist()


def _preference(pref_vector: Tensor | None) -> list[float] | None:
    return None if pref_vector is None else _list("pref_vector", pref_vector)


def _seed() -> int:
    return int(torch.randint(2**31, (), device="cpu"))


def _kind(base: Any, name: str, make: Any) -> Any:
    def init(self: Any, *args: Any, **options: Any) -> None:
        base.__init__(self, make(*args, **options))

    init.__doc__ = f"The arguments of torchjd's {name}."
    init.__signature__ = inspect.signature(make)
    return type(name, (base,), {"__init__": init, "__module__": __name__})


AlignedMTL = _kind(Aggregator, "AlignedMTL", _alignedmtl)
CAGrad = _kind(Aggregator, "CAGrad", _cagrad)
ConFIG = _kind(Aggregator, "ConFIG", _config)
Constant = _kind(Aggregator, "Constant", _constant)
DualProj = _kind(Aggregator, "DualProj", _dualproj)
FairGrad = _kind(Aggregator, "FairGrad", _fairgrad)
GradDrop = _kind(Elementwise, "GradDrop", _graddrop)
GradVac = _kind(Aggregator, "GradVac", _gradvac)
IMTLG = _kind(Aggregator, "IMTLG", _imtlg)
MGDA = _kind(Aggregator, "MGDA", _mgda)
Mean = _kind(Aggregator, "Mean", surgery.Mean)
NashMTL = _kind(Aggregator, "NashMTL", _nashmtl)
PCGrad = _kind(Aggregator, "PCGrad", _pcgrad)
Random = _kind(Aggregator, "Random", _random)
Sum = _kind(Aggregator, "Sum", surgery.Sum)
TrimmedMean = _kind(Elementwise, "TrimmedMean", _trimmedmean)
UPGrad = _kind(Aggregator, "UPGrad", _upgrad)

AlignedMTLWeighting = _kind(Weighting, "AlignedMTLWeighting", _alignedmtl)
CAGradWeighting = _kind(Weighting, "CAGradWeighting", _cagrad)
ConstantWeighting = _kind(Weighting, "ConstantWeighting", _constant)
DualProjWeighting = _kind(Weighting, "DualProjWeighting", _dualproj)
FairGradWeighting = _kind(Weighting, "FairGradWeighting", _fairgrad)
GradVacWeighting = _kind(Weighting, "GradVacWeighting", _gradvac)
IMTLGWeighting = _kind(Weighting, "IMTLGWeighting", _imtlg)
MGDAWeighting = _kind(Weighting, "MGDAWeighting", _mgda)
MeanWeighting = _kind(Weighting, "MeanWeighting", surgery.Mean)
PCGradWeighting = _kind(Weighting, "PCGradWeighting", _pcgrad)
RandomWeighting = _kind(Weighting, "RandomWeighting", _random)
SumWeighting = _kind(Weighting, "SumWeighting", surgery.Sum)
UPGradWeighting = _kind(Weighting, "UPGradWeighting", _upgrad)

__all__ = [
    "IMTLG",
    "MGDA",
    "Aggregator",
    "AlignedMTL",
    "AlignedMTLWeighting",
    "CAGrad",
    "CAGradWeighting",
    "ConFIG",
    "Constant",
    "ConstantWeighting",
    "DualProj",
    "DualProjWeighting",
    "FairGrad",
    "FairGradWeighting",
    "GradDrop",
    "GradVac",
    "GradVacWeighting",
    "IMTLGWeighting",
    "MGDAWeighting",
    "Mean",
    "MeanWeighting",
    "NashMTL",
    "PCGrad",
    "PCGradWeighting",
    "Random",
    "RandomWeighting",
    "Sum",
    "SumWeighting",
    "TrimmedMean",
    "UPGrad",
    "UPGradWeighting",
    "Weighting",
]
