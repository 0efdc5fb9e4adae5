"""torchjd's aggregators and weightings, computed by this library's rules; torchjd is not needed.

Names, calls and results are theirs: an aggregator maps a matrix [m, n] to a vector [n], a weighting
a Gramian [m, m] to weights [m], in its dtype and on its device; torchjd's own `jac_to_grad` takes
them. What differs: results are those of the definitions, without the small constants that theirs
add, so that no scale of the rows is lost, and a row with NaN raises. Krum's distances are squared,
as in its paper. Arguments that only tune an approximation (projector, norm_eps, epsilon, max_iters,
eps, optim_niter) are accepted and not needed; options are no attributes. Rules that draw take a
seed from torch's global generator when they are made, and their state is in `state_dict()`, in
float64: that of ExcessMTL is as large as its matrix. MoDoWeighting and SDMGradWeighting take a
product J_1 J_2ᵀ [m, m] of two batches, ExcessMTLWeighting the matrix itself. Not here: `f` of
GradDrop, a `tau` or `leak` for each row, `scale_mode` other than "min", CRMOGMWeighting of the last
three.
"""

import inspect
import sys
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from gradsurgery import surgery
from gradsurgery.errors import InputError
from gradsurgery.integrations.torchjd.excess_risks import ExcessRisks
from gradsurgery.ops import combine, gramian
from gradsurgery.ops._inputs import check, check_count, check_dense, check_number, check_values

R = TypeVar("R", bound=surgery.Rule)


class _Ruled(nn.Module, Generic[R]):
    """What is made by a rule, and goes by its state."""

    rule: R

    def reset(self) -> None:
        """Forgets what former calls left, and begins again with the first draws."""
        self.rule.load_state_dict({})

    def get_extra_state(self) -> dict[str, Any]:
        return self.rule.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule})"


class Weighting(_Ruled[surgery.Weighting | ExcessRisks]):
    """A rule as a function of a Gramian [m, m], or of any [m, n] if no Gramian decides it."""

    def __init__(self, rule: surgery.Weighting | ExcessRisks) -> None:
        super().__init__()
        self.rule = rule
        _introduce()

    def forward(self, gramian: Tensor, /) -> Tensor:
        check_dense(gramian, "gramian")
        check(gramian.dim() == 2, f"gramian must be a matrix, got {list(gramian.shape)}")
        m, n = gramian.shape
        gram = _nothing(gramian) if m != n and _blind(self.rule) else gramian
        return self.rule.weights(gram).to(gramian.dtype)


class _OfMatrix(nn.Module):
    """A weighting as a function of a matrix [m, n]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, matrix: Tensor, /) -> Tensor:
        blind = _blind(getattr(self.inner, "rule", None))
        return _like(self.inner(_nothing(matrix) if blind else gramian(matrix)), matrix)


class Aggregator(nn.Module):
    """A function of a matrix [m, n]."""

    def __init__(self) -> None:
        super().__init__()
        _introduce()

    def forward(self, matrix: Tensor, /) -> Tensor:
        raise NotImplementedError


class WeightedAggregator(Aggregator):
    """The sum of a matrix's rows with weights that are a function of the matrix."""

    def __init__(self, weighting: nn.Module) -> None:
        super().__init__()
        _check_module("weighting", weighting)
        self.weighting = weighting

    def forward(self, matrix: Tensor, /) -> Tensor:
        weights = self.weighting(_matrix(matrix))
        return cast(Tensor, combine(matrix, _like(weights, matrix)))


class GramianWeightedAggregator(WeightedAggregator):
    """The sum of a matrix's rows with weights that are a function of their Gramian."""

    def __init__(self, gramian_weighting: nn.Module) -> None:
        _check_module("gramian_weighting", gramian_weighting)
        super().__init__(_OfMatrix(gramian_weighting))
        self.gramian_weighting = gramian_weighting


class _Weighted(_Ruled[surgery.Weighting], GramianWeightedAggregator):
    """A rule as a function of a matrix [m, n]."""

    def __init__(self, rule: surgery.Weighting) -> None:
        GramianWeightedAggregator.__init__(self, Weighting(rule))
        self.rule = rule


