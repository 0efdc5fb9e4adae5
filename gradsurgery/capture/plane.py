"""One parameter's rows: the path to their Gramian, and their weighted sum."""

import math
import operator
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor

from gradsurgery.capture.convolution import ConvolutionUse
from gradsurgery.capture.paths import direct, embedded, factored, same_dtype, stored
from gradsurgery.capture.planner import Plan, Work, device_of, plan
from gradsurgery.capture.ranges import SCALED, SQUARES, in_range, magnitudes, within
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.tokens import TokenUse
from gradsurgery.capture.uses import EmbeddingUse, MatrixUse, RowsUse, Use, scale
from gradsurgery.ops._inputs import wide, wide_dtype
from gradsurgery.ops.formed_gramian import PLANES

PRODUCTS = (MatrixUse, ConvolutionUse, TokenUse)
FORMED_ON = {"cuda"}  # where `_formed` pays: a CPU launches nothing


class Plane:
    """One parameter, seen as a plane [H, W], and the uses that hold its rows.

    Where many samples are summed into one row, `group`, that row's gradient is formed once, as an
    ordinary weight gradient, and ends in `.grad`: the kept plane. Where the row came as such, from
    a backward pass of its own, that use is `whole`, and its block is the kept plane.
    """

    def __init__(self, parameter: Tensor, uses: list[Use], group: int | None) -> None:
        uses = [use for use in uses if use.n] or uses[:1]  # kernels take no empty ones
        self.parameter, self.uses = parameter, like_the_others(_formed(uses))
        self.whole = _whole(self.uses)
        self.group = group if self.whole is None else int(self.whole.rows.tensor)
        self.kept: Tensor | None = None  # [H, W], the row `group`
        # rows that all exist are multiplied as they are: nothing to plan
        self.plan = None if all(isinstance(use, RowsUse) for use in self.uses) else self._plan()

    def _plan(self) -> Plan:
        # blocks of different uses differ in tokens; they count as so many of the longest
        longest = 1
        # tokens of rows of their own and of `group`, of products and of embeddings
        counts = {False: [0, 0], True: [0, 0]}
        for use in self.uses:
            if use is self.whole:
                continue
            tokens = use.tokens if isinstance(use, (*PRODUCTS, EmbeddingUse)) else 1
            most = use.longest(self.group) if isinstance(use, TokenUse) else tokens
            longest = max(longest, most)
            inside = len(use.rows.split(self.group)[1].rows) if self.group is not None else 0
            count = counts[isinstance(use, EmbeddingUse)]
            count[0] += (use.n - inside) * tokens
            count[1] += inside * tokens
        device = device_of(self.parameter)
        own, summed = (-(-count // longest) for count in counts[False])
        height, width = self.uses[0].plane
        kept = self.whole is not None
        uses = [use for use in self.uses if use is not self.whole]
        alone = one_matrix(uses) is None
        work = Work(height, width, longest, own, summed, kept, device, *counts[True], alone=alone)
        return plan(work, _are_products(uses, device))

    @cached_property
    def parts(self) -> tuple[list[Use], list[Use]]:
        """The blocks of other rows, and those of the row whose plane is kept."""
        if self.whole is not None:
            return [use for use in self.uses if use is not self.whole], [self.whole]
        if self.plan is None or self.plan.cross == "none" or self.group is None:
            return self.uses, []
        own, summed = [], []
        for use in self.uses:
            outside, inside = use.rows.split(self.group)
            for into, (blocks, rows) in ((own, outside), (summed, inside)):
                if len(rows):
                    into.append(use.select(blocks, rows))
        return own, summed

    @cached_property
    def formed(self) -> MatrixUse | None:
        """The tokens whose planes a GPU forms and multiplies, where each block is a row."""
        if self.plan is None or self.plan.path != "direct" or not self.parameter.is_cuda:
            return None
        use = one_matrix(self.parts[0])
        if use is None or not use.rows.distinct:
            return None
        return use if use.n and use.tokens and math.prod(use.plane) else None

    def _combined(
        self,
        uses: Sequence[Use],
        weights: Tensor,
        precise: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """[H, W]; fresh memory costs most when it is first written, so it is written once."""
        alone = None if precise or out is not None else self._summed_alone(uses)
        if isinstance(alone, ConvolutionUse):
            return alone.total(_picked(alone, weights, alone.grads))
        if out is None or precise:
            dtype = torch.float64 if precise else wide_dtype(self.parameter.dtype)
            out = self.parameter.new_empty(self.uses[0].plane, dtype=dtype)
        for k, use in enumerate(uses):
            use = use.double() if precise else use.wide()
            use.combine(_picked(use, weights, out), out, beta=1 if k else 0)
        return out

    def group_plane(self) -> Tensor:
        """The kept plane, [H, W]; formed when it is first asked for."""
        if self.kept is None and self.whole is not None:
            self.kept = wide(self.whole.blocks).reshape(self.whole.plane).contiguous()
        if self.kept is None:
            assert self.group is not None
            use = self._summed_alone(self.parts[1])
            if use is not None:  # a product, and nothing else
                self.kept = use.total()
                return self.kept
            # all blocks of that row count once; weights are looked up by row, so up to its number
            ones = torch.ones(self.group + 1, device=self.parameter.device)
            self.kept = self._combined(self.parts[1], ones)
        return self.kept

    def _summed_alone(self, uses: Sequence[Use]) -> MatrixUse | ConvolutionUse | None:
        """On a GPU, the only use, whose sum is one product and what that returns."""
        if not self.parameter.is_cuda:
            return None
        use = uses[0].wide() if len(uses) == 1 else None
        known = isinstance(use, ConvolutionUse)
        if known and use.grads.dtype == wide_dtype(self.parameter.dtype):
            return use
        return one_matrix(uses)

    def _group(self, precise: bool) -> tuple[RowNumbers, Tensor] | None:
        if self.group is None or not self.parts[1]:
            return None
        kept = self.group_plane()
        # as the paths take it: its number as that of one block, and its plane
        return self.parts[1][0].rows.ids, kept.double() if precise else kept

    @property
    def rows(self) -> list[RowsUse]:
        """The rows, where they exist and a kernel takes them as they are."""
        uses = [use for use in self.uses if isinstance(use, RowsUse)]
        return uses if len(uses) == len(self.uses) and same_dtype(uses) else []

    def gramian(self, m: int, metric: Tensor | None, precise: bool = False) -> Tensor:
        """[m, m] float64; `precise` multiplies in float64, too."""
        if metric is not None:
            metric = metric.reshape(self.uses[0].plane)
            metric = metric.double() if precise else metric
        ready = operator.methodcaller("double" if precise else "wide")
        if self.plan is None:
            return stored([cast(RowsUse, ready(use)) for use in self.uses], m, metric)
        if not self.uses[0].n:
            return torch.zeros(m, m, dtype=torch.float64, device=self.parameter.device)
        own, summed = (list(map(ready, part)) for part in self.parts)
        group = self._group(precise)
        # a metric weighs elements of planes, which products of tokens never see
        if self.plan.path == "factored" and metric is None:
            tokens = summed if self.plan.cross == "tokens" else ()
            return factored(_products(own), m, group, _products(tokens))
        # lines of an embedding's table that no token picked are zero: they are left out
        if own and all(isinstance(use, EmbeddingUse) for use in own):
            return embedded([cast(EmbeddingUse, use) for use in own], m, group, metric)
        return direct([_best(use) for use in own], m, group, metric)

    def bounds(self, metric: Tensor | None) -> tuple[float, float] | None:
        """Squared norms outside of which products may be lost; None if they never are.

        Planes and rows that exist are multiplied in any range, but for those `formed`.
        """
        formed = metric is None and self.formed is not None
        if not formed and metric is None and (self.plan is None or self.plan.path != "factored"):
            return None
        values = (tensor for use in self.uses for tensor in use.values)
        if all(tensor.dtype in (torch.float64, torch.int64) for tensor in values):
            return None
        return PLANES if formed else SQUARES if metric is None else SCALED

    def in_range(self, gram: Tensor, m: int, metric: Tensor | None) -> Tensor:
        """The Gramian, in float64 if float32 lost some of it. Waits for a GPU."""
        bounds, squares = self.bounds(metric), gram.diagonal().cpu()
        rows = None if bounds is None else ~within(squares, bounds)
        if rows is None or not bool(rows.any()):
            return gram
        # norms out of range are a sign only: the tokens themselves say if values were lost
        any_value = bounds != SQUARES
        lost = not bool(squares.isfinite().all()) or self._lost(rows, any_value)
        return self.gramian(m, metric, precise=True) if lost else gram

    def _lost(self, rows: Tensor, any_value: bool) -> bool:
        """Whether some rows, of those marked in [m], have values that float32 lost, or any."""
        kept = self.group if self.parts[1] else None
        for use in self.uses:
            mine = rows[use.rows.tensor].nonzero().flatten()
            if len(mine) == 0:
                continue
            part = use.select(mine)
            exists = isinstance(use, RowsUse) or (
                kept is not None and bool((part.rows.tensor == kept).any())
            )
            if exists or any_value:  # a plane that exists was multiplied with two sides' tokens
                if any(bool((size != 0).any()) for size in magnitudes(part)):
                    return True
            elif not all(in_range(tokens) for tokens in _products([part])):
                return True
        return False

    def update(
        self,
        weights: Tensor,
        add: bool,
        release: bool,
        far: bool = False,
        exact: bool = False,
        beta: float | None = None,
    ) -> Tensor:
        """w^T J, [*p.shape]. To `add` it to `.grad` is to give the kept plane away.

        `release`: what a backward pass made may be given away too: no row is asked for again.
        `far`: some weights are far from 1, and it is looked whether float32 holds their products.
        `exact`: in the dtype it was summed in.
        `beta`: the weight of the row `group`, where the host knows it.
        """
        if not self.uses[0].n:
            return torch.zeros_like(self.parameter.detach())
        out = self._sum(weights, add, release, far, beta=beta)
        out = out.view(self.parameter.shape)
        return out if exact else out.to(self.parameter.dtype)

    def _sum(
        self,
        weights: Tensor,
        add: bool,
        release: bool,
        far: bool,
        into: Tensor | None = None,
        beta: float | None = None,
    ) -> Tensor:
        """The same as a plane [H, W], in `into` where it has to be formed."""
        if far and not all(
            in_range(use, weights[use.rows.on(weights.device)]) for use in self.uses
        ):
            return self._combined(self.uses, weights, precise=True)
        if self.plan is not None and self.whole is not None:
            self.group_plane()
        if self.kept is None:
            out = self._combined(self.uses, weights, out=into)
        else:
            mine = self.whole is None or self.kept.dtype != self.whole.blocks.dtype
            # the plane becomes `.grad` without a copy. That which came from a pass may be another
            # Jacobian's too, so it is given away only if nothing is asked of this one again
            give = release or (add and mine)
            out = self.kept if give else self.kept.clone()
            if give:
                self.kept = None  # before it is scaled: what interrupts that leaves no half of it
            if beta is None and out.is_cuda:
                out *= weights[self.group].to(out.dtype)  # without waiting for the weight
                beta = 1
            elif beta is None:
                beta = float(weights[self.group])
            for use in self.parts[0]:
                use.wide().combine(_picked(use, weights, out), out, beta)
                beta = 1
            scale(out, beta)
        return out


class Made(NamedTuple):
    """The Gramian of one parameter's rows."""

    plane: Plane
    metric: Tensor | None
    gram: Tensor  # [m, m]


def squares(made: Sequence[Made]) -> dict[tuple[float, float], Tensor]:
    """The squared norms that say if float32 held all products, by the bounds they are within."""
    at = [(each.gram.diagonal(), each.plane.bounds(each.metric)) for each in made]
    found = {
        wanted: [diagonal for diagonal, bounds in at if bounds == wanted]
        for wanted in (SQUARES, SCALED, PLANES)
    }
    return {bounds: torch.stack(each) for bounds, each in found.items() if each}


def _picked(use: Use, weights: Tensor, out: Tensor) -> Tensor:
    """The weights of a use's blocks; on a GPU gathered and rounded once for many parameters."""
    if weights.is_cuda:
        return use.rows.pick(weights, out.dtype)
    return weights[use.rows.on(weights.device)]


def one_matrix(uses: Sequence[Use]) -> MatrixUse | None:
    """The only use, where its blocks are sums over tokens, [n, T, .]."""
    use = uses[0] if len(uses) == 1 else None
    return use if type(use) is MatrixUse and use.left.dim() == 3 else None


def _formed(uses: list[Use]) -> list[Use]:
    """On a GPU, planes much smaller than their tokens as rows that exist, as those of LoRA are.

    The rows of all parameters are then multiplied at once, and no parameter waits for launches of
    its own.
    """
    products = [use for use in uses if isinstance(use, (MatrixUse, ConvolutionUse))]
    if not products or not all(map(_much_smaller, products)):
        return uses
    if len(products) + sum(isinstance(use, RowsUse) for use in uses) < len(uses):
        return uses
    kinds = MatrixUse, ConvolutionUse
    return [use.formed() if isinstance(use, kinds) else use.wide() for use in uses]


def _much_smaller(use: MatrixUse | ConvolutionUse) -> bool:
    """Whether the planes of a GPU's blocks have half the values of what they are products of."""
    if isinstance(use, ConvolutionUse):
        held, whole = sum(side.numel() for side in use.values), use.geometry.groups == 1
    else:
        held, whole = use.n * use.tokens * sum(use.plane), use.left.dim() == 3
    on_gpu = device_of(use.values[0]) in FORMED_ON
    return on_gpu and whole and 2 * use.n * math.prod(use.plane) <= held


def like_the_others(uses: list[Use]) -> list[Use]:
    """Rows that exist are seen as planes of the others' height and width."""
    plane = next((use.plane for use in uses if not isinstance(use, RowsUse)), None)
    if plane is None or all(use.plane == plane for use in uses):
        return uses
    return [use.viewed(plane) if isinstance(use, RowsUse) else use for use in uses]


def _whole(uses: Sequence[Use]) -> RowsUse | None:
    """A row that exists beside rows that do not."""
    found = [use for use in uses if isinstance(use, RowsUse)]
    if len(found) != 1 or found[0].n != 1 or len(uses) == 1:
        return None
    row = found[0].rows.tensor
    beside = [use for use in uses if use is not found[0]]
    return None if any(bool((use.rows.tensor == row).any()) for use in beside) else found[0]


def _are_products(uses: Sequence[Use], device: str) -> bool:
    """Whether `factored` takes them."""
    picked = [use for use in uses if isinstance(use, EmbeddingUse)]
    others = [use for use in uses if not isinstance(use, EmbeddingUse)]
    if not others:  # a GPU has a kernel for them; elsewhere, they are few rows
        return device == "cuda"
    if not picked:
        return all(isinstance(use, PRODUCTS) and _of_one(use) for use in others)
    return all(isinstance(use, MatrixUse) and use.left.dim() == 3 for use in others)


def _of_one(use: Use) -> bool:
    return not isinstance(use, TokenUse) or use.matrices == 1


def _best(use: Use) -> Use:
    if isinstance(use, ConvolutionUse):
        return use.best()
    return use.blocks()[0] if isinstance(use, TokenUse) and use.matrices == 1 else use


def _products(uses: Sequence[Use]) -> list[MatrixUse | EmbeddingUse]:
    made = []
    for use in uses:
        if isinstance(use, ConvolutionUse):
            use = use.matrices()
        elif isinstance(use, TokenUse):
            use = use.blocks()[0]
        made.append(cast(MatrixUse | EmbeddingUse, use))
    return made
