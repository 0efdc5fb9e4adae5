"""Query sets: batches of retain samples that differ in their classes, or in how images lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.unlearn.objectives.base import Batch, Objective
from gradsurgery.unlearn.objectives.classification import Classification


def dealt(classes: Tensor, sets: int, generator: torch.Generator) -> list[Tensor]:
    """Which of B >= `sets` samples are in which set, of nearly equal sizes: indices, in order.

    Sets share no class, where there are as many classes as sets; which class goes with which is
    drawn. Where there are fewer, samples in the order of their classes are cut evenly.

    Args:
        classes: of each sample, whole numbers [B].
    """
    known, inverse, counts = classes.cpu().unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(known), generator=generator)
    ends = counts[order].cumsum(0).tolist()  # of classes, in the order drawn
    wanted = [len(classes) * k / sets for k in range(1, sets)]
    cuts = [round(cut) for cut in wanted]
    if len(known) >= sets:
        first = 0  # of the classes that the next set may end with
        for k, cut in enumerate(wanted):
            some = range(first, len(known) - sets + k + 1)  # which leaves one for each of the rest
            chosen = min(some, key=lambda at: abs(ends[at] - cut))
            cuts[k], first = ends[chosen], chosen + 1
    samples = order.argsort()[inverse].argsort(stable=True)
    parts = samples.tensor_split(cuts)
    return [part.sort().values.to(classes.device) for part in parts]


def shifted(batch: Batch, generator: torch.Generator, objective: Objective | None = None) -> Batch:
    """Images [B, C, H, W] moved by up to an eighth of their height and width, zeros moving in."""
    task = objective or Classification()
    images = task.inputs(batch)
    if not isinstance(images, Tensor) or images.dim() != 4:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"split='augmentation' moves images [B, C, H, W], got {got}: give augment")
    height, width = images.shape[2:]
    reach = max(height // 8, 1), max(width // 8, 1)
    padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]))
    tops, lefts = (
        torch.randint(2 * most + 1, (len(images),), generator=generator).tolist() for most in reach
    )
    moved = [
        image[:, top : top + height, left : left + width]
        for image, top, left in zip(padded, tops, lefts, strict=True)
    ]
    return task.with_inputs(batch, torch.stack(moved))
