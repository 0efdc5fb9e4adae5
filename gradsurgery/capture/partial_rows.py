"""Rows that others are added to, of other passes or ranks: what may keep a sum from its parts."""

from collections.abc import Hashable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor

from gradsurgery.capture.hooks import register

SIMPLE = (bool, int, float, str, type(None))
FEW = 16  # values of a tensor that is an option
KINDS = 1000  # that are remembered at most: options may be others in every step


class PartialRows:
    """What will become of a tape's rows, and what was found of hooks and Functions above them.

    Args:
        rows: their numbers, of those that others are added to.
        scaled: whether they are multiplied before, by what no loss is.
        always: whether Functions are asked in each pass, and not once for each kind.
        linear: kinds of Functions that were asked before.
    """

    def __init__(
        self,
        rows: Set[int] = frozenset(),
        scaled: bool = False,
        always: bool = True,
        linear: set[Hashable] | None = None,
    ) -> None:
        self.rows, self.scaled, self.always = rows, scaled, always
        self.linear: set[Hashable] = set() if linear is None else linear
        self.hooked = False  # whether a hook was met
        self.met = False  # whether a hook or a Function was, of those that are asked
        self.bent = ""  # a parameter whose gradients do not grow as the losses do, by name
        self._asked: set[Hashable] = set()

    def new(self, functions: Sequence[Any]) -> list[Any]:
        """Those of a kind that was not asked before."""
        return [node for node in functions if kind_of(node) not in self.linear]

    @contextmanager
    def asking(self, functions: Sequence[Any]) -> Iterator[None]:
        """Inside these take gradients; of zero, they say nothing."""
        reached: set[Any] = set()
        with ExitStack() as stack:
            for node in functions:
                note = partial(_note, reached, node)
                stack.callback(register(node.register_prehook, note).remove)
            yield
        self._asked |= set(map(kind_of, reached))

    def settle(self) -> None:
        """All rows were asked: what was found linear in one may not be in another."""
        if self.bent:
            return
        if len(self.linear) > KINDS:
            self.linear.clear()
        self.linear |= self._asked


def _note(reached: set[Any], node: Any, grads: Sequence[Tensor | None]) -> None:
    for grad in grads:
        if grad is not None and bool((grad.isfinite() & (grad != 0)).any()):
            reached.add(node)


def kind_of(function: Any) -> Hashable:
    """What tells a Function from others: its class, and its options as its context has them."""
    return type(function), _said(getattr(function, "__dict__", {}))


def _said(value: Any, depth: int = 3) -> Hashable:
    if type(value) in SIMPLE:
        return repr(value)  # NaN is equal to nothing
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() <= FEW:
        return repr(value.tolist())
    if depth > 0 and type(value) in (tuple, list):
        return tuple(_said(each, depth - 1) for each in value)
    if depth > 0 and type(value) is dict:
        return tuple((_said(k, 0), _said(v, depth - 1)) for k, v in value.items())
    if depth > 0 and type(value) is FunctionType:
        cells = [_content(cell) for cell in value.__closure__ or ()]
        return value.__code__, _said(cells, depth - 1), _said(value.__defaults__, depth - 1)
    return type(value)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # as yet empty
        return None
