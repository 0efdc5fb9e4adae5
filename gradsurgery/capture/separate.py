"""Losses taken apart into passes in each of which samples do not meet."""

import torch
from torch import Tensor

from gradsurgery.capture.carriers import base_name
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.views import shape_of


def separate(losses: Tensor, rows: RowNumbers) -> list[RowNumbers]:
    """The rows of each pass, -1 for losses of other passes; [] where there is nothing to separate.

    Losses of several dimensions, as of tokens, get a pass for each index of the trailing ones.
    Those that were stacked or concatenated get one for each tensor that went in.
    """
    shape, tensor = losses.shape, rows.tensor
    if len(shape) > 1:
        trailing = torch.arange(len(rows), device="cpu") % shape[1:].numel()
        parts = [torch.where(trailing == k, tensor, -1) for k in range(shape[1:].numel())]
        return [RowNumbers(part) for part in parts]
    node = losses.grad_fn
    if node is None or base_name(node) not in ("Stack", "Cat"):
        return []
    sizes = [1] * len(rows)
    if base_name(node) == "Cat":
        sizes = [0 if c is None else shape_of((c, nr))[0] for c, nr in node.next_functions]
        if sum(sizes) != len(rows):
            return []
    # losses lie as they were put together: one tensor's after another's
    parts, start = [], 0
    for size in sizes:
        part = torch.full_like(tensor, -1)
        part[start : start + size] = tensor[start : start + size]
        parts.append(RowNumbers(part))
        start += size
    return parts
