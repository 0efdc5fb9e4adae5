"""Asking an operation itself: its own backward, for gradients whose rows are known."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.capture.carriers import SHARED, Answer, Shape
from gradsurgery.capture.layout import Layout, compress, constant
from gradsurgery.capture.recomputed import read_again
from gradsurgery.capture.snapshot import as_before, is_function
from gradsurgery.errors import InputError, NonFiniteError


class NoValuesError(InputError):
    """An operation on the meta device, which cannot be asked."""


def call(node: Any, grads: Sequence[Tensor | None], *, summed: bool = True) -> list[Tensor | None]:
    """A node's backward for the gradients of its outputs: one gradient for each edge.

    They are as autograd hands them on, but dense; `summed` over what was broadcast. What the node
    keeps is afterwards what it was.
    """
    read_again([node])  # a checkpoint gives what it recomputes to one reader only
    if is_function(node):
        with as_before([node]), _drawn_again(grads):
            found = [None if g is None else g.clone() for g in _applied(node, grads)]
    elif hasattr(node, "apply"):  # torch's own, written in Python
        found = _applied(node, grads)
    else:
        answer = node(*grads)
        found = list(answer if isinstance(answer, tuple) else (answer,))
    for k, (child, nr) in enumerate(node.next_functions):
        if child is not None:
            found[k] = dense(found[k], child, nr, summed)
    return found


def dense(grad: Tensor | None, child: Any, nr: int, summed: bool = True) -> Tensor | None:
    """A gradient as the node `child` takes it for its output `nr`, but dense."""
    if grad is None:
        return None
    variable = getattr(child, "variable", None)
    like = child._input_metadata[nr] if variable is None else variable
    grad = grad.to_dense() if grad.layout != torch.strided else grad
    grad = grad.real if grad.is_complex() and not like.dtype.is_complex else grad
    shape = tuple(like.shape)
    return grad.sum_to_size(shape) if summed and grad.shape != shape else grad


def _applied(node: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Of a torch.autograd.Function, which has answers for what is no Tensor too."""
    given = [None if g is None else g.clone() for g in grads]  # a backward may write to them
    zeros = [
        torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device) if g is None else g
        for g, meta in zip(given, node._input_metadata, strict=True)
    ]
    try:
        answer = node.apply(*zeros)
    except Exception:
        if None not in given:
            raise
        answer = node.apply(*given)  # as of ctx.set_materialize_grads(False)
    answer = answer if isinstance(answer, tuple) else (answer,)
    wanted = (a for a, needed in zip(answer, node.needs_input_grad, strict=False) if needed)
    return [None if child is None else next(wanted) for child, _ in node.next_functions]


def _drawn_again(grads: Sequence[Tensor | None]) -> AbstractContextManager:
    """Random numbers that a Function draws are drawn again by whoever draws next."""
    devices = {g.device for g in grads if g is not None and g.is_cuda}
    return torch.random.fork_rng(sorted(d.index or 0 for d in devices))


def probe(
    node: Any, outs: dict[int, Layout], ins: Sequence[Shape | None], count: int
) -> list[Answer]:
    """The layouts that the operation's own backward shows, for any operation.

    An element of an input's gradient that depends on one row only is the same whether the other
    rows' gradients are there or not, and zero without that row's. Which row it is shows from one
    call for each bit of the row numbers, in which only rows with that bit have gradients: so 1000
    rows take 10 calls. Two for each bit, and all again for large and small gradients, where the
    operation is somebody's own and may not be linear.

    Args:
        node: of the operation.
        outs: the layouts of its outputs that losses depend on.
        ins: the shapes of its inputs; None for those that nobody asks about.
        count: one more than the largest row.

    Raises:
        InputError: a backward that does not answer the same when it is asked again.
        NonFiniteError: gradients that are not finite however small what they are asked with.
    """
    if any(meta.device.type == "meta" for meta in node._input_metadata):
        raise NoValuesError(
            f"{node.name()} has to be asked which rows it keeps apart, and on the meta device "
            "there are no values to ask it with: check a small model of this kind that has values"
        )
    with torch.no_grad():
        question = _answered(node, outs)
        answers = _layouts(node, question, ins, count)
        if may_keep(node):
            # one that counts its calls or draws numbers gives other answers, which show nothing
            again = call(node, question.grads)
            if not all(steady(a, b) for a, b in zip(again, question.answers, strict=True)):
                raise InputError(unsteady(node.name()))
            # one that clips is linear for gradients below its bound, and has rows meet above it
            for size in (scale_of(node), 1 / scale_of(node)):
                other = _asked_with(node, outs, size)
                if all(g is None or bool(g.isfinite().all()) for g in other.answers):
                    found = _layouts(node, other, ins, count)
                    pairs = zip(answers, found, strict=True)
                    answers = [SHARED if b is SHARED else a for a, b in pairs]
    return answers


class _Question(NamedTuple):
    """What a backward was asked with, the rows of that, and its answers."""

    grads: list[Tensor | None]
    ids: list[Tensor | None]
    answers: list[Tensor | None]


