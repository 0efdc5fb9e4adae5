"""Tensors that are parameters seen another way."""

from typing import Any, NamedTuple

from torch import nn

from gradsurgery.capture.carriers import base_name, wrap
from gradsurgery.capture.graph import Noted, Notes, Place, variable_of

VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze"}
COPIES = {"Clone", "ToCopy", "Alias"}
SPLITS = {"Split", "UnsafeSplit", "SplitWithSizes", "UnsafeSplitWithSizes"}


class Simple(NamedTuple):
    """A leaf that is a parameter, its transpose, a view of it or some of its lines.

    Lines are those of its matrix; of several matrices [g, H, W], those of one below the other.
    """

    parameter: nn.Parameter
    transposed: bool  # each matrix
    start: int  # first line
    height: int | None  # of the parameter, where the leaf has some of its lines only


def resolve(place: Place, notes: Notes) -> Simple | None:
    """How a leaf comes from one parameter; None if its values are not the parameter's own."""
    (node, nr), transposed, viewed, start, height = place, False, False, 0, None
    while True:
        variable = variable_of(node)
        if variable is not None:
            return Simple(variable, transposed, start, height)
        node = Noted(node, notes.numbers.setdefault(node, {}))
        name = base_name(node)
        following = [(child, k) for child, k in node.next_functions if child is not None]
        if len(following) != 1:
            return None
        shape = tuple(node._input_metadata[nr].shape)
        # one view after another; what would need two of them undone in turn is given up
        if name in VIEWS:
            viewed = True
        elif name in ("T", "Transpose") and len(shape) in (2, 3):
            if viewed or transposed or height is not None:
                return None
            transposed = name == "T" or _last_two(node, len(shape))
            if len(shape) == 3 and not transposed:
                return None
        elif name == "Select":
            above = shape_of(following[0])
            # one of several matrices
            if viewed or height is not None or len(above) != 3 or wrap(node._saved_dim, 3) != 0:
                return None
            start = wrap(node._saved_index, above[0]) * above[1]
            height = above[0] * above[1]
        elif name in SPLITS or name == "Slice":
            above = shape_of(following[0])
            # only whole lines: a part of the first dimension, of a parameter not reshaped before
            if viewed or height is not None or wrap(node._saved_dim, len(shape)) != 0:
                return None
            if name == "Slice":
                start, step = node._saved_start, node._saved_step
                start = wrap(start, above[0])
                if step != 1:
                    return None
            else:
                start = sum(node._input_metadata[k].shape[0] for k in range(nr))
            height = above[0]
        elif name not in COPIES:
            return None
        node, nr = following[0]


def _last_two(node: Any, ndim: int) -> bool:
    """Whether a Transpose exchanges the last two dimensions."""
    return {wrap(node._saved_dim0, ndim), wrap(node._saved_dim1, ndim)} == {ndim - 2, ndim - 1}


def shape_of(place: Place) -> tuple[int, ...]:
    node, nr = place
    variable = variable_of(node)
    return tuple(variable.shape if variable is not None else node._input_metadata[nr].shape)
