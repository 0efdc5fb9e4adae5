"""Where samples come from: tensors in memory or a loader, as endless batches or in one pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from gradsurgery.batch import named_leaves, tensors
from gradsurgery.errors import InputError
from gradsurgery.unlearn.objectives.base import (
    Batch,
    batch_size,
    check_divisible,
    fresh,
    take,
    to_device,
)
from gradsurgery.unlearn.training.seeds import derived

Data = Any  # such a batch of all samples, or a DataLoader that yields batches


def count(data: Data, name: str) -> int:
    """Samples in `data`; `InputError` naming the set where there are none."""
    if isinstance(data, DataLoader):
        n = _loader_count(data, name)
    else:
        n = batch_size(data, name)
        check_divisible(data, name)
    if n == 0:
        raise InputError(f"{name}: no samples to draw batches from")
    return n


def _loader_count(loader: DataLoader, name: str) -> int:
    try:
        return len(loader.dataset)  # type: ignore[arg-type]  # one without a length is the error
    except TypeError:
        raise InputError(
            f"{name}: a loader's dataset must have a length: a stream has no epochs"
        ) from None


def drawn_size(batch: Batch, name: str) -> int:
    """`batch_size` of a batch that a loader made; `InputError` naming the set where it is 0."""
    n = batch_size(batch, name)
    if n == 0:
        raise InputError(f"{name}: the loader made a batch without samples")
    return n


def all_finite(batch: Batch) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors(batch))


def whole(data: Data, size: int, device: torch.device | None = None) -> Iterator[Batch]:
    """One pass over all samples, in batches of at most `size`, or as a loader makes them.

    On the device they are on, unless another is given.
    """
    parts = (
        iter(data)
        if isinstance(data, DataLoader)
        else (fresh(take(data, slice(at, at + size))) for at in range(0, batch_size(data), size))
    )
    return parts if device is None else (to_device(part, device) for part in parts)


def lone_sample(data: Data, size: int) -> Batch | None:
    """A batch of one sample, where batches of `size` are drawn of which one has only one.

    None too where that cannot be known: a loader whose sampler is not torch's own over a whole set
    or over given indices, or that makes its batches by other means.
    """
    if not isinstance(data, DataLoader):
        return take(data, slice(0, 1)) if min(size, batch_size(data)) == 1 else None
    made, known = data.batch_sampler, _indices(data, through=False)
    if type(made) is not BatchSampler or known is None or not known[1]:
        return None
    left = len(made.sampler) % made.batch_size == 1 and not made.drop_last  # type: ignore[arg-type]
    if not left and made.batch_size > 1:
        return None
    dataset, at = known
    with torch.random.fork_rng(devices=[]):
        return data.collate_fn([dataset[min(at)]])


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
            generator = torch.Generator().manual_seed(derived(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        self.drawn += 1
        return take(self.data, self._order[position * self.size : (position + 1) * self.size])

    def __iter__(self) -> Batches:
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class LoaderBatches:
    """Endless batches of a `DataLoader`, of its sizes and in its order, epoch after epoch.

    Its state has the generators' at the start of the epoch, so that a resumed run draws the same
    order again and passes over what was drawn; for that a loader's workers must not make samples
    of random draws of their own.
    """

    def __init__(self, loader: DataLoader, name: str) -> None:
        self.loader, self.name, self.drawn = loader, name, 0
        self.n = count(loader, name)
        self.size = loader.batch_size or self.n  # a batch sampler's batches have any size
        try:
            self.per_epoch = len(loader)
        except TypeError:
            raise InputError(f"{name}: the loader's sampler must have a length") from None
        if self.per_epoch == 0:
            raise InputError(
                f"{name}: the loader's sampler is empty, or it drops its only batch; use "
                "drop_last=False"
            )
        self._running: Iterator[Batch] = iter(())
        self._position = 0  # batches drawn of the epoch
        self._start: list[Tensor | None] = [None, None]  # the generators' states at its start

    def __next__(self) -> Batch:
        try:
            batch = next(self._running)
        except StopIteration:
            own = self.loader.generator
            self._start = [torch.get_rng_state(), None if own is None else own.get_state()]
            self._running, self._position = iter(self.loader), 0
            batch = next(self._running, None)
            if batch is None:  # not StopIteration, which would end a run
                raise InputError(f"{self.name}: the loader made no batch") from None
        self.drawn += 1
        self._position += 1
        return batch

    def __iter__(self) -> LoaderBatches:
        return self

    def state_dict(self) -> dict[str, Any]:
        start = list(self._start)
        return {"drawn": self.drawn, "position": self._position, "start": start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw the epoch again, up to where it was; the generators' states are the caller's to
        set."""
        own = self.loader.generator
        self._running, self._position = iter(()), 0
        general, special = state["start"]
        if general is not None:
            torch.set_rng_state(general)
            if own is not None and special is not None:
                own.set_state(special)
            for _ in range(state["position"]):
                next(self)
        self.drawn = state["drawn"]


