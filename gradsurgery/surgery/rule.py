"""What a rule is: from rows to one update, by weights from their Gramian or otherwise."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.jacobian import DenseJacobian, Jacobian, found_gramian
from gradsurgery.ops._inputs import (
    as_gramian,
    check,
    check_dense,
    check_gramian_finite,
    check_number,
    check_values,
    one_of,
    shown,
    to_device,
)
from gradsurgery.ops.weighting import default_rtol

Index = int | slice | Sequence[int] | Tensor
Rows = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | Jacobian

GRANULARITIES = ("model", "module", "tensor")
COLUMNS = "columns"  # in a state: the names of the parameters that it is of, as bytes


class Solution(NamedTuple):
    """Weights of an update and what was found on the way; g groups of tensors.

    On the CPU where a GPU's Gramian was small, which is looked at there.
    """

    weights: Tensor  # [m], or [L, m] where tensors are weighted apart
    gramian: Tensor  # [m, m] float64, of whole rows
    rank: Tensor | None = None  # [g] int64, of the rows projected off, where some are
    kept_norm: Tensor | None = None  # [] float64, |g⊥| / |g_u| in [0, 1], likewise
    frozen: Sequence[str] = ()  # tensors no larger than the number of those rows: g⊥ is zero


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule of gradient surgery: from rows to the update that they make.

    Rows are gradients of losses that training would lower, one each. A rule to be written is a
    `Weighting`, whose update is a weighted sum of the rows, or an `Elementwise` one; where it is
    listed, the command line, the documentation and the tests find it.
    """

    formula: ClassVar[str] = ""  # of the update, in a line
    paper: ClassVar[str] = ""
    roles: ClassVar[tuple[str, ...]] = ()  # rows that are told apart, and may be named in a call
    # What holds of the update u, for a positive c:
    #   equivariant: the order of the rows does not matter
    #   non-conflicting: ⟨g_i, u⟩ >= 0 for all i
    #   linear: u is the sum of what each row g_i gives, which c g_i gives c times
    #   invariant: c g_i in place of g_i gives the same u
    #   stationary: u = 0 where a positive combination of all rows vanishes
    properties: ClassVar[frozenset[str]] = frozenset()

    remembers: ClassVar[tuple[str, ...]] = ()  # names in the state
    merges: ClassVar[tuple[str, ...]] = ()  # batches of a step of which the mean row is enough

    _state: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, kind in _numbers(type(self)).items():
            _check_option(name, getattr(self, name), kind)

    def __call__(self, rows: Rows, *given: Index, **roles: Any) -> Any:
        """The update, shaped like a row: of rows [m, n] a Tensor, of [m, *p.shape] each, or of a
        Jacobian, a list; of a mapping of such blocks by name a dict.

        Args:
            *given: which rows are what, where the rule tells them apart: an index, indices, a
                slice or a mask [m].
            **roles: the same by name, as `forget=0`.
        """
        jacobian = as_jacobian(rows)
        update = self._update(jacobian, **self._named(given, roles))
        return like_rows(update, rows, jacobian)

    def _update(self, jacobian: Jacobian, **roles: Any) -> list[Tensor]:
        """[*p.shape] for each parameter."""
        raise NotImplementedError

    @property
    def weighting(self) -> "Weighting | None":
        """The rule as a function of a Gramian; None where it needs the rows themselves."""
        return None

    def _named(self, given: Sequence[Index], roles: dict[str, Any]) -> dict[str, Any]:
        if not given and not roles:
            return {}
        name = type(self).__name__
        count = len(given)
        check(count <= len(self.roles), f"{name} takes rows for {self.roles}, got {count} more")
        for role in roles:
            check(role in self.roles, f"{name} has no {role} rows")
            check(role not in self.roles[:count], f"{name} is given {role} twice")
        return {**dict(zip(self.roles, given, strict=False)), **roles}

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers of former calls, as tensors; {} for most rules.

        One that was not yet called has tensors without elements in their place, so that whoever
        fills a state in place, as torch.distributed.checkpoint does, cannot miss what was saved.
        """
        none = {name: torch.empty(0, device="cpu") for name in self.remembers}
        return {**none, **{name: value.clone() for name, value in self._state.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`; an empty one is that of a rule not yet called."""
        name = type(self).__name__
        check(isinstance(state, Mapping), f"state must be a dict, got {type(state).__name__}")
        unknown = sorted(map(str, set(state) - {*self.remembers, COLUMNS}))
        check(not unknown, f"{name} remembers {self.remembers}, got {unknown}")
        for key, value in state.items():
            check(isinstance(value, Tensor), f"state of {key} must be a Tensor, got {shown(value)}")
        self._state.clear()
        self._state.update({name: v.clone() for name, v in state.items() if v.numel()})

    def check_columns(self, names: Sequence[str]) -> None:
        """Raise `InputError` where what is remembered is of other parameters than these."""
        known = self._state.get(COLUMNS)
        check(
            known is None or bytes(known.tolist()) == _joined(names),
            f"rule: {type(self).__name__} remembers {self._of_columns()} over other parameters "
            "than are trained now; rule.load_state_dict({}) starts anew",
        )

    def note_columns(self, names: Sequence[str]) -> None:
        """Keep the names of the parameters that what is remembered is of."""
        if self._of_columns():
            found = torch.tensor(list(_joined(names)), dtype=torch.uint8, device="cpu")
            self._state[COLUMNS] = found

    def _of_columns(self) -> str:
        """What of the state is of parameters; empty where nothing is."""
        return ""

    def _draw(self, seed: int, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Random numbers of the rule's own, going on where the last call ended."""
        generator = torch.Generator(device="cpu")
        if "draws" in self._state:
            generator.set_state(self._state["draws"])
        else:
            check(-(1 << 63) <= seed < 1 << 64, f"seed must fit into 64 bits, got {shown(seed)}")
            generator.manual_seed(int(seed))
        drawn = draw(generator)
        self._state["draws"] = generator.get_state()
        return drawn

    @classmethod
    def options(cls) -> list[str]:
        """Names of what is given to make one."""
        return [f.name for f in fields(cls) if f.init]


@dataclass(frozen=True, kw_only=True)
class Weighting(Rule):
    """A rule whose update is a weighted sum of the rows, the weights a function of their Gramian.

    Weights are float64, on the Gramian's device, computed without waiting for it. A subclass has
    `_weights`.

    Args:
        granularity: one set of weights for the whole model, or one for each "module" or "tensor",
            from the Gramian of its part of the rows. With "module", parameters whose names differ
            in the last part only go together.
        precondition: None, or "optimizer": inner products in the optimizer's metric, so that it is
            the step and not the gradient that opposes no row, is orthogonal, or whatever the rule
            says. Needs `Surgeon` and Adam or AdamW, whose metric is lr / (sqrt(v) + eps) of the
            steps taken so far; momentum from earlier steps is not in it.
    """

    checks: ClassVar[bool] = False  # whether `_weights` itself refuses what is not finite

    granularity: Literal["model", "module", "tensor"] = "model"
    precondition: Literal["optimizer"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("granularity", self.granularity, GRANULARITIES)
        one_of("precondition", self.precondition, (None, "optimizer"))

    @property
    def weighting(self) -> "Weighting | None":
        return self

    def weights(self, gramian: Tensor, *given: Index, **roles: Any) -> Tensor:
        """Weights of the update, [..., m] float64, from Gramians [..., m, m], one by one.

        Args:
            gramian: in the dtype it was computed in, which says what it resolves.
            *given: which rows are what, where the rule tells them apart: an index, indices, a
                slice or a mask [m].
            **roles: the same by name, as `forget=0`.
        """
        gram = as_gramian(gramian)
        if not self.checks:
            check_gramian_finite(gram)
        rtol = default_rtol(gram.shape[-1], gramian.dtype)
        return self._weights(gram, rtol, **self._named(given, roles))

    def _weights(self, *args: Any, **roles: Any) -> Tensor:
        """(gram, rtol, **roles): [..., m] from gram [..., m, m] float64, which resolves relative
        distances of rtol."""
        raise NotImplementedError

    def _update(self, jacobian: Jacobian, **roles: Any) -> list[Tensor]:
        return jacobian.combine(self.solve(jacobian, **roles).weights)

    def solve(
        self,
        jacobian: Jacobian,
        *given: Index,
        metric: Sequence[Tensor] | None = None,
        **roles: Any,
    ) -> Solution:
        """Weights for the rows of a Jacobian, with the granularity asked for.

        `metric`, one tensor [*p.shape] per parameter, makes inner products <a, metric * b>.
        """
        grams, groups = grouped_gramian(jacobian, self.granularity, metric)
        weights = self.weights(grams, *given, **roles)
        weights = weights[0] if self.granularity == "model" else weights[groups]
        return Solution(weights, grams.sum(0))

    def _of_columns(self) -> str:
        if self.granularity == "model":
            return ""
        return ", ".join(sorted(set(self._state) - {"draws", COLUMNS}))

    @classmethod
    def options(cls) -> list[str]:
        shared = {f.name for f in fields(Weighting)}
        return [name for name in super().options() if name not in shared]


@cache
def _numbers(rule: type[Rule]) -> dict[str, Any]:
    """The options of a rule that are numbers, or sequences of them."""
    hints = get_type_hints(rule)
    kinds = {name: hints[name] for name in rule.options()}
    return {name: kind for name, kind in kinds.items() if get_origin(kind) is not Literal}


def _check_option(name: str, value: Any, kind: Any) -> None:
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if value is None and type(None) in kinds:
        return
    if int in kinds or float in kinds:
        check_number(name, value, Integral if int in kinds else Real)
    elif kinds[0] == Sequence[float]:
        _check_numbers(name, value)


def _check_numbers(name: str, values: Any) -> None:
    listed = hasattr(values, "__len__") and hasattr(values, "__getitem__")
    try:
        known = None
        if listed and not isinstance(values, (str, bytes, Mapping, type)):
            known = [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        known = None
    if known is None or not all(map(math.isfinite, known)):
        raise InputError(f"{name} must be finite numbers, one for each row, got {shown(values)}")


def as_jacobian(rows: Rows) -> Jacobian:
    if isinstance(rows, Tensor):
        check_dense(rows, "rows")
    elif isinstance(rows, Sequence) and not isinstance(rows, (str, bytes)):
        flat = all(isinstance(block, Tensor) and block.dim() == 1 for block in rows)
        check(
            len(rows) < 2 or not flat,
            "rows must be [m, n] or a block [m, *p.shape] for each parameter; these seem to be "
            "gradients: torch.stack(rows) has one in each row",
        )
    elif not isinstance(rows, Mapping):
        known = all(hasattr(rows, name) for name in ("gramian", "combine", "names"))
        check(
            known and not isinstance(rows, type),
            "rows must be a Tensor [m, n], blocks [m, *p.shape] by themselves or by names, or a "
            f"Jacobian, got {type(rows).__name__}",
        )
        return cast(Jacobian, rows)
    return DenseJacobian(cast(Any, rows))


def _joined(names: Sequence[str]) -> bytes:
    return "\n".join(names).encode()


def like_rows(update: list[Tensor], rows: Rows, jacobian: Jacobian) -> Any:
    """An update as a row is given: a Tensor, by names, or a list."""
    if isinstance(rows, Tensor):
        return update[0]
    return dict(zip(jacobian.names, update, strict=True)) if isinstance(rows, Mapping) else update


def grouped_gramian(
    jacobian: Jacobian, granularity: str, metric: Sequence[Tensor] | None
) -> tuple[Tensor, list[int]]:
    """Gramians [g, m, m] of groups of tensors, and the group of each tensor.

    Small ones of a GPU's rows are on the CPU, and so is what follows from them.
    """
    if granularity == "model":
        return found_gramian(jacobian, "model", metric)[None], [0] * len(jacobian.names)
    groups = list(range(len(jacobian.names)))
    if granularity == "module":
        modules = [name.rpartition(".")[0] for name in jacobian.names]
        order = {module: g for g, module in enumerate(dict.fromkeys(modules))}
        groups = [order[module] for module in modules]
    per_tensor = found_gramian(jacobian, "tensor", metric)
    grams = per_tensor.new_zeros(max(groups) + 1, *per_tensor.shape[1:])
    grams.index_add_(0, torch.tensor(groups, device=grams.device), per_tensor)
    return grams, groups


def chosen(index: Index, m: int, name: str) -> list[int]:
    """The rows that an index, indices, a slice or a mask selects, in order."""
    if type(index) is int and -m <= index < m:
        return [index % m]
    if type(index) is tuple and not index:
        return []
    what = f"{name} must be an index, indices, a slice or a mask"
    if isinstance(index, Tensor):
        check_values(index, name)
        if index.dtype == torch.bool:
            check(index.shape == (m,), f"{name} must be a mask [{m}], got {list(index.shape)}")
            return index.nonzero().flatten().tolist()
    if isinstance(index, slice):
        try:
            return list(range(m)[index])
        except (TypeError, ValueError) as error:
            raise InputError(f"{what}, got {str(index)[:60]}") from error
    given: Any = index.tolist() if isinstance(index, Tensor) else index
    values = list(given) if isinstance(given, (list, tuple, range)) else [given]
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in values):
        raise InputError(f"{what}, got {shown(index)}")
    for i in values:
        check(-m <= i < m, f"{name}={i} is out of range for {m} rows")
    return sorted({int(i) % m for i in values})


def split(m: int, index: Index, name: str, rest: str) -> tuple[list[int], list[int]]:
    """The rows selected and the others; neither may be none."""
    rows = chosen(index, m, name)
    check(
        0 < len(rows) < m,
        f"{name} selects {len(rows)} of {m} rows; need a {name} and a {rest} row",
    )
    known = set(rows)
    return rows, [i for i in range(m) if i not in known]


def mean_of(rows: Sequence[int], m: int) -> Tensor:
    """Weights [m] of the mean of some rows, on the CPU."""
    weights = torch.zeros(m, dtype=torch.float64, device="cpu")
    weights[list(rows)] = 1 / max(len(rows), 1)
    return weights


def check_preference(given: Sequence[float] | None) -> None:
    """Raise where a weight of the rows opposes one."""
    check(
        given is None or all(weight >= 0 for weight in given),
        f"preference must be 0 or more, got {given}",
    )


def preference(given: Sequence[float] | None, gram: Tensor, name: str = "preference") -> Tensor:
    """Weights [m] of the rows before surgery; the mean if none are given."""
    m = gram.shape[-1]
    if given is None:
        return torch.full((m,), 1 / max(m, 1), dtype=gram.dtype, device=gram.device)
    check(len(given) == m, f"{name} must have {m} entries, one per row, got {len(given)}")
    return to_device(torch.tensor(list(given), dtype=gram.dtype, device="cpu"), gram.device)
