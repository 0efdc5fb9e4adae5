"""Planes whose tokens are of one shape: a GPU multiplies them in one launch for all of them.

A model of many layers has few shapes. A launch costs the host some microseconds, as much as a GPU
needs for the Gramian of a small plane. A CPU takes one plane after another.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gradsurgery.capture.convolution import ConvolutionUse, token_sides
from gradsurgery.capture.paths import to_rows
from gradsurgery.capture.plane import Plane, one_matrix
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.uses import MatrixUse
from gradsurgery.ops._inputs import wide_dtype
from gradsurgery.ops.combine_tokens import combine_tokens_of
from gradsurgery.ops.formed_gramian import formed_gramians
from gradsurgery.ops.token_gramian import token_gramians

PRODUCTS = 1 << 22  # of blocks with blocks, that are held before those of a row are added up
SMALL = 1 << 22  # values of a plane: the sum of a larger one fills a GPU by itself


class Sides(NamedTuple):
    """What a plane's rows are products of, and the row whose plane is kept beside them."""

    use: MatrixUse | ConvolutionUse
    kept: int | None = None
    formed: bool = False  # whether planes are formed, not tokens multiplied

    @property
    def key(self) -> Hashable:
        """What planes of one launch have in common."""
        use = self.use
        more = (use.shape, use.geometry) if isinstance(use, ConvolutionUse) else ()
        known = [(side.shape, side.stride(), side.dtype, side.device) for side in use.values]
        return self.kept, self.formed, id(use.rows), *more, *known

    @property
    def most(self) -> int:
        """How many such planes a launch takes, for the memory of their products and patches."""
        most = max(1, PRODUCTS // (self.use.n + 1) ** 2)
        if isinstance(self.use, ConvolutionUse):
            most = min(most, max(1, self.use.made // self.use.n))
        return most


def gramians(planes: Sequence[Plane], m: int) -> list[Tensor]:
    """Of each plane's rows, [m, m] float64, as `Plane.gramian` has it."""
    found = [torch.empty(0)] * len(planes)
    # by row numbers: of some planes, by their places, the products of blocks, [planes, n, n]
    waiting: dict[Hashable, list[tuple[list[int], Tensor, RowNumbers]]] = {}
    held = 0

    def add_up() -> None:
        """The blocks of each row, of all shapes that have the same rows."""
        for known in waiting.values():
            totals = [total for _, total, _ in known]
            total = totals[0] if len(totals) == 1 else torch.cat(totals)
            places = [k for ks, *_ in known for k in ks]
            for k, gram in zip(places, to_rows(total, known[0][2], m), strict=True):
                found[k] = gram
        waiting.clear()

    for all_ks, all_sides in _alike(planes, _multiplied):
        if not all_sides:
            (k,) = all_ks
            found[k] = planes[k].gramian(m, None)
            continue
        step = all_sides[0].most
        for lo in range(0, len(all_sides), step):
            ks, sides = all_ks[lo : lo + step], all_sides[lo : lo + step]
            total, rows = _products(sides, [planes[k] for k in ks])
            waiting.setdefault(id(rows), []).append((ks, total, rows))
            held += total.numel()
            if held > PRODUCTS:
                add_up()
                held = 0
    add_up()
    return found


def sums(planes: Sequence[Plane], weights: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Of some planes, by their place here, w^T J [H, W]; those that take one launch together."""
    for ks, sides in _alike(planes, _small):
        if len(ks) == 1:
            continue
        uses = [cast(MatrixUse, each.use) for each in sides]
        dtype = wide_dtype(uses[0].left.dtype)
        out = [use.left.new_empty(use.plane, dtype=dtype) for use in uses]
        shared = all(weights[k].data_ptr() == weights[ks[0]].data_ptr() for k in ks)
        picked = [use.rows.pick(weights[k], torch.float64) for k, use in zip(ks, uses, strict=True)]
        mine = picked[0].expand(len(ks), -1) if shared else torch.stack(picked)
        combine_tokens_of(*_lists(sides), mine, out)
        yield from zip(ks, out, strict=True)


def _alike(
    planes: Sequence[Plane], sides_of: Callable[[Plane], Sides | None]
) -> Iterator[tuple[list[int], list[Sides]]]:
    """Planes by their places, with those that go with them; alone where there are no sides."""
    found: dict[Hashable, tuple[list[int], list[Sides]]] = {}
    for k, plane in enumerate(planes):
        sides = sides_of(plane) if plane.parameter.is_cuda else None
        ks, known = found.setdefault(k if sides is None else sides.key, ([], []))
        ks.append(k)
        known += [] if sides is None else [sides]
    yield from found.values()


def _lists(sides: Sequence[Sides]) -> tuple[list[Tensor], list[Tensor]]:
    uses = [each.use for each in sides]
    if isinstance(uses[0], ConvolutionUse):
        return token_sides(cast(list[ConvolutionUse], uses))
    matrices = cast(list[MatrixUse], uses)
    return [use.left for use in matrices], [use.right for use in matrices]


def _multiplied(plane: Plane) -> Sides | None:
    """What the Gramian of a plane is multiplied of, where it is the tokens of one use."""
    if plane.formed is not None:
        return Sides(plane.formed, plane.group if plane.parts[1] else None, True)
    plan = plane.plan
    if plan is None or plan.path != "factored" or plan.cross == "tokens":
        return None
    own, summed = plane.parts
    (use, *others) = own or [None]
    if others or not (isinstance(use, ConvolutionUse) and use.geometry.groups == 1):
        use = one_matrix(own)
    if use is None or not (use.n and use.tokens):
        return None
    return Sides(cast(Any, use.wide()), plane.group if summed else None)


def _small(plane: Plane) -> Sides | None:
    """What a small update is the sum of, where it is the tokens of one use."""
    use = one_matrix(plane.uses)
    if use is None or plane.kept is not None or plane.parameter.numel() > SMALL:
        return None
    dtypes = {wide_dtype(tensor.dtype) for tensor in (*use.values, plane.parameter)}
    return Sides(cast(Any, use.wide())) if use.n and use.tokens and len(dtypes) == 1 else None


def _products(sides: Sequence[Sides], planes: Sequence[Plane]) -> tuple[Tensor, RowNumbers]:
    """Of planes that go together, the products of blocks, [planes, n, n], and the rows' numbers.

    The kept plane of each is one block more, the last.
    """
    first = sides[0]

    def kept() -> list[Tensor] | None:
        return None if first.kept is None else [plane.group_plane() for plane in planes]

    if first.formed:
        total = formed_gramians(*_lists(sides), kept())
    else:
        total = token_gramians(*_lists(sides))  # and patches are gone before planes are there
        summed = kept()
        total = total if summed is None else _bordered(total, [s.use for s in sides], summed)
    rows = first.use.rows
    return total, rows if first.kept is None else rows.join(planes[0].parts[1][0].rows.ids)


def _bordered(
    total: Tensor, uses: Sequence[MatrixUse | ConvolutionUse], kept: Sequence[Tensor]
) -> Tensor:
    """Products of tokens with those of the kept plane of each as one row more, the last."""
    out = total.new_zeros(len(total), total.shape[1] + 1, total.shape[2] + 1)
    out[:, :-1, :-1] = total
    cross = torch.stack([use.products(each) for use, each in zip(uses, kept, strict=True)])
    out[:, :-1, -1] = out[:, -1, :-1] = cross
    norms = torch.ops.aten._foreach_norm(kept, 2, torch.float64)
    out[:, -1, -1] = torch.stack(norms).square_()
    return out