def _layouts(
    node: Any, question: _Question, ins: Sequence[Shape | None], count: int
) -> list[Answer]:
    whole = question.answers
    known = [None if g is None else g.isfinite() for g in whole]
    rows = [
        torch.zeros(() if g is None else g.shape, dtype=torch.int64, device="cpu") for g in whole
    ]
    separate = [g is not None for g in whole]  # inputs in which, so far, no two rows meet
    # what is not there with a bit must be there without it. torch's own operations are linear, so
    # for those that follows from the sum
    values = (1, 0) if may_keep(node) else (1,)
    for bit, value in product(range(max(1, math.ceil(math.log2(max(count, 2))))), values):
        masked = [
            None if g is None or n is None else g.masked_fill((n >> bit) & 1 != value, 0)
            for g, n in zip(question.grads, question.ids, strict=True)
        ]
        for k, part in enumerate(call(node, masked)):
            full, finite = whole[k], known[k]
            if not separate[k] or ins[k] is None or full is None or finite is None:
                continue
            part = torch.zeros_like(full) if part is None else part
            # all of an element, or nothing: anything between comes from several rows
            there = same(part, full)
            separate[k] = bool((there | (part == 0) | ~finite).all())
            mine = (there & (full != 0)).cpu()
            if value:
                # its row's number has this bit
                rows[k] |= mine.long() << bit
            elif separate[k]:  # those without the bit, which the question before did not show
                has = (rows[k] >> bit) & 1 == 1
                separate[k] = bool((mine ^ has | (~finite | (full == 0)).cpu()).all())
    answers: list[Answer] = []
    for k, shape in enumerate(ins):
        full, finite = whole[k], known[k]
        if shape is None:
            answers.append(None)
        elif full is None or finite is None:  # no gradient passes
            answers.append(constant(-1))
        elif not separate[k]:
            answers.append(SHARED)
        else:
            # what is not finite has the row of its neighbours
            answer = compress(rows[k].masked_fill(((full == 0) | ~finite).cpu(), -1).view(shape))
            lost = ~finite.cpu() & (answer.elements(shape) < 0)
            if bool(lost.any()):
                raise NonFiniteError(f"{node.name()}: its gradient is not finite")
            answers.append(answer)
    return answers


def steady(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two answers to the same question agree."""
    if a is None or b is None:
        return a is b
    return bool((same(a, b) | ~(a.isfinite() & b.isfinite())).all())


def unsteady(name: str) -> str:
    return (
        f"{name}: its backward gives another answer each time it is called, so no rows can be had "
        "by asking it. Have it compute one loss a sample, a scalar, which is never asked, or make "
        "it depend on its arguments alone"
    )


def _asked_with(node: Any, outs: dict[int, Layout], size: float) -> _Question:
    """Gradients of the outputs, random and of this size."""
    generator = torch.Generator().manual_seed(0)
    grads: list[Tensor | None] = []
    ids: list[Tensor | None] = []
    for nr, meta in enumerate(node._input_metadata):
        layout = outs.get(nr)
        if layout is None:
            grads.append(None)
            ids.append(None)
            continue
        shape = tuple(meta.shape)
        numbers = layout.elements(shape).to(meta.device)
        # rarely near 0, where an element that depends on a row would look as if it did not
        grad = torch.randn(shape, generator=generator, dtype=torch.float64) + 2.0
        if meta.dtype.is_complex:
            other = torch.randn(shape, generator=generator, dtype=torch.float64) + 3.0
            grad = torch.complex(grad, other)  # or an operation on one part would seem to pass none
        grad = (size * grad).to(meta.dtype).to(meta.device)
        grads.append(grad.masked_fill(numbers < 0, 0))
        ids.append(numbers)
    answers = [None if g is None else g.detach().clone() for g in call(node, grads)]
    return _Question(grads, ids, answers)


def _answered(node: Any, outs: dict[int, Layout]) -> _Question:
    """Asked with gradients as large as can be answered: 16 bits overflow soon."""
    first = None
    # the first size at which nothing overflows; if there is none, the first of all
    for size in (1.0, 2.0**-8, 2.0**-16):
        question = _asked_with(node, outs, size)
        first = first or question
        if all(g is None or bool(g.isfinite().all()) for g in question.answers):
            return question
    assert first is not None
    return first


def scale_of(node: Any) -> float:
    """How much larger and smaller gradients an operation is asked with too."""
    narrow = any(meta.dtype == torch.float16 for meta in node._input_metadata)
    return 2.0**5 if narrow else 2.0**30


def may_keep(node: Any) -> bool:
    """Whether an operation is somebody's own, or may hold one: who knows what it keeps."""
    name = node.name()
    return is_function(node) or "CppNode" in name or "CopySlices" in name


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where two sums of the same numbers are equal, up to the order of their terms."""
    return (a - b).abs() <= _roundings(b.dtype) * b.abs()


def _roundings(dtype: torch.dtype) -> float:
    """How far two sums of the same numbers may be apart."""
    return torch.finfo(dtype).eps * (2 if dtype in (torch.float16, torch.bfloat16) else 64)
