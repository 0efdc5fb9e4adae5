"""What a Jacobian, its Gramian and its update take, counted on two and four samples."""

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gradsurgery.capture.convolution import PATCHES, ConvolutionUse
from gradsurgery.capture.factored import FactoredJacobian
from gradsurgery.capture.held import storages
from gradsurgery.capture.paths import chunk
from gradsurgery.capture.plane import PRODUCTS, Plane
from gradsurgery.capture.planner import device_of
from gradsurgery.capture.stack import Stack
from gradsurgery.capture.tokens import PADDING, TokenUse
from gradsurgery.capture.trace import Leaf
from gradsurgery.capture.uses import HALVES, MatrixUse
from gradsurgery.ops._backend import native_available


class Live(TorchDispatchMode):
    """Bytes of all storages made inside and not yet freed: `now`, and at most, `peak`.

    Tensors that exist before count nothing, nor do views of them. What an operation allocates and
    frees within itself is not seen, nor what an allocator keeps.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self._note(pytree.tree_leaves((args, kwargs)), False)
        out = func(*args, **(kwargs or {}))
        self._note(pytree.tree_leaves(out), True)
        return out

    def _note(self, leaves: Iterable[Any], made: bool) -> None:
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            self._known.add(key)
            # what an operation is given is older than this: known, but not counted
            size = storage.nbytes() if made else 0
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Parts(NamedTuple):
    """Samples taken in parts, of each of which rows are held while others are made."""

    most: int  # of a part
    alone: int  # of the batch, in rows of their own
    summed: int  # rows that sum several samples


def needed(
    run: Callable[..., object],
    whole: FactoredJacobian,
    few: FactoredJacobian,
    size: int,
    parts: Parts | None = None,
) -> dict[str, int]:
    """Bytes at the highest, "total", and what makes them up.

    On a GPU the bytes alive at once. On a CPU those by which the process grows, as with glibc's
    allocator: gradients and buffers come on top of all that the passes had, since what these freed
    lies in pieces, and a tenth more.

    Args:
        run: makes the Jacobian of so many samples, and has what is held of it where that is in
            parts; of `what="sum"` that of one row, of "losses" these alone.
        whole: that of `size` samples, of tensors without memory.
        few: that of a few samples, for its leaves computed from parameters.
        size: samples.
        parts: if they are not taken at once.
    """
    if parts is None:
        passes, pairs = _counted(run, size, size)
    else:
        last = min(parts.most, parts.alone)
        passes, pairs = _counted(run, last, parts.alone) if last else (0, 0)
        sums = parts.summed * sum(
            p.numel() * _value(p)
            for p, used in zip(whole.parameters, whole.reached, strict=True)
            if used
        )
        # a part is taken while the rows of those before are held
        passes += sums + pairs - pairs * last // max(parts.alone, 1)
        if max(parts.alone, size - parts.alone) > parts.most:
            # the first step ends with a trial of some samples: whether they may be taken apart
            trial, _ = _counted(partial(run, what="losses"), 2 + min(parts.most, 2), 0)
            passes = max(passes, sums + pairs + trial)
        if parts.summed:
            summed, _ = _counted(partial(run, what="sum"), min(parts.most, size - parts.alone), 0)
            passes, pairs = max(passes, sums + summed), pairs + sums
    m, planes = whole.m, [plane for plane in whole._planes if plane is not None]
    below = {id(p): p for part in few._derived for p in part.parameters}
    rows = 0  # of parameters that other tensors are computed from, and of those tensors
    for part in few._derived:
        sizes = [*(p.numel() for p in part.parameters), *(_numel(leaf) for leaf, _ in part.leaves)]
        rows += m * sum(sizes) * _value(part.parameters[0])
    given = storages(use for mine in whole._uses for use in mine)
    made = storages(use for plane in planes for use in plane.uses)
    rows += sum(size for key, size in made.items() if key not in given)  # that planes formed
    grams = 8 * m * m * (len(planes) + 1)
    kept = sum(
        plane.parameter.numel() * _value(plane.parameter)
        for plane in planes
        if plane.group is not None and plane.plan is not None and plane.plan.cross != "none"
    )
    reached = below | {id(plane.parameter): plane.parameter for plane in planes}
    grads = sum(p.numel() * p.element_size() for p in reached.values() if p.grad is None)
    # the higher of two moments: the Gramian is formed, or the update is added
    forming = kept, grams + rows + max(map(_forming, planes), default=0)
    adding = max(kept, grads), grams + max(map(_adding, planes), default=0)
    gradients, buffers = max(forming, adding, key=sum)
    total = max(passes, pairs + gradients + buffers)
    if device_of(whole.parameters[0]) == "cpu":
        # eight models grow by 0.81 to 1.13 of it, one with LoRA 1.6; what small parts free is used
        total = total if parts is not None else max(passes, pairs) + gradients + buffers
        total = total * 11 // 10
    return {
        "total": total,
        "passes": passes,
        "pairs": pairs,
        "gradients": gradients,
        "buffers": buffers,
    }


def _counted(run: Callable[[int], object], most: int, size: int) -> tuple[int, int]:
    """Bytes at the highest of a pass over `most` samples, and those left of `size`."""
    counted = []
    for samples in (2, 4):  # their difference tells what grows with the batch
        with Live() as live:
            jacobian = run(samples)
        counted.append((live.peak, live.now))
        del jacobian
    # linear in the samples: what does not grow with them, and half the difference for each more
    (peak, now), (more, left) = counted
    return int(peak + (more - peak) / 2 * (most - 2)), int(now + (left - now) / 2 * (size - 2))


def _forming(plane: Plane) -> int:
    """Bytes of the buffers of a parameter's Gramian."""
    if isinstance(plane, Stack):  # one matrix after another
        return max(map(_forming, plane.sections.values()))
    copies, value = _copies(plane), _value(plane.parameter)
    if plane.plan is None:
        return copies
    values = tokens = 0
    for use in plane.uses:
        if isinstance(use, PRODUCTS):
            tokens += use.n * use.tokens
        if isinstance(use, TokenUse):  # in blocks
            values += int(PADDING * (use.left.numel() + use.right.numel()))
        if isinstance(use, ConvolutionUse):
            patches = plane.plan.path == "factored" or use.tokens < PATCHES
            values += _patches(use) if patches else 0
    height, width = plane.uses[0].plane
    if plane.plan.path == "factored":  # the kernel packs both sides
        return copies + (values + tokens * (height + width)) * value
    count = sum(len(use.rows.ids) for use in plane.uses) + 1
    slices = min(
        max(chunk(device_of(plane.parameter)), count * min(height, width)), count * height * width
    )
    return copies + (values + slices) * value