class _Elementwise(_Ruled[surgery.Elementwise], Aggregator):
    """A rule as a function of a matrix [m, n] that is no sum of its rows."""

    def __init__(self, rule: surgery.Elementwise) -> None:
        Aggregator.__init__(self)
        self.rule = rule

    def forward(self, matrix: Tensor, /) -> Tensor:
        return self.rule(_matrix(matrix))


def _introduce() -> None:
    """To torchjd's code, if it is there, these are of its kinds."""
    theirs = sys.modules.get("torchjd.aggregation")
    if theirs is not None:
        for kind in (Weighting, GramianWeightedAggregator, WeightedAggregator, Aggregator):
            getattr(theirs, kind.__name__).register(kind)


def _blind(rule: surgery.Rule | None) -> bool:
    """Whether its weights are decided by no Gramian."""
    if isinstance(rule, surgery.CRMOGM):
        return _blind(rule.rule)
    return isinstance(rule, (surgery.Mean, surgery.Sum, surgery.Constant, surgery.Random))


def _nothing(matrix: Tensor) -> Tensor:
    return matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float64)


def _like(weights: Tensor, matrix: Tensor) -> Tensor:
    """In a dtype that the rows of a matrix are summed with."""
    return weights.to(torch.float32 if matrix.dtype.itemsize == 2 else matrix.dtype)


def _check_module(name: str, value: object) -> None:
    check(isinstance(value, nn.Module), f"{name} must be a Module, got {type(value).__name__}")


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


def _krum(n_byzantine: int, n_selected: int = 1) -> surgery.Weighting:
    return surgery.Krum(n_byzantine=n_byzantine, n_selected=n_selected)


def _pcd(tau: float = 0.02, beta: float = 0.999, eps: float = 1e-8) -> surgery.Weighting:
    check(not isinstance(tau, Tensor), "tau must be a number, the same for all rows")
    return surgery.PCD(tau=tau, beta=beta)


def _crmogm(
    weighting: Weighting, alpha: float = 0.9, initial_weights: Tensor | None = None
) -> surgery.Weighting:
    name = type(weighting).__name__
    check(isinstance(weighting, Weighting), f"weighting must be one of this module, got {name}")
    rule = weighting.rule
    if isinstance(rule, (ExcessRisks, surgery.MoDo, surgery.SDMGrad)):
        raise InputError(f"weighting must not keep weights of its own, as {name} does")
    initial = None if initial_weights is None else _list("initial_weights", initial_weights)
    return surgery.CRMOGM(rule=rule, alpha=alpha, initial=initial)


def _modo(gamma: float = 0.1, rho: float = 0.1) -> surgery.Weighting:
    return surgery.MoDo(gamma=gamma, rho=rho)


def _sdmgrad(
    lr: float = 10.0,
    momentum: float = 0.5,
    n_iter: int = 20,
    lambda_: float = 0.3,
    pref_vector: Tensor | None = None,
) -> surgery.Weighting:
    check_count("n_iter", n_iter)
    check_number("lambda_", lambda_)
    check(lambda_ >= 0, f"lambda_ must be 0 or more, got {lambda_}")
    known = _preference(pref_vector)
    return surgery.SDMGrad(lr=lr, momentum=momentum, steps=n_iter, pull=lambda_, preference=known)


