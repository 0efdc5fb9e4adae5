"""Where samples come from: tensors in memory or a loader, as endless batches or in one pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Subset

from gradsurgery.errors import InputError

Batch = Any  # pytree of tensors that share their leading dimension B
Data = Any  # such a pytree of all samples, or a DataLoader that yields batches


def batch_size(batch: Batch) -> int:
    """Leading dimension shared by every tensor of `batch`."""
    sizes = {leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)}
    if len(sizes) != 1:
        raise InputError(f"batch: tensors must share one leading dimension, got {sorted(sizes)}")
    return sizes.pop()


def take(batch: Batch, indices: Tensor | slice) -> Batch:
    """The samples `indices` of a pytree of tensors."""
    return pytree.tree_map_only(Tensor, lambda leaf: leaf[indices], batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), batch)


def count(data: Data, name: str) -> int:
    """Samples in `data`; `InputError` naming the set where there are none."""
    n = _loader_count(data) if isinstance(data, DataLoader) else batch_size(data)
    if n == 0:
        raise InputError(f"{name}: no samples to draw batches from")
    return n


def _loader_count(loader: DataLoader) -> int:
    try:
        return len(loader.dataset)  # type: ignore[arg-type]
    except TypeError:
        raise InputError("a loader's dataset must have a length: a stream has no epochs") from None


def whole(data: Data, size: int, device: torch.device) -> Iterator[Batch]:
    """One pass over all samples, in batches of at most `size`, or as a loader makes them."""
    parts = (
        iter(data)
        if isinstance(data, DataLoader)
        else (take(data, slice(at, at + size)) for at in range(0, batch_size(data), size))
    )
    return (to_device(part, device) for part in parts)


class Batches:
    """Endless shuffled batches of tensors in memory, whose whole state is a counter.

    Epoch e is shuffled by a generator seeded with (seed, e), so the t-th batch depends on t alone
    and a resumed run sees what the interrupted one would have seen. A remainder smaller than a
    batch is left out of its epoch, hence every batch has the same size, min(size, N).
    """

    def __init__(self, data: Batch, size: int, seed: int, name: str = "data") -> None:
        self.data, self.seed, self.drawn = data, seed, 0
        self.n = count(data, name)
        self.size = min(size, self.n)
        self.per_epoch = self.n // self.size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __next__(self) -> Batch:
        epoch, position = divmod(self.drawn, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        self.drawn += 1
        return take(self.data, self._order[position * self.size : (position + 1) * self.size])

    def __iter__(self) -> Batches:
        return self

    def skip(self, drawn: int) -> None:
        """Go to where `drawn` batches have been drawn."""
        self.drawn = drawn


class LoaderBatches:
    """Endless batches of a `DataLoader`, of its sizes and in its order, epoch after epoch.

    A resumed run sees the same samples only where the loader's order is the same each time.
    """

    def __init__(self, loader: DataLoader, name: str) -> None:
        self.loader, self.drawn = loader, 0
        self.n = count(loader, name)
        self.size = loader.batch_size or 1
        self.per_epoch = len(loader)
        if self.per_epoch == 0:
            raise InputError(f"{name}: the loader drops its only batch; use drop_last=False")
        self._running: Iterator[Batch] = iter(())

    def __next__(self) -> Batch:
        try:
            batch = next(self._running)
        except StopIteration:
            self._running = iter(self.loader)
            batch = next(self._running)
        self.drawn += 1
        return batch

    def __iter__(self) -> LoaderBatches:
        return self

    def skip(self, drawn: int) -> None:
        """Go to where `drawn` batches have been drawn, by drawing them."""
        while self.drawn < drawn:
            next(self)


def batches(data: Data, size: int, seed: int, name: str) -> Batches | LoaderBatches:
    if isinstance(data, DataLoader):
        return LoaderBatches(data, name)
    return Batches(data, size, seed, name)


def overlap(forget: Data, retain: Data) -> int:
    """How many samples of `forget` are in `retain` too.

    In memory, samples equal in every value are the same; of loaders over parts of one dataset,
    those with one index. Of other loaders it cannot be known, and is 0.
    """
    if isinstance(forget, DataLoader) or isinstance(retain, DataLoader):
        indices = [_indices(data) for data in (forget, retain)]
        if any(found is None for found in indices) or indices[0][0] is not indices[1][0]:
            return 0
        return len(indices[0][1] & indices[1][1])
    kept = set(_digests(retain))
    return sum(digest in kept for digest in _digests(forget))


def _indices(data: Data) -> Any:
    """The dataset a loader takes a part of, and the indices of that part."""
    if not isinstance(data, DataLoader):
        return None
    dataset = data.dataset
    if isinstance(dataset, Subset):
        return dataset.dataset, {int(i) for i in dataset.indices}
    return dataset, set(range(_loader_count(data)))


def _digests(data: Batch) -> list[bytes]:
    """One digest a sample, of all its values."""
    leaves = [leaf for leaf in pytree.tree_leaves(data) if isinstance(leaf, Tensor)]
    rows = [
        leaf.detach().cpu().reshape(len(leaf), -1).contiguous().view(torch.uint8) for leaf in leaves
    ]
    return [
        hashlib.blake2b(b"".join(row[i].numpy().tobytes() for row in rows), digest_size=16).digest()
        for i in range(batch_size(data))
    ]