def _adding(plane: Plane) -> int:
    """Bytes of the buffers of a parameter's part of an update."""
    p = plane.parameter
    planes = 0 if p.grad is None and p.dtype not in HALVES else 1
    if plane.plan is None:
        planes += 1
    # one side is scaled in a copy; the CPU's kernel for products of tokens makes none
    kernel = device_of(p) == "cpu" and native_available("cpu")
    sides = sum(
        min(t.numel() for t in use.values)
        for use in plane.uses
        if len(use.values) > 1 and not (kernel and isinstance(use, (MatrixUse, TokenUse)))
    )
    return _copies(plane) + (planes * p.numel() + sides) * _value(p)


def _copies(plane: Plane) -> int:
    """Bytes of what is widened to float32, or joined."""
    values = [t for use in plane.uses for t in use.values]
    if len(plane.uses) == 1 and all(t.dtype not in HALVES for t in values):
        return 0
    return sum(t.numel() for t in values) * _value(plane.parameter)


def _patches(use: ConvolutionUse) -> int:
    """Values of a convolution's two sides as matrices; several samples' patches are reordered."""
    wide, narrow = use.inputs, use.grads
    if use.geometry.transposed:
        wide, narrow = narrow, wide
    count = wide.shape[:3].numel() * math.prod(use.shape[2:]) * math.prod(narrow.shape[3:])
    return (1 if wide.shape[1] == 1 else 2) * count + narrow.numel()


def _value(p: Tensor) -> int:
    """Bytes of a value as it is computed with."""
    return max(4, p.element_size())


def _numel(leaf: Leaf) -> int:
    return math.prod(leaf.shape)
