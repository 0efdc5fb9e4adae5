"""Walks through autograd's graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[Any, int]  # (node, output): a tensor of the forward pass, and its gradient


def roots(losses: Tensor) -> Place:
    """The place of the losses, where the graph begins."""
    edge = torch.autograd.graph.get_gradient_edge(losses)
    return edge.node, edge.output_nr


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
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.append(variable)
        stack.extend(child for child, _ in node.next_functions)
    return seen, found


def is_of_mesh(node: Any) -> bool:
    """Whether it is one of the Functions in which torch's DTensors begin, end or are moved."""
    made_by = getattr(type(node), "_forward_cls", None)
    return made_by is not None and made_by.__module__.startswith("torch.distributed.tensor.")
