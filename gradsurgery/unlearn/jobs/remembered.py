"""What models said of samples, of which those last asked for are not computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

LAST = 8  # answers that are remembered: of two models on four sets

T = TypeVar("T")


class Remembered(Generic[T]):
    """A function (model, samples) -> T with a memory: all models of a seed are measured beside one
    Retrain, and each of them for several numbers.

    A model is known by its weights, samples by being the same object.
    """

    def __init__(self, compute: Callable[[nn.Module, Any], T]) -> None:
        self._compute = compute
        self._known: list[tuple[str, Any, T]] = []

    def __call__(self, model: nn.Module, samples: Any) -> T:
        weights = digest(*model.parameters(), *model.buffers())
        for at, (theirs, of, _) in enumerate(self._known):
            if theirs == weights and of is samples:
                found = self._known.pop(at)
                break
        else:
            found = weights, samples, self._compute(model, samples)
        self._known = [found, *self._known][:LAST]
        return found[2]


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the values of tensors, in their order."""
    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)  # a count has no dimension to view
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