def batches(data: Data, size: int, seed: int, name: str) -> Batches | LoaderBatches:
    if isinstance(data, DataLoader):
        return LoaderBatches(data, name)
    return Batches(data, size, seed, name)


def overlap(forget: Data, retain: Data) -> int:
    """How many samples of `forget` are in `retain` too.

    In memory, samples equal in every value are the same, whatever their dtypes; of loaders over
    parts of one dataset, those with one index. Of other loaders, and of samplers other than torch's
    over a whole set or over given indices, it cannot be known, and is 0.
    """
    if isinstance(forget, DataLoader) or isinstance(retain, DataLoader):
        indices = [_indices(data) for data in (forget, retain)]
        if indices[0] is None or indices[1] is None or indices[0][0] is not indices[1][0]:
            return 0
        return len(indices[0][1] & indices[1][1])
    kept = set(digests(retain))
    return sum(digest in kept for digest in digests(forget))


def _indices(data: Data, through: bool = True) -> tuple[Any, set[int]] | None:
    """The dataset that a loader draws from and the indices it draws; None if they are not known.

    `through`: of a `Subset`, those of what it is a part of.
    """
    if not isinstance(data, DataLoader):
        return None
    made = data.batch_sampler
    sampler = data.sampler if made is None else getattr(made, "sampler", None)
    if made is not None and type(made) is not BatchSampler:
        return None
    if isinstance(sampler, SubsetRandomSampler):
        at = [int(i) for i in sampler.indices]
    elif isinstance(sampler, (SequentialSampler, RandomSampler)):
        at = list(range(len(sampler.data_source)))
    else:
        return None
    dataset = data.dataset
    while through and isinstance(dataset, Subset):
        at, dataset = [int(dataset.indices[i]) for i in at], dataset.dataset
    return dataset, set(at)


def digests(data: Batch) -> list[bytes]:
    """One digest a sample, of all its values: 1.0 and 1 differ, and -0.0 is 0.0."""
    named = sorted(named_leaves(data), key=lambda item: item[0])
    leaves = [leaf for _, leaf in named if isinstance(leaf, Tensor)]
    digests = []
    for at in range(0, batch_size(data), 1024):  # a few at a time: a copy of all could be large
        rows = []
        for leaf in leaves:
            part = leaf[at : at + 1024].detach().cpu()
            if part.is_complex():
                part = torch.view_as_real(part.resolve_conj())
            flat = part.reshape(len(part), -1)
            flat = flat.double() + 0.0 if flat.is_floating_point() else flat.to(torch.int64)
            rows.append(flat.contiguous().view(torch.uint8).numpy())
        for sample in zip(*rows, strict=True):
            joined = b"".join(values.tobytes() for values in sample)
            digests.append(hashlib.blake2b(joined, digest_size=16).digest())
    return digests
