"""Rows of micro-batches: added pass by pass, held, and put in the order of their batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, zip_longest
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gradsurgery.capture import FactoredJacobian
from gradsurgery.capture.held import Hold, Sums, held, rows_of
from gradsurgery.errors import NonFiniteError
from gradsurgery.jacobian import DenseJacobian, DenseSums, SummedRows, concat
from gradsurgery.ops._inputs import Leaving, check
from gradsurgery.passes import Part, Pass, Passes, check_outside
from gradsurgery.ranks import Group, RanksJacobian
from gradsurgery.ranks.tensor import TensorJacobian
from gradsurgery.spread import local
from gradsurgery.surgery import Rule

ROLES = ("forget", "retain", "batch", "second", "memory")  # the order of their rows

Stored = FactoredJacobian | DenseJacobian


class Collected(NamedTuple):
    """Rows of several batches, in order."""

    jacobian: Stored | SummedRows | RanksJacobian
    counts: dict[str, int]  # the rows of each batch
    parts: dict[str, list[Part]]  # of each batch, with its losses
    leaving: Leaving  # these losses, one part after another
    reached: list[bool]  # which of the columns' parameters the losses depend on
    # the same rows, of parameters that are not the model's; None where no loss depends on any
    outside: FactoredJacobian | SummedRows | RanksJacobian | None = None

    @property
    def losses(self) -> dict[str, Tensor]:
        """Of the rows of each batch, on the CPU; waits for a GPU."""
        return {part: _row_losses(found) for part, found in self._here()}

    @property
    def means(self) -> dict[str, Tensor]:
        """Of the losses of each batch, [], on the CPU; waits for a GPU."""
        return {part: _mean(found).mean() for part, found in self._here()}

    def _here(self) -> Iterator[tuple[str, list[Part]]]:
        losses = iter(self.leaving.here())
        for part, found in self.parts.items():
            yield part, [each._replace(losses=next(losses)) for each in found]


class Summary(NamedTuple):
    """What a rank has added, without the rows."""

    parts: dict[str, list[Part]]  # losses on the CPU
    bent: dict[str, str]
    overflowed: bool
    reached: list[bool]  # the parameters that losses depend on; shorter where none follows


class Known(NamedTuple):
    """What a rank knows of another that steps with it."""

    summary: Summary
    runs_foreign_code: bool  # in its optimizer's step


class Added:
    """The rows of micro-batches, until an update is made of them.

    The last pass stays as it is; before another is made, rows that are means go to their sums, and
    those of samples take less memory.

    Args:
        hold: how rows of samples are kept while others are made, as for `held`.
    """

    def __init__(self, hold: Hold) -> None:
        self.hold: Hold = hold
        self.overflowed = False  # whether a pass was scaled up too far: its rows are not there
        self.torn = False  # whether something stopped in the middle of a change
        self._columns: dict[str, nn.Parameter] = {}
        # of the columns, what tells that they moved; None where rows are used at once
        self._values: list[tuple[int, Tensor]] | None = None
        self._last: list[Pass] = []
        self._samples: list[Pass] = []  # of one part each
        self._sums: dict[str, Sums | DenseSums] = {}
        self._parts: dict[str, list[Part]] = {}  # of all passes
        self._bent: dict[str, str] = {}  # by part: parameters that passes may not part rows of

    def __bool__(self) -> bool:
        return bool(self._parts) or self.overflowed

    @property
    def parts(self) -> set[str]:
        """The batches that there are rows of."""
        return set(self._parts)

    @property
    def count(self) -> int:
        """How often rows were added."""
        return sum(map(len, self._parts.values())) + self.overflowed

    def check_columns(self, named: Mapping[str, nn.Parameter]) -> None:
        """Raise where rows are lost, of other parameters, or of the same at other values."""
        again = "; drop them with discard() and add them anew"
        check(not self.torn, f"an error or an interrupt left rows half added{again}")
        if not self:
            return
        other = [name for name, p in self._columns.items() if named.get(name) is not p]
        other += [name for name in named if name not in self._columns]
        check(
            not other,
            f"rows were added before {', '.join(other[:3])} was frozen, unfrozen or replaced"
            + again,
        )
        if self._values is None:
            return
        pairs = zip(self._columns, self._values, _values(named.values()), strict=True)
        moved = [name for name, before, now in pairs if not _are_same(before, now)]
        check(
            not moved,
            f"{', '.join(moved[:3])} moved after rows were added, which are of the model as it "
            f"was{again}",
        )

    def take(
        self,
        passes: Passes,
        batches: Sequence[dict[str, Any]],
        columns: Mapping[str, nn.Parameter],
        overflows: bool = False,
    ) -> None:
        """Make and add the rows of batches, which are `torn` until `settle`.

        An error leaves what was added before.

        Args:
            columns: the parameters, as they are between passes.
            overflows: rows or losses that are not finite are noted, and raise nothing.
        """
        self.torn = True
        self._fold()
        self.torn = False
        new = Added(self.hold)
        try:
            for k, parts in enumerate(batches):
                if k > 0:
                    new._fold()
                for each in passes.of(parts):
                    new._add(each)
                    cut = each.cut
                    del each  # folded, it holds nothing while the next one is made
                    if cut:
                        new._fold()
        except NonFiniteError:
            if not overflows:
                raise
            self.torn = self.overflowed = True
        else:
            self._join(new)
        self._columns = dict(columns)
        self._values = _values(self._columns.values()) if passes.adds else None

    def settle(self) -> None:
        """What was taken is whole, and so is what goes with it."""
        self.torn = False

    def _add(self, made: Pass) -> None:
        bent = made.jacobian.bent if isinstance(made.jacobian, FactoredJacobian) else []
        for part, known in made.parts.items():
            names = [*(bent if known.summed else ()), made.bent.get(part, "")]
            self._note(part, [known], ", ".join(filter(None, dict.fromkeys(names))))
        self._last.append(made)

    def _note(self, part: str, found: Sequence[Part], bent: str) -> None:
        known = [*self._parts.get(part, ()), *found]
        bent = self._bent.get(part) or bent
        for each in known:
            _check_shapes(part, known[0], each)
        _check_straight(part, known, bent)
        self._parts[part], self._bent[part] = known, bent

    def _fold(self) -> None:
        """Sum the last passes' rows that are means, and make those of samples small."""
        while self._last:
            made, first = self._last[0], 0
            for part, known in made.parts.items():
                jacobian = made.jacobian
                if isinstance(jacobian, FactoredJacobian):
                    jacobian = rows_of(jacobian, first, known.rows)
                first += known.rows
                if known.summed:
                    if part not in self._sums:
                        self._sums[part] = _sums(jacobian)
                    self._sums[part].add(cast(Any, jacobian), known.total / made.scale)
                    continue
                if isinstance(jacobian, FactoredJacobian):
                    jacobian = held(jacobian, self.hold)
                self._samples.append(Pass(jacobian, {part: known}, made.scale))
            del self._last[0]

    def _join(self, new: "Added") -> None:
        before = dict(self._parts), dict(self._bent)
        self.torn = True
        try:
            for part, found in new._parts.items():
                self._note(part, found, new._bent[part])
        except BaseException:
            self._parts, self._bent = before
            self.torn = False
            raise
        self._last = new._last
        self._samples += new._samples
        for part, sums in new._sums.items():
            if part in self._sums:
                self._sums[part].add(cast(Any, sums.jacobian()), 1.0)
            else:
                self._sums[part] = sums

    def summary(self) -> Summary:
        """What other ranks need to know of it."""
        parts = {
            part: [each._replace(losses=each.losses.detach().cpu()) for each in found]
            for part, found in self._parts.items()
        }
        made = [each.jacobian.reached or [] for each in (*self._samples, *self._last)]
        made += [each.reached for each in self._sums.values()]
        reached = [any(each) for each in zip_longest(*made, fillvalue=False)]
        return Summary(parts, self._bent, self.overflowed, reached)

    def collected(
        self,
        rule: Rule,
        columns: tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]],
        ranks: Group,
        every: Sequence[Summary],
        stand_ins: Mapping[str, nn.Parameter] | None = None,
        split: Group | None = None,
    ) -> Collected:
        """All rows, in the order of `ROLES`. What was added is given away.

        Args:
            rule: that the rows are for.
            columns: the model's parameters, and others that the losses may depend on.
            ranks: who has rows; those of one batch come in the order of the ranks.
            every: what each has.
            stand_ins: of the model's parameters, whole, where ranks have shards of them.
            split: ranks that each have all samples, and shards of parameters.
        """
        named, outside = columns
        if ranks:
            known = _of_all(every, ranks)
        else:  # losses stay on their device
            known = {part: self._parts[part] for part in ROLES if part in self._parts}
        counts = {
            part: found[0].rows if found[0].summed else sum(each.rows for each in found)
            for part, found in known.items()
        }
        starts = dict(zip(counts, accumulate(counts.values(), initial=0), strict=False))
        for part, found in known.items():
            if not found[0].summed:
                before = (one.parts.get(part, ()) for one in every[: ranks.rank])
                starts[part] += sum(each.rows for parts in before for each in parts)
        jacobians, ids, factors = self._in_order(known, starts)
        self._sums, self._samples, self._last = {}, [], []
        whole = _whole(jacobians, {**named, **(stand_ins or {}), **outside})
        others = None
        m, reached = sum(counts.values()), list(whole.reached or [])
        if ranks:
            none = [False] * (len(named) + len(outside))
            theirs = (one.reached for one in every)
            reached = [any(each) for each in zip_longest(none, *theirs, fillvalue=False)]
        if isinstance(whole, FactoredJacobian) and outside:
            whole, others = _apart(whole, rule, list(outside), reached)
            reached = reached[: len(named)]

        def rows(jacobian: Stored, used: Sequence[bool]) -> Stored | SummedRows | RanksJacobian:
            if ranks:
                real = [{**named, **outside}[name] for name in jacobian.names]
                return RanksJacobian(jacobian, ranks, ids, factors, m, used, real)
            sums = torch.zeros(m, len(ids), dtype=torch.float64, device="cpu")
            sums[ids, torch.arange(len(ids), device="cpu")] = factors
            plain = torch.equal(sums, torch.eye(m, dtype=sums.dtype, device="cpu"))
            if split is not None and isinstance(jacobian, FactoredJacobian):
                real = [{**named, **outside}[name] for name in jacobian.names]
                jacobian = cast(Any, TensorJacobian(jacobian, real, split))
            return jacobian if plain else SummedRows(jacobian, sums)

        losses = [each.losses.detach() for found in known.values() for each in found]
        beside = None if others is None else rows(others, [True] * len(others.names))
        made = rows(whole, reached)
        return Collected(made, counts, known, Leaving(losses), reached, cast(Any, beside))

    def _in_order(
        self, known: Mapping[str, Sequence[Part]], starts: dict[str, int]
    ) -> tuple[list[Stored], Tensor, Tensor]:
        """All that rows are made of, and of each the row that it adds to, and how often."""
        sizes = {part: sum(len(each.losses) for each in found) for part, found in known.items()}
        totals = {part: sum(each.total for each in found) for part, found in known.items()}
        for part, total in totals.items():
            check(total > 0, f"weights of losses: those of {part} sum to zero")
        jacobians: list[Stored] = []
        rows: list[int] = []
        factors: list[Tensor] = [ONE[:0]]

        def note(part: str, count: int, weights: Tensor) -> None:
            rows.extend(range(starts[part], starts[part] + count))
            factors.append(weights.expand(count))

        for part, each in self._sums.items():
            jacobians.append(each.jacobian())
            note(part, jacobians[-1].m, ONE / totals[part])
        for made in (*self._samples, *self._last):
            jacobians.append(made.jacobian)
            for part, each in made.parts.items():
                share = (each.total if each.summed else sizes[part]) / totals[part] / made.scale
                note(part, each.rows, share * (ONE if each.summed else each.shares))
                if not each.summed:
                    starts[part] += each.rows
        return jacobians, torch.tensor(rows, dtype=torch.int64, device="cpu"), torch.cat(factors)


