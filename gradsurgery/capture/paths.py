"""The ways to the Gramian of one parameter's rows, [m, m] float64.

None forms rows that do not exist, but for slices of them.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gradsurgery.capture.row_numbers import RowNumbers, index_of
from gradsurgery.capture.uses import EmbeddingUse, MatrixUse, RowsUse, Use
from gradsurgery.ops._inputs import wide
from gradsurgery.ops.formed_gramian import formed_gramian
from gradsurgery.ops.gramian import gramian_of_parts, gramian_unchecked
from gradsurgery.ops.token_gramian import token_gramian

# a CPU's stay in its cache; of so small ones, a GPU would do nothing but begin
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}
PICKED = 1 << 24  # products of tokens with picked tokens at a time


def chunk(device: str) -> int:
    """Values of all rows' slices that are formed at a time, on a device of this type."""
    return _CHUNK.get(device, _CHUNK["cpu"])


def to_rows(blocks: Tensor, rows: RowNumbers, m: int) -> Tensor:
    """Sums [..., n, n] over the blocks of each row, [..., m, m]."""
    if len(rows) == m and rows.distinct:
        return blocks
    index, of = rows.on(blocks.device), blocks.shape[:-2]
    half = blocks.new_zeros(*of, m, len(index)).index_add_(-2, index, blocks)
    return blocks.new_zeros(*of, m, m).index_add_(-1, index, half)


