"""The sets of a run: looked at before it begins and as they are drawn from, and counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradsurgery.batch import map_batch
from gradsurgery.errors import InputError
from gradsurgery.unlearn.objectives import classification
from gradsurgery.unlearn.objectives.base import Batch, Objective, batch_size, to_device
from gradsurgery.unlearn.training.data import (
    Batches,
    Data,
    LoaderBatches,
    all_finite,
    batches,
    count,
    drawn_size,
    lone_sample,
    overlap,
    whole,
)

LONE = "Expected more than 1 value per channel when training"  # as torch says it of batch norm


class Sets:
    """Samples to forget, to retain and held out, each with what is known of it.

    Args:
        data: by name, "forget" and others, each as in `Trainer` or None.
        labeled: the sets whose labels must be integers. In memory all are looked at here, of a
            loader those of each batch.
        needed: the sets that must be there.
        overlapping: "error" or "allow", as in `Trainer`.
        owner: who asks, for the errors.
        objective: says the labels.
    """

    def __init__(
        self,
        data: dict[str, Data],
        labeled: Collection[str],
        needed: Collection[str],
        overlapping: Literal["error", "allow"],
        owner: str,
        objective: Objective,
    ) -> None:
        self.data, self.labeled, self.objective = data, labeled, objective
        self.samples = dict.fromkeys(data, 0)  # seen of each set, with repetitions
        self.batches: dict[str, Batches | LoaderBatches] = {}
        self.drawn: dict[str, Batch] = {}  # of each set the last batch of this step, latest last
        self._labels: dict[str, tuple[int, int]] = {}  # the least and the largest of each set
        for kind in needed:
            if data[kind] is None:
                raise InputError(f"{kind}: {owner} needs this data, got None")
        given = {kind: samples for kind, samples in data.items() if samples is not None}
        for kind, samples in given.items():
            count(samples, kind)
            if not isinstance(samples, DataLoader):
                self._note_labels(kind, samples)
        if overlapping == "allow" or "forget" not in given:
            return
        forget = given.pop("forget")
        for kind, samples in given.items():
            both = overlap(forget, samples)
            if both:
                raise InputError(
                    f"forget and {kind} overlap: {both} samples are in both; if they are "
                    'duplicates that should be, overlap="allow" goes on'
                )

    def draw_from(self, kind: str, size: int, seed: int) -> None:
        """Make the endless batches that `draw` takes."""
        self.batches[kind] = batches(self.data[kind], size, seed, kind)

    def draw(self, kind: str, device: torch.device) -> Batch:
        return self._received(kind, next(self.batches[kind]), device)

    def whole(self, kind: str, size: int, device: torch.device) -> Iterator[Batch]:
        batch = None
        for batch in whole(self.data[kind], size):
            yield self._received(kind, batch, device)
        if batch is None:
            raise InputError(f"{kind}: the loader made no batch")

    def _received(self, kind: str, batch: Batch, device: torch.device) -> Batch:
        if isinstance(self.data[kind], DataLoader):  # what is in memory was looked at before
            self.samples[kind] += drawn_size(batch, kind)
            self._note_labels(kind, batch)
        else:
            self.samples[kind] += batch_size(batch)
        self.drawn.pop(kind, None)
        # a graph that the samples are of would be walked by every backward pass
        self.drawn[kind] = map_batch(lambda tensor: tensor.detach().to(device), batch)
        return self.drawn[kind]

    def _note_labels(self, kind: str, batch: Batch) -> None:
        if kind not in self.labeled:
            return
        try:
            known = self.objective.classes(batch)
        except InputError as error:
            raise InputError(f"{kind}: {error}") from None
        least, most = int(known.min()), int(known.max())
        if least < 0:
            raise InputError(f"{kind}: labels must be at least 0, got {least}")
        self._labels[kind] = least, most

    def check_labels(self, classes: int) -> None:
        """Raise `InputError` naming a set of which a label seen so far is none of the classes."""
        for kind, (least, most) in self._labels.items():
            classification.check_range(least, most, classes, f"{kind}: labels")

    # -- what a step that failed can blame

    def latest(self) -> str:
        """The set that was drawn from last."""
        return next(reversed(self.drawn), "forget")

    def not_finite(self) -> list[str]:
        """The sets of whose present batch a value is not finite."""
        return [kind for kind, batch in self.drawn.items() if not all_finite(batch)]

    def lone(self) -> InputError:
        """The error of a batch of one sample in this step, which batch norm could not take."""
        alone = [kind for kind, batch in self.drawn.items() if batch_size(batch) == 1]
        return _lone(" and ".join(alone or self.drawn))

    def check_lone(
        self,
        kinds: Collection[str],
        model: nn.Module,
        loss: Callable[[nn.Module, Batch], Tensor],
        device: torch.device,
    ) -> None:
        """Raise `InputError` naming a set of which a batch to come has one sample that batch norm
        in training mode cannot take, as far as that can be known; nothing changes."""
        for kind in kinds:
            try:
                sample = lone_sample(self.data[kind], self.batches[kind].size)
                if sample is None:
                    continue
                twin = copy.deepcopy(model).train()
                cuda = [device] if device.type == "cuda" else []
                with torch.no_grad(), torch.random.fork_rng(cuda):
                    loss(twin, to_device(sample, device))
            except Exception as error:  # any other is for the step to raise
                if LONE in str(error):
                    raise _lone(kind) from None


def _lone(kind: str) -> InputError:
    return InputError(
        f"{kind}: a batch of one sample, which batch norm in training mode cannot normalize: use "
        "drop_last=True or another batch size, or batch_norm='eval'"
    )