def _of_all(every: Sequence[Summary], ranks: Group) -> dict[str, list[Part]]:
    """What all ranks added, in their order."""
    known: dict[str, list[Part]] = {}
    for part in ROLES:
        found = [each for one in every for each in one.parts.get(part, ())]
        if not found:
            continue
        known[part] = found
        for rank, one in enumerate(every):
            for each in one.parts.get(part, ()):
                _check_shapes(part, found[0], each, f" on {ranks.name(rank)}")
        bent = next((one.bent[part] for one in every if one.bent.get(part)), "")
        _check_straight(part, found, bent)
    return known


def _check_shapes(part: str, first: Part, other: Part, where: str = "") -> None:
    shapes = [f"[B{''.join(f', {n}' for n in p.losses.shape[1:])}]" for p in (first, other)]
    check(
        shapes[0] == shapes[1],
        f"loss must return losses of one shape for {part}, got {shapes[0]} and {shapes[1]}{where}",
    )


def _check_straight(part: str, passes: Sequence[Part], bent: str) -> None:
    what = f"a row of {part} is a sum over" if passes[0].summed else f"{part} is taken in"
    check(
        len(passes) == 1 or not bent,
        f"{bent}: a hook or a Function is not linear in its gradient, or makes something else of "
        f"samples taken together, and {what} several passes; take whole batches",
    )


