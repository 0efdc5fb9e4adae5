"""What ranks tell each other of the rows of one parameter, and the way they choose for them.

A rank has the rows of its own samples, and the Gramian needs every pair. Seen as a plane [H, W],
with N tokens on all ranks, R rows and P ranks, there are two ways, chosen by count:

    rows   each rank forms slices of the planes of its own rows and deals them out by columns, so
           that it has 1/P of the columns of all rows: (R / P) H W (P - 1) / P values out of a rank
    tiles  each rank has a tile (H / a) x (W / b) of the plane, a b = P, and gets what tokens of
           all ranks have there: (N / P) (H / a + W / b) (P - 1) values out of a rank
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from gradsurgery.capture.planner import Work, plan
from gradsurgery.capture.uses import EmbeddingUse, MatrixUse, RowsUse, Use
from gradsurgery.ranks.kept import KeptUse

# multiplications a second, and bytes a second between ranks, in the choice of a way; measured on
# two cores and gloo, counted for an H200 with NVLink
SPEED = {"cpu": (4e10, 1e9), "cuda": (3e14, 3.5e11)}


class Form(NamedTuple):
    """One use, without its values."""

    kind: str  # "matrix", "embedding", "rows", or "other", which only `rows` serves
    blocks: int
    tokens: int
    dtypes: tuple[torch.dtype, ...]  # of its tensors
    rows: tuple[int, ...]  # of all ranks' rows, that of each block


class Entry(NamedTuple):
    """What one rank has of a parameter."""

    forms: tuple[Form, ...]
    plane: tuple[int, int] | None  # as tokens have it; None where there are none
    grain: int
    double: bool  # whether rows are formed in float64
    number: int  # of rows


class Way(NamedTuple):
    """How the Gramian of one parameter is made."""

    plane: tuple[int, int]
    tiles: tuple[int, int] | None  # (a, b); None for rows
    grain: int
    dtype: torch.dtype  # of rows that are formed


def form_of(use: Use, rows: tuple[int, ...], scaled: bool) -> Form:
    """The use as others get it; `scaled`: times the factors of its rows, in float32 or wider."""
    kind, tokens = "other", 1
    if isinstance(use, KeptUse):
        return Form("rows", 1, 1, (use.dtype,), rows)
    if isinstance(use, RowsUse):
        kind = "rows"
    elif isinstance(use, MatrixUse) and use.left.dim() == 3:
        kind, tokens = "matrix", use.tokens
    elif isinstance(use, EmbeddingUse):
        kind, tokens = "embedding", use.tokens
    dtypes = [value.dtype for value in use.values]
    if scaled and dtypes[-1].itemsize < 4:
        dtypes[-1] = torch.float32
    return Form(kind, use.n, tokens, tuple(dtypes), rows)


def way(entries: Sequence[Entry], shape: Sequence[int], device: str, formed: bool) -> Way:
    """That which takes least, by what all ranks said: so the same on each.

    `formed`: rows are formed whatever it takes.
    """
    plane = next((e.plane for e in entries if e.plane is not None), None)
    if plane is None:
        plane = (shape[0], math.prod(shape[1:])) if len(shape) else (1, 1)
    double = any(entry.double for entry in entries)
    dtype = torch.float64 if double else torch.float32
    grain = math.lcm(*(entry.grain for entry in entries))
    forms = [form for entry in entries for form in entry.forms]
    kinds = {form.kind for form in forms}
    tiles = None
    # ranks may have seen it as different matrices, which only rows that are formed have in common
    alike = len({e.plane for e in entries if e.plane is not None}) < 2
    served = bool(kinds & {"matrix", "embedding"}) and "other" not in kinds
    if alike and grain == 1 and not formed and served:
        tiles = _tiles(entries, forms, plane, device)
    return Way(plane, tiles, grain, dtype)


def _tiles(
    entries: Sequence[Entry], forms: Sequence[Form], plane: tuple[int, int], device: str
) -> tuple[int, int] | None:
    """The grid of tiles that takes least, if that is less than rows take."""
    (h, w), ranks = plane, len(entries)
    speed, wire = SPEED.get(device, SPEED["cpu"])
    formed = 8 if any(entry.double for entry in entries) else 4
    sides = [f.dtypes for f in forms if f.kind in ("matrix", "embedding")]
    size = max(dtypes[-1].itemsize for dtypes in sides)
    rows = sum(entry.number for entry in entries)
    tokens = sum(f.blocks * f.tokens for f in forms if f.kind == "matrix")
    picked = sum(f.blocks * f.tokens for f in forms if f.kind == "embedding")
    existing = sum(f.blocks for f in forms if f.kind == "rows")
    out = (ranks - 1) / ranks  # of what a rank has, the share that others get
    multiplied = ((tokens + picked) / ranks + rows * rows / (2 * ranks)) * h * w
    by_rows = multiplied / speed + rows / ranks * h * w * out * formed / wire

    def cost(a: int, b: int) -> float:
        height, width = -(-h // a), -(-w // b)
        longest = max((f.tokens for f in forms), default=1)
        own = -(-tokens // longest)
        inside = Work(height, width, longest, own, 0, existing > 0, device, picked)
        sent = (tokens * (height + width) + picked * width) * size + picked * 8
        sent += existing * height * width * formed
        sent *= out
        return plan(inside, existing < 2).multiplications / speed + sent / wire

    # lines of an embedding's table are picked by their number: all are needed
    most = 1 if picked else min(ranks, h)
    grids = [(a, ranks // a) for a in range(1, most + 1) if ranks % a == 0 and ranks // a <= w]
    best = min(grids, key=lambda grid: cost(*grid), default=None)
    return best if best is not None and cost(*best) < by_rows else None


def share(total: int, parts: int, part: int) -> slice:
    """One of `parts` nearly equal pieces of a range."""
    return slice(total * part // parts, total * (part + 1) // parts)