def direct(
    uses: Sequence[Use], m: int, group: tuple[RowNumbers, Tensor] | None, metric: Tensor | None
) -> Tensor:
    """Forms slices of all rows' planes, multiplies them, drops them.

    `group`: a row that sums many samples, [1], and its plane [H, W].
    """
    ids, index = index_of([use.rows for use in uses])
    rows = ids if group is None else ids.join(group[0])
    kept = None if group is None else group[1]
    matrices = [use for use in uses if isinstance(use, MatrixUse) and use.left.dim() == 3]
    if metric is None and 0 < len(matrices) == len(uses):
        left, right = [use.left for use in matrices], [use.right for use in matrices]
        positions = [each.tensor for each in index]
        return to_rows(formed_gramian(left, right, positions, len(ids), kept), rows, m)
    like = wide((uses[0].values[-1] if kept is None else kept)[:0])
    height, width = uses[0].plane if kept is None else kept.shape
    count = len(rows)
    total = torch.zeros(count, count, dtype=torch.float64, device=like.device)
    if height == 0 or width == 0 or count == 0:
        return torch.zeros(m, m, dtype=torch.float64, device=like.device)
    # as many lines at a time as fit the buffer for all rows, cut where each use can be cut
    grain = math.lcm(*(use.grain for use in uses))
    step = max(1, chunk(like.device.type) // max(1, count * width * grain)) * grain
    buffer = like.new_empty(count * min(step, height) * width)
    for lo in range(0, height, step):
        hi = min(lo + step, height)
        out = buffer[: count * (hi - lo) * width].view(count, hi - lo, width)
        own = out[: len(ids)]
        # the first use writes, so that the buffer need not be cleared; the others add
        for k, (use, where) in enumerate(zip(uses, index, strict=True)):
            (use.add_rows if k else use.write_rows)(own, where, lo, hi)
        if kept is not None:
            out[-1] = kept[lo:hi]
        if metric is not None:
            out *= metric[lo:hi].sqrt()  # on both sides of the product, so once in all
        total += gramian_unchecked([out.view(count, -1)])
    return to_rows(total, rows, m)


def factored(
    uses: Sequence[MatrixUse | EmbeddingUse],
    m: int,
    group: tuple[RowNumbers, Tensor] | None = None,
    summed: Sequence[MatrixUse | EmbeddingUse] = (),
) -> Tensor:
    """Products of tokens on either side of the plane: ⟨G_i, G_j⟩ = sum_tu (l_t l_u) (r_t r_u).

    `group`: a row that sums many samples, [1], and its plane [H, W]; its products with the others
    come from the plane, or from the tokens of `summed` where they are given.
    """
    uses = merged(uses)
    n = sum(use.n for use in uses)
    if len(uses) == 1 and group is None:
        return to_rows(pairs_of(uses[0]), uses[0].rows, m)
    like = group[1] if group is not None else uses[0].values[-1]
    # a line for each block of all uses, in order, and for the group's row last; the lines of one
    # row are added up at the end
    size = n + (group is not None)
    total = torch.zeros(size, size, dtype=torch.float64, device=like.device)
    starts = list(accumulate((use.n for use in uses), initial=0))
    for a, use in enumerate(uses):
        mine = slice(starts[a], starts[a + 1])
        total[mine, mine] = pairs_of(use)
        for b, other in enumerate(uses[:a]):
            theirs = slice(starts[b], starts[b + 1])
            part = pairs_of(use, other)
            total[mine, theirs], total[theirs, mine] = part, part.mT
    rows = [use.rows for use in uses]
    if group is not None:
        for a, use in enumerate(uses):
            cross = total[starts[a] : starts[a + 1], -1]
            for other in merged(summed):
                cross += pairs_of(use, other).sum(1)
            if not summed:
                cross += use.products(group[1])
        total[-1, :-1] = total[:-1, -1]
        total[-1, -1] = gramian_unchecked([group[1].reshape(1, -1)])[0, 0]
        rows.append(group[0])
    return to_rows(total, rows[0].join(*rows[1:]), m)


def pairs_of(
    use: MatrixUse | EmbeddingUse, other: MatrixUse | EmbeddingUse | None = None
) -> Tensor:
    """Inner products of the blocks of a use with one another, or with those of another, [n, k]."""
    other_sides = () if other is None else _sides(other)
    if other is None or type(use) is type(other):
        return token_gramian(*_sides(use), *other_sides)
    if isinstance(use, EmbeddingUse):
        return pairs_of(other, use).mT
    assert isinstance(other, EmbeddingUse)
    # a token of an embedding meets that column of the left side which it picked
    ids, grads = other.indices.flatten(), wide(other.grads.flatten(0, 1))
    inside = ids >= 0
    ids, grads = ids.clamp(min=0), grads * inside[:, None]
    out = torch.zeros(use.n, other.n, dtype=torch.float64, device=grads.device)
    step = max(1, PICKED // max(1, use.tokens * len(ids)))
    for lo in range(0, use.n, step):
        left, right = use.left[lo : lo + step], use.right[lo : lo + step]
        picked = wide(left.flatten(0, 1).index_select(1, ids))
        pairs = wide(right).flatten(0, 1) @ grads.mT
        # lines divided by their size: products of small ones stay in float32's range
        sizes = power_of_two(picked), power_of_two(pairs)
        pairs = (pairs / sizes[1]) * (picked / sizes[0])
        sums = pairs.view(*left.shape[:2], other.n, -1).sum(3).double()
        sums *= (sizes[0].double() * sizes[1].double()).view(*left.shape[:2], 1)
        out[lo : lo + step] = sums.sum(1)
    return out


def power_of_two(lines: Tensor) -> Tensor:
    """One near the largest size in each line, [N, M] -> [N, 1]; 1 for zeros."""
    largest = lines.abs().amax(1, keepdim=True) if lines.shape[1] else lines.new_ones(len(lines), 1)
    exponent = torch.where(largest > 0, largest, 1).log2().floor()
    return exponent.clamp(-126, 126).exp2()


def _sides(use: MatrixUse | EmbeddingUse) -> tuple[Tensor, Tensor]:
    return (use.left, use.right) if isinstance(use, MatrixUse) else (use.indices, use.grads)


def merged(uses: Sequence[MatrixUse | EmbeddingUse]) -> list[MatrixUse | EmbeddingUse]:
    """Uses with equally many tokens in a block as one."""
    by_shape: dict[tuple, list[MatrixUse | EmbeddingUse]] = {}
    for use in uses:
        by_shape.setdefault((type(use), use.tokens, use.values[0].dim()), []).append(use)
    return [group[0] if len(group) == 1 else _together(group) for group in by_shape.values()]


def _together(uses: Sequence[MatrixUse | EmbeddingUse]) -> MatrixUse | EmbeddingUse:
    left, right = (torch.cat(sides) for sides in zip(*map(_sides, uses), strict=True))
    rows = RowNumbers(torch.cat([use.rows.tensor for use in uses]))
    if isinstance(uses[0], MatrixUse):
        return MatrixUse(left, right, rows)
    return EmbeddingUse(left, right, rows, uses[0].plane[0])


def same_dtype(uses: Sequence[RowsUse]) -> bool:
    """Whether a kernel takes them as they are."""
    return all(use.blocks.dtype == uses[0].blocks.dtype for use in uses)


def existing(planes: Sequence[Sequence[RowsUse]], m: int) -> Tensor:
    """Rows of several parameters that came in the same parts."""
    parts = list(zip(*planes, strict=True))
    gram = gramian_of_parts([[use.flat for use in part] for part in parts])
    rows = [part[0].rows for part in parts]
    return to_rows(gram, rows[0].join(*rows[1:]), m)


def stored(uses: Sequence[RowsUse], m: int, metric: Tensor | None) -> Tensor:
    """Rows that exist anyway."""
    if metric is None and sum(use.n for use in uses) <= 2 * m and same_dtype(uses):
        return existing([uses], m)
    ids, index = index_of([use.rows for use in uses])
    # one block for each row, in one tensor: products of many would grow with the square of them
    blocks = uses[0].blocks.new_zeros(len(ids), *uses[0].plane)
    for use, where in zip(uses, index, strict=True):
        use.add_rows(blocks, where, 0, use.plane[0])
    if metric is not None:
        blocks *= metric.sqrt()
    return to_rows(gramian_unchecked([blocks.flatten(1)]), ids, m)


def embedded(
    uses: Sequence[EmbeddingUse],
    m: int,
    group: tuple[RowNumbers, Tensor] | None,
    metric: Tensor | None,
) -> Tensor:
    """As `direct`, over the lines of the parameter that some token picked."""
    picked = torch.cat([use.indices.flatten() for use in uses]).unique()
    picked = picked[picked >= 0]
    compact = [use.compact(picked) for use in uses]
    part = None if metric is None else metric[picked]
    if group is None:
        return direct(compact, m, None, part)
    total = direct(compact, m, (group[0], group[1][picked]), part)
    # what the kept plane has in other lines meets no other row
    whole = group[1] if metric is None else group[1] * metric.sqrt()
    row = int(group[0].tensor)
    total[row, row] = gramian_unchecked([whole.reshape(1, -1)])[0, 0]
    return total