def _whole(jacobians: Sequence[Stored], columns: Mapping[str, nn.Parameter]) -> Stored:
    """All of them as one; rows of no sample where there are none."""
    if len(jacobians) > 1:
        return concat(cast(Any, jacobians))
    if jacobians:
        return jacobians[0]
    parameters = list(columns.values())
    none = parameters[0].detach().new_zeros(0)
    return FactoredJacobian(list(columns), parameters, 0, none, [[] for _ in parameters])


def _values(parameters: Iterable[nn.Parameter]) -> list[tuple[int, Tensor]]:
    """Versions and norms, for fused optimizers and `.data` change no version."""
    each = list(map(local, parameters))
    with torch.no_grad():
        norms = torch.ops.aten._foreach_norm(each)
    return [(p._version, norm) for p, norm in zip(each, norms, strict=True)]


def _are_same(before: tuple[int, Tensor], now: tuple[int, Tensor]) -> bool:
    if now[0] != before[0] or before[1].dtype != now[1].dtype:
        return False
    return bool((before[1] == now[1]) | (before[1].isnan() & now[1].isnan()))


ONE = torch.ones(1, dtype=torch.float64, device="cpu")


def _apart(
    jacobian: FactoredJacobian, rule: Rule, outside: Sequence[str], reached: Sequence[bool]
) -> tuple[FactoredJacobian, FactoredJacobian | None]:
    """The model's columns, and those outside that the losses depend on, of those `reached`."""
    own = len(jacobian.names) - len(outside)
    more = [k for k in range(own, len(reached)) if reached[k]]
    if more:
        check_outside(rule, "captured", [jacobian.names[k] for k in more])
    return jacobian.columns(range(own)), jacobian.columns(more) if more else None


def _sums(like: Stored) -> Sums | DenseSums:
    return Sums(like) if isinstance(like, FactoredJacobian) else DenseSums(like)


def _mean(parts: Sequence[Part]) -> Tensor:
    """Of the losses of all samples, [], or of their [B, tasks], [tasks]."""
    losses = torch.cat([each.losses for each in parts])
    if all(each.weights is None for each in parts):
        return losses.mean(0)
    weights = torch.cat([each.shares for each in parts]).to(losses.device)
    return weights @ losses.double() / weights.sum()


def _row_losses(parts: Sequence[Part]) -> Tensor:
    """[rows]: those of samples, or the means that rows are of."""
    if not parts[0].summed:
        return torch.cat([each.losses for each in parts])
    means = _mean(parts)
    return means if means.shape == (parts[0].rows,) else means.mean().reshape(1)
