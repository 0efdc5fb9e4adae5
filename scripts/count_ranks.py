"""Make the table of counted costs in docs/distributed.md.

    python scripts/count_ranks.py --docs docs/distributed.md

What a step of OrthoGrad on many GPUs sends and multiplies beyond a plain step, for the shapes of
two public models. Nothing is run: the ways and the bytes are those that the planner chooses and
the code would send, of `gradsurgery.ranks`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from gradsurgery.capture.planner import Work, plan
from gradsurgery.ranks.slices import cut
from gradsurgery.ranks.table import Entry, Form, Way, way
from gradsurgery.ranks.tiles import Tiles

MARK = "<!-- counted -->"
TOKENS = 1024  # of a sample
RANK = 16  # of LoRA
DEVICE = "cuda"
WEIGHT, ROW = torch.bfloat16, torch.float32
RANKS = (8, 64, 512, 1024)


class Model(NamedTuple):
    """The shapes of a Llama."""

    name: str
    width: int
    inner: int
    values: int  # width of keys and of values
    layers: int
    words: int = 128256

    def linear(self) -> list[tuple[int, int]]:
        """[out, in] of a layer's matrices."""
        w, v, i = self.width, self.values, self.inner
        return [(w, w), (v, w), (v, w), (w, w), (i, w), (i, w), (w, i)]


class Parameter(NamedTuple):
    """Parameters of one shape: how many, and what their rows are made of."""

    shape: tuple[int, ...]
    count: int
    kind: str = "matrix"


class Cost(NamedTuple):
    """Of one GPU, for the Gramian of one parameter."""

    sent: float  # bytes
    multiplied: float
    tiles: bool


MODELS = (
    Model("8B", 4096, 14336, 1024, 32),
    Model("70B", 8192, 28672, 1024, 80),
)


def parameters(model: Model, lora: bool) -> Iterator[Parameter]:
    """All that train."""
    for out, into in model.linear():
        if lora:
            yield Parameter((RANK, into), model.layers)
            yield Parameter((out, RANK), model.layers)
        else:
            yield Parameter((out, into), model.layers)
    if not lora:
        yield Parameter((model.words, model.width), 1)
        yield Parameter((model.words, model.width), 1, "embedding")
        yield Parameter((model.width,), 2 * model.layers + 1, "other")


def entries(kind: str, shape: tuple[int, ...], ranks: int, samples: int) -> list[Entry]:
    """What each rank has of a parameter: its part of the forget row, and its retained samples.

    The part is a plane where a rank's own Gramian would keep one, else tokens, scaled by its share
    of the samples and so in float32.
    """
    left = torch.int64 if kind == "embedding" else WEIGHT
    plane = None if len(shape) == 1 else (shape[0], shape[1])
    forget = Form(kind, samples, TOKENS, (left, ROW), (0,) * samples)
    if samples > 1 and plane is not None and _keeps(plane, kind, samples):
        forget = Form("rows", 1, 1, (ROW,), (0,))
    found = []
    for rank in range(ranks):
        own = tuple(range(1 + rank * samples, 1 + (rank + 1) * samples))
        retain = Form(kind, samples, TOKENS, (left, WEIGHT), own)
        found.append(Entry((forget, retain), plane, 1, False, samples + 1))
    return found


def _keeps(plane: tuple[int, int], kind: str, samples: int) -> bool:
    blocks = (0, 0) if kind == "embedding" else (samples, samples)
    picked = samples * TOKENS if kind == "embedding" else 0
    work = Work(*plane, TOKENS, *blocks, device=DEVICE, picked=picked, picked_group=picked)
    return plan(work).cross != "none"


def cost(parameter: Parameter, ranks: int, samples: int) -> Cost:
    """Of the first rank, whose share is none of the smallest."""
    shape, kind = parameter.shape, parameter.kind
    every = entries(kind, shape, ranks, samples)
    known = way(every, shape, DEVICE, False)
    work = cut([known], [samples + 1] * ranks) if known.tiles is None else [Tiles(0, known, every)]
    sent = sum(each.size(0, other) for each in work for other in range(1, ranks))
    rows = 1 + ranks * samples
    # a plane of the forget row is made for the update in any case
    tokens = sum(f.blocks * f.tokens for f in every[0].forms if f.kind != "rows") * ranks
    if known.tiles is None:
        height, width = known.plane
        total = (tokens / ranks + rows * rows / (2 * ranks)) * height * width
        return Cost(sent, total, False)
    return Cost(sent, _of_tile(known, kind, rows, tokens, every[0].forms[0].kind == "rows"), True)


def _of_tile(known: Way, kind: str, rows: int, tokens: int, kept: bool) -> float:
    """Multiplications of the cheaper path on a rank's tile."""
    assert known.tiles is not None
    (h, w), (a, b) = known.plane, known.tiles
    height, width = -(-h // a), -(-w // b)
    picked = tokens if kind == "embedding" else 0
    there = tokens - picked
    inside = Work(height, width, TOKENS, there // TOKENS, 0, kept, DEVICE, picked)
    if plan(inside, not kept).path == "direct":
        return (tokens + rows * rows / 2) * height * width
    return (there**2 * (height + width) + picked**2 * width) / 2


def line(model: Model, lora: bool, ranks: int, samples: int) -> str:
    """A row of the table."""
    each = list(parameters(model, lora))
    found = [cost(one, ranks, samples) for one in each]
    sizes = [one.count * torch.Size(one.shape).numel() for one in each]
    trained, rows = sum(sizes), 1 + ranks * samples
    passed = (ranks - 1) / ranks
    sent = sum(p.count * c.sent for p, c in zip(each, found, strict=True))
    gramian = 2 * passed * rows**2 * 8  # its sum over ranks, float64
    update = 2 * passed * trained * ROW.itemsize
    multiplied = sum(p.count * c.multiplied for p, c in zip(each, found, strict=True))
    tiles = sum(n for n, c in zip(sizes, found, strict=True) if c.tiles) / trained
    step = (2 if lora else 3) * _values(model) * 2 * samples * TOKENS
    name = f"{model.name} {'LoRA' if lora else 'whole'}"
    chosen = "rows" if tiles == 0 else "tiles" if tiles > 0.995 else f"tiles {tiles:.0%}, rows"
    cells = (
        *(name, f"{ranks:,}", f"{samples}", f"{rows:,}", chosen),
        *(_shown((sent + gramian) / 1e9), _shown(update / 1e9), _shown(2 * multiplied / 1e12)),
        f"{100 * multiplied / step:.2g} %" if multiplied < step else f"{multiplied / step:.1f} x",
    )
    return "| " + " | ".join(cells) + " |"


def _values(model: Model) -> float:
    """That each token is multiplied with in a forward pass."""
    layer = sum(out * into for out, into in model.linear())
    return model.layers * layer + model.words * model.width


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table() -> str:
    """The whole table."""
    head = (
        *("model", "GPUs", "samples of either set a GPU", "rows", "way"),
        *("Gramian, GB", "update, GB", "Gramian, TFLOP", "of a plain step's"),
    )
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * 3 + "---|" + "---:|" * 4]
    for lora, samples in ((True, 8), (False, 2)):
        for model in MODELS:
            lines += [line(model, lora, ranks, samples) for ranks in RANKS]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    given = parser.parse_args()
    made = table()
    print(made)
    if given.docs:
        before, _, after = given.docs.read_text(encoding="utf-8").split(MARK)
        given.docs.write_text(f"{before}{MARK}\n{made}\n{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
