"""Values of samples by id, and means that add up: over batches, over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from gradsurgery.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Sums:
    """A mean as what adds up: a mean of means would weigh batches, and not what is in them.

    Attributes:
        total: the sum of the values.
        number: how many there are.
    """

    total: float = 0.0
    number: int = 0

    @classmethod
    def of(cls, values: Mapping[int, float] | Iterable[float]) -> Sums:
        """Of the values by sample id, or of any; the same in any order."""
        known = list(values.values() if isinstance(values, Mapping) else values)
        return cls(math.fsum(known), len(known))

    def add(self, total: float, number: int = 1) -> Sums:
        """With more of them."""
        return Sums(self.total + total, self.number + number)

    def __add__(self, other: Sums) -> Sums:
        return self.add(other.total, other.number)

    @property
    def mean(self) -> float:
        """Total over number.

        Raises:
            InputError: nothing was added.
        """
        if not self.number:
            raise InputError("a mean of no sample: nothing was added up")
        return self.total / self.number


def merged(*parts: Mapping[int, T]) -> dict[int, T]:
    """Values by sample id, of several batches or processes, in the order of the ids.

    A sample that came several times, as where a sampler fills up the last batch, counts once, as it
    first came.
    """
    found: dict[int, T] = {}
    for part in parts:
        for sample, value in part.items():
            found.setdefault(sample, value)
    return dict(sorted(found.items()))


def gathered(values: Mapping[int, T]) -> dict[int, T]:
    """`merged` values of all processes of torch.distributed, in each; where there is one, its own.

    The values must be picklable, and on no GPU.
    """
    parts: list[Mapping[int, T]] = [values]
    if ranks() > 1:
        parts = [{} for _ in range(ranks())]
        dist.all_gather_object(parts, dict(values))
    return merged(*parts)


def ranks() -> int:
    """How many processes of torch.distributed there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
