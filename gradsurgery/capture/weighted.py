"""Weighted sums of rows by backward passes of weighted losses, whose graph is kept."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradsurgery.capture.descent import not_linear
from gradsurgery.capture.graph import ordered, roots, variable_of
from gradsurgery.capture.hooks import ROUNDINGS, dtypes_under, near, register, scale_of
from gradsurgery.capture.leaves import vjps
from gradsurgery.capture.ranges import scaled_parts
from gradsurgery.capture.recomputed import refusal
from gradsurgery.capture.snapshot import Snapshot, as_before, functions
from gradsurgery.capture.trace import misused
from gradsurgery.errors import InputError
from gradsurgery.grads import part
from gradsurgery.spread import local

FEW_ROUNDINGS = 8  # what two sums of the same samples in 16 bits differ by


class Graph(NamedTuple):
    """The losses with their graph, and the row of each."""

    losses: Tensor
    rows: Tensor  # [numel], -1 for none
    snapshot: Snapshot | None = None  # what Functions must find as it was

    def outputs(
        self, weights: Tensor, parameters: Sequence[nn.Parameter]
    ) -> Iterator[tuple[list[int], Tensor, float]]:
        """Parameters of the same weights, of [L, m], what to start a backward pass with, and scale.

        Weights so far apart that no pass holds them take several, each scaled to be near 1.
        """
        narrow = torch.float16 in {self.losses.dtype, *(p.dtype for p in parameters)}
        rows = self.rows.to(weights.device)
        # a pass serves all parameters that have the same weights: mostly, all of them
        sets, which = weights.unique(dim=0, return_inverse=True)
        for k, w in enumerate(sets):
            for some, scale in scaled_parts(
                w.double(), torch.float16 if narrow else self.losses.dtype
            ):
                if self.snapshot is not None:
                    self.snapshot.put_back()
                outputs = torch.where(rows >= 0, some[rows.clamp(min=0)], 0).to(self.losses)
                mine = (which == k).nonzero().flatten().tolist()
                yield mine, outputs.view(self.losses.shape), scale

    def combine(
        self, weights: Tensor, parameters: Sequence[nn.Parameter]
    ) -> Iterator[tuple[int, Tensor]]:
        """w^T J by column; a parameter comes once for each pass that its weights need."""
        for mine, outputs, scale in self.outputs(weights, parameters):
            held = [parameters[i] for i in mine]
            with self._named_errors():
                grads = torch.autograd.grad(
                    self.losses, held, outputs, retain_graph=True, allow_unused=True
                )
            for i, grad in zip(mine, grads, strict=True):
                if grad is not None:
                    yield i, grad if scale == 1 else (grad.double() * scale).to(grad.dtype)

    def backward(self, weights: Tensor, parameters: Sequence[nn.Parameter]) -> bool:
        """As an ordinary backward pass does, hooks of parameters included. False: none holds it."""
        # what a pass accumulates cannot be scaled afterwards: `.grad` may have held something
        if any(scale != 1 for _, _, scale in self.outputs(weights, parameters)):
            return False
        without = [p for p in parameters if p.grad is None]
        for mine, outputs, _ in self.outputs(weights, parameters):
            held = [parameters[i] for i in mine]
            with self._named_errors():
                torch.autograd.backward(self.losses, outputs, retain_graph=True, inputs=held)
        part(without)
        return True

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            why = refusal(error, self.losses) or misused(error)
            if why is None:
                raise
            raise InputError(why) from error


# names and parameters, the sums of their rows, and the sums of these without signs
Parts = Sequence[tuple[str, nn.Parameter, Tensor, Tensor]]


class _Pass(NamedTuple):
    """A backward pass, or two to be added, that sums of rows are compared with."""

    starts: list[Tensor]
    factor: float = 1.0
    dtype: torch.dtype | None = None  # what is rounded to, where that is coarser than parameters
    overflows: bool = False  # whether nothing is said by one that does


def expect_linear(losses: Tensor, outputs: Tensor, parts: Parts, snapshot: Snapshot) -> None:
    """Raise where backward passes of weighted losses do not give the weighted sum of the rows.

    Args:
        losses: with their graph.
        outputs: what to start from for the sum of all rows.
        parts: the parameters, and what is known of each.
        snapshot: what Functions must find as it was.
    """
    passes = [_Pass([outputs]), *_multiples(losses, outputs)]
    name = _differing(losses, parts, snapshot, passes)
    if name is not None:
        raise InputError(not_linear(f"what {name} passes through"))


def expect_sums(losses: Tensor, outputs: Tensor, parts: Parts, snapshot: Snapshot) -> None:
    """Raise where passes of one half of the losses and of the other do not add up.

    Args: as of `expect_linear`.
    """
    taken = outputs != 0
    half = outputs * (taken.flatten().cumsum(0).view_as(taken) % 2)
    # a sum over samples is rounded to what it is computed in, as under autocast to 16 bits
    dtypes = {*dtypes_under(losses), *(p.dtype for _, p, _, _ in parts)}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    halves = _Pass([half, outputs - half], 1.0, coarsest, overflows=True)
    name = _differing(losses, parts, snapshot, [halves])
    if name is not None:
        raise InputError(not_linear(f"what {name} passes through", weighted=False))


def out_of_proportion(
    losses: Tensor, outputs: Tensor, parts: Parts, snapshot: Snapshot
) -> str | None:
    """A parameter whose gradients do not grow as the losses do, by name; None if all do.

    Args: as of `expect_linear`.
    """
    # of numbers so small float16 keeps few digits, and scaled it has others
    coarse = torch.float16 if torch.float16 in dtypes_under(losses) else None
    multiples = [
        each._replace(dtype=coarse, overflows=True) for each in _multiples(losses, outputs)
    ]
    return _differing(losses, parts, snapshot, multiples)


def _multiples(losses: Tensor, outputs: Tensor) -> list[_Pass]:
    # a hook that clips shows where losses are large, one that rounds where they are small
    scale = scale_of(dtypes_under(losses))
    return [_Pass([outputs * factor], factor) for factor in (-scale, 1 / scale)]


def _differing(
    losses: Tensor, parts: Parts, snapshot: Snapshot, passes: Iterable[_Pass]
) -> str | None:
    parameters = [p for _, p, _, _ in parts]
    with as_before(functions([roots(losses)[0]])), Terms(losses, parameters) as terms:
        for starts, factor, dtype, overflows in passes:
            found: list[Tensor | None] = [None] * len(parts)
            sizes: list[Tensor | None] = [None] * len(parts)
            terms.sizes.clear()
            for start in starts:
                snapshot.put_back()
                grads = snapshot.owned(vjps([losses], parameters, [start], False))
                snapshot.note_changes()
                found = [_add(a, b) for a, b in zip(found, grads, strict=True)]
                if len(starts) > 1:
                    absolute = [None if g is None else g.to_dense().abs() for g in grads]
                    sizes = [_add(a, b) for a, b in zip(sizes, absolute, strict=True)]
            for (name, p, total, size), grad, mine in zip(parts, found, sizes, strict=True):
                least = terms.least(p, dtype or total.dtype)
                size = (size.double() * abs(factor) if mine is None else mine.double()).clamp(least)
                expected = total * factor
                if grad is None or (overflows and _overflowed(grad, expected, factor)):
                    continue
                digits = dtype is None or _has_digits(grad, expected, factor, dtype)
                if mine is None and not digits:
                    continue
                # 64 units of the last place of 16 bits would be half of a sum
                wide = mine is None or not digits or torch.finfo(dtype or total.dtype).bits > 16
                if not near(grad, expected, size, dtype, ROUNDINGS if wide else FEW_ROUNDINGS):
                    return name
    return None


def _overflowed(found: Tensor, expected: Tensor, factor: float) -> bool:
    """Whether nothing is left, because it was scaled, or had overflowed before."""
    known = found.isfinite() & expected.isfinite()
    return not bool(known.any()) and (factor != 1 or not bool(expected.isfinite().any()))


def _has_digits(found: Tensor, expected: Tensor, factor: float, dtype: torch.dtype) -> bool:
    """Whether the largest number is a normal one, as it is and as it was before it was scaled."""
    known = found.isfinite() & expected.isfinite()
    largest = float(torch.where(known, torch.maximum(found.abs(), expected.abs()), 0).max())
    return largest * min(1.0, 1 / abs(factor)) >= torch.finfo(dtype).smallest_normal


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    b = None if b is None else b.to_dense()
    return b if a is None else a if b is None else a + b


class Terms:
    """What the gradients of biases and the like are sums of, without signs, in passes inside.

    Such a sum may be zero whatever comes, as that of a key's bias is: all there is of it then is
    what its terms, one for each token, were rounded to.
    """

    def __init__(self, losses: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        self.sizes: dict[int, float] = {}  # the largest of each parameter's elements
        self._handles: list[RemovableHandle] = []
        self._above: list[tuple[Any, int, int]] = []  # nodes that sum; id and size of a parameter
        known = {id(p): p.numel() for p in parameters if p.dim() <= 1 and p.numel() > 0}
        turned: dict[Any, int] = {}  # by nodes that cast or reshape a parameter, its id
        for node, following in reversed(ordered(roots(losses)[0]).items()):
            for child, _ in following:
                key = turned.get(child, id(variable_of(child)))
                if key not in known:
                    continue
                taken = max((math.prod(meta.shape) for meta in node._input_metadata), default=0)
                if taken > known[key]:
                    self._above.append((node, key, known[key]))
                elif len(following) == 1:
                    turned[node] = key

    def __enter__(self) -> "Terms":
        for node, key, size in self._above:
            noted = partial(self._note, key, size)
            self._handles.append(register(node.register_prehook, noted))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def least(self, parameter: nn.Parameter, dtype: torch.dtype) -> float:
        """The size of the sums that the gradient of a parameter is no smaller than."""
        # a sum over tokens is finer than its rounding: those of 16 bits are float32's
        finer = min(1.0, torch.finfo(torch.float32).eps / torch.finfo(dtype).eps)
        return self.sizes.get(id(parameter), 0.0) * finer

    def _note(self, key: int, size: int, grads: Sequence[Tensor | None]) -> None:
        for grad in grads:
            if grad is None or grad.numel() <= size:
                continue
            terms = local(grad).abs().double()
            mine = [d for d in range(terms.dim()) if terms.shape[d] == size][-1:]
            others = [d for d in range(terms.dim()) if d not in mine]
            largest = float(terms.sum(others).max()) / (1 if mine else size)
            if math.isfinite(largest):  # what overflowed says nothing
                self.sizes[key] = self.sizes.get(key, 0.0) + largest