def _excessmtl(robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> ExcessRisks:
    return ExcessRisks(robust_step_size=robust_step_size, n_warmup_steps=n_warmup_steps)


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
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    init.__signature__ = inspect.Signature([own, *inspect.signature(make).parameters.values()])
    return type(name, (base,), {"__init__": init, "__module__": __name__})


AlignedMTL = _kind(_Weighted, "AlignedMTL", _alignedmtl)
CAGrad = _kind(_Weighted, "CAGrad", _cagrad)
ConFIG = _kind(_Weighted, "ConFIG", _config)
Constant = _kind(_Weighted, "Constant", _constant)
DualProj = _kind(_Weighted, "DualProj", _dualproj)
FairGrad = _kind(_Weighted, "FairGrad", _fairgrad)
GradDrop = _kind(_Elementwise, "GradDrop", _graddrop)
GradVac = _kind(_Weighted, "GradVac", _gradvac)
IMTLG = _kind(_Weighted, "IMTLG", _imtlg)
Krum = _kind(_Weighted, "Krum", _krum)
MGDA = _kind(_Weighted, "MGDA", _mgda)
Mean = _kind(_Weighted, "Mean", surgery.Mean)
NashMTL = _kind(_Weighted, "NashMTL", _nashmtl)
PCD = _kind(_Weighted, "PCD", _pcd)
PCGrad = _kind(_Weighted, "PCGrad", _pcgrad)
Random = _kind(_Weighted, "Random", _random)
Sum = _kind(_Weighted, "Sum", surgery.Sum)
TrimmedMean = _kind(_Elementwise, "TrimmedMean", _trimmedmean)
UPGrad = _kind(_Weighted, "UPGrad", _upgrad)

AlignedMTLWeighting = _kind(Weighting, "AlignedMTLWeighting", _alignedmtl)
CAGradWeighting = _kind(Weighting, "CAGradWeighting", _cagrad)
CRMOGMWeighting = _kind(Weighting, "CRMOGMWeighting", _crmogm)
ConstantWeighting = _kind(Weighting, "ConstantWeighting", _constant)
DualProjWeighting = _kind(Weighting, "DualProjWeighting", _dualproj)
ExcessMTLWeighting = _kind(Weighting, "ExcessMTLWeighting", _excessmtl)
FairGradWeighting = _kind(Weighting, "FairGradWeighting", _fairgrad)
GradVacWeighting = _kind(Weighting, "GradVacWeighting", _gradvac)
IMTLGWeighting = _kind(Weighting, "IMTLGWeighting", _imtlg)
KrumWeighting = _kind(Weighting, "KrumWeighting", _krum)
MGDAWeighting = _kind(Weighting, "MGDAWeighting", _mgda)
MeanWeighting = _kind(Weighting, "MeanWeighting", surgery.Mean)
MoDoWeighting = _kind(Weighting, "MoDoWeighting", _modo)
PCDWeighting = _kind(Weighting, "PCDWeighting", _pcd)
PCGradWeighting = _kind(Weighting, "PCGradWeighting", _pcgrad)
RandomWeighting = _kind(Weighting, "RandomWeighting", _random)
SDMGradWeighting = _kind(Weighting, "SDMGradWeighting", _sdmgrad)
SumWeighting = _kind(Weighting, "SumWeighting", surgery.Sum)
UPGradWeighting = _kind(Weighting, "UPGradWeighting", _upgrad)


class ExcessMTL(WeightedAggregator):
    """The sum of a matrix's rows with the weights of ExcessMTLWeighting."""

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        super().__init__(ExcessMTLWeighting(robust_step_size, n_warmup_steps))

    def reset(self) -> None:
        """Forgets what former calls left, and begins again with equal weights."""
        cast(Weighting, self.weighting).reset()


__all__ = [
    "IMTLG",
    "MGDA",
    "PCD",
    "Aggregator",
    "AlignedMTL",
    "AlignedMTLWeighting",
    "CAGrad",
    "CAGradWeighting",
    "CRMOGMWeighting",
    "ConFIG",
    "Constant",
    "ConstantWeighting",
    "DualProj",
    "DualProjWeighting",
    "ExcessMTL",
    "ExcessMTLWeighting",
    "FairGrad",
    "FairGradWeighting",
    "GradDrop",
    "GradVac",
    "GradVacWeighting",
    "GramianWeightedAggregator",
    "IMTLGWeighting",
    "Krum",
    "KrumWeighting",
    "MGDAWeighting",
    "Mean",
    "MeanWeighting",
    "MoDoWeighting",
    "NashMTL",
    "PCDWeighting",
    "PCGrad",
    "PCGradWeighting",
    "Random",
    "RandomWeighting",
    "SDMGradWeighting",
    "Sum",
    "SumWeighting",
    "TrimmedMean",
    "UPGrad",
    "UPGradWeighting",
    "WeightedAggregator",
    "Weighting",
]
