"""What every task says of batches: their size, parts and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.batch import map_batch, named_leaves, refilled, tensors
from gradsurgery.errors import InputError

Batch = Any  # tensors that share their leading dimension B, in what `gradsurgery.batch` opens
PerSampleLoss = Callable[[nn.Module, Batch], Tensor]  # -> losses [B]


def batch_size(batch: Batch, name: str = "batch") -> int:
    """Leading dimension shared by every tensor of `batch`; what is no tensor does not count.

    Raises:
        InputError: naming the batch, where its tensors have none or different ones or no values.
    """
    sizes = set()
    for _, leaf in named_leaves(batch):
        if isinstance(leaf, Tensor):
            if leaf.dim() == 0:
                raise InputError(f"{name}: tensors must have a leading dimension, got a scalar")
            if leaf.is_meta or leaf.layout != torch.strided or leaf.is_nested:
                kind = "meta" if leaf.is_meta else "nested" if leaf.is_nested else "sparse"
                raise InputError(f"{name}: tensors must be dense and have values, got a {kind} one")
            sizes.add(leaf.shape[0])
        elif type(leaf).__module__ == "numpy":
            raise InputError(f"{name} holds a numpy array: torch.from_numpy makes it a tensor")
    where = name if name == "batch" else f"{name}: batch"
    if not sizes:
        got = type(batch).__name__
        raise InputError(
            f"{where} holds no tensor, got {got}: a Dataset goes into a DataLoader, "
            "whose collate_fn makes tensors"
        )
    if len(sizes) != 1:
        raise InputError(f"{where}: tensors must share one leading dimension, got {sorted(sizes)}")
    return sizes.pop()


def check_divisible(batch: Batch, name: str = "batch") -> None:
    """Raise `InputError` unless all of `batch` is tensors, which alone can be taken apart."""
    for label, leaf in named_leaves(batch):
        if not isinstance(leaf, Tensor) and leaf is not None:
            got = type(leaf).__name__
            raise InputError(
                f"{name} must hold tensors to be taken apart into batches, got {got} at {label}; "
                "a DataLoader's batches go as they are"
            )


def take(batch: Batch, indices: Tensor | slice) -> Batch:
    """The samples `indices` of a batch, whose tensors share their leading dimension."""
    check_divisible(batch)
    return map_batch(lambda tensor: tensor[indices], batch)


def fresh(batch: Batch) -> Batch:
    """A copy, for a network that changes its inputs in place."""
    return map_batch(lambda tensor: tensor.clone(), batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return map_batch(lambda tensor: tensor.to(device), batch)


def joined(first: Batch, second: Batch) -> Batch:
    """The samples of two batches of one form, those of the first before those of the second."""
    pairs = zip(tensors(first), tensors(second), strict=True)
    return refilled(first, [torch.cat(pair) for pair in pairs])
