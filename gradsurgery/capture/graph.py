"""Walks through autograd's graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[Any, int]  # (node, output): a tensor of the forward pass, and its gradient
# torch has it, but no stub of it
AccumulateGrad: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
NUMBERS = (bool, int, float, str, type(None))
TOLD = {"name", "variable", "apply", "next_functions", "_input_metadata"}  # by kinds and edges


def roots(losses: Tensor) -> Place:
    """The place of the losses, where the graph begins."""
    edge = torch.autograd.graph.get_gradient_edge(losses)
    return edge.node, edge.output_nr


def variable_of(node: Any) -> nn.Parameter | None:
    """What a node accumulates the gradient of; None where it does something else."""
    return node.variable if node.__class__ is AccumulateGrad else None


def ordered(root: Any) -> dict[Any, Sequence[Place]]:
    """All nodes under `root`, each before the nodes it gets its inputs from; and these."""
    # depth first, by a stack of our own: graphs are deeper than Python recurses
    order: list[tuple[Any, Sequence[Place]]] = []
    following = root.next_functions  # each time it is asked for, it is made anew
    stack = [(root, following, iter(following))]
    entered = {root}
    while stack:
        node, following, children = stack[-1]
        for child, _ in children:
            if child is not None and child not in entered:
                entered.add(child)
                beneath = child.next_functions
                stack.append((child, beneath, iter(beneath)))
                break
        else:
            stack.pop()
            order.append((node, following))
    order.reverse()
    return dict(order)


def under(place: Place) -> tuple[set[Any], list[nn.Parameter]]:
    """The nodes and the parameters that a tensor was computed from."""
    seen: set[Any] = set()
    found: list[nn.Parameter] = []
    stack = [place[0]]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = variable_of(node)
        if variable is not None:
            found.append(variable)
        stack.extend(child for child, _ in node.next_functions)
    return seen, found


def is_of_mesh(node: Any) -> bool:
    """Whether it is one of the Functions in which torch's DTensors begin, end or are moved."""
    made_by = getattr(node.__class__, "_forward_cls", None)
    return made_by is not None and made_by.__module__.startswith("torch.distributed.tensor.")


class Notes:
    """What a walk read of a graph: it finds the same in another that gives the same answers."""

    def __init__(self) -> None:
        self.order: dict[Any, Sequence[Place]] = {}  # all nodes, and what is below them
        self.shapes: dict[Any, Sequence[tuple[int, ...]]] = {}  # of outputs that were looked at
        self.numbers: dict[Any, dict[str, Any]] = {}  # that nodes saved, by their names
        # what depends on values: the question, its node, what it was asked with, and the answer
        self.asked: list[tuple[Callable, Any, tuple, Any]] = []


class Noted:
    """Stands for a node that others read, and notes the numbers that they read of it.

    Attributes:
        values: whether they read more than numbers.
    """

    def __init__(self, node: Any, numbers: dict[str, Any]) -> None:
        self._node, self._numbers, self.values = node, numbers, False

    # isinstance is to say of it what it says of the node; pyright knows no such property
    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._node)

    def __getattr__(self, name: str) -> Any:
        if name in TOLD:
            return getattr(self._node, name)
        # a Function has what its author put there, this time or always
        self.values |= hasattr(self._node, "apply")
        value = self._numbers[name] = getattr(self._node, name)
        parts = value if isinstance(value, tuple) else (value,)
        self.values |= not all(isinstance(part, NUMBERS) for part in parts)
        return value
