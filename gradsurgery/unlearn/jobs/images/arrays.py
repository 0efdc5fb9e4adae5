"""What all sources of images have in common: sizes, values, labels and parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gradsurgery.errors import InputError

LARGEST = 8 * 2**30  # bytes of a data set, which is held in memory
CHUNK = 1024  # images that are made floats at once
# the parts that a data set may have, by the words that name them
WORDS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Images:
    """Images with labels, all in memory."""

    images: Tensor  # [N, C, H, W] float32 in [0, 1]
    labels: Tensor  # [N] int64 in [0, len(classes))
    classes: tuple[str, ...]
    names: tuple[str, ...] | None  # paths below the data folder; None: samples have numbers alone
    # sample numbers of "train", "validation" and "test", of those there are; {}: it is one set
    parts: dict[str, Tensor]
    title: str  # what it is, for reports


@dataclass(frozen=True)
class Part:
    """Images and labels as they are stored, and what messages call them."""

    images: np.ndarray  # [n, C, H, W], numbers
    labels: np.ndarray  # [n] integers
    images_from: str
    labels_from: str


def in_parts(counts: dict[str, int]) -> dict[str, Tensor]:
    """Sample numbers by part, of parts that follow each other; {} of one alone."""
    if len(counts) == 1:
        return {}
    numbers = torch.arange(sum(counts.values())).split(list(counts.values()))
    return dict(zip(counts, numbers, strict=True))


def require_room(
    count: int, channels: int, height: int, width: int, size: int | None, itemsize: int
) -> None:
    """Raise `InputError` where images are too large to be read, or to be held as float32.

    Args:
        height, width: as stored, with `itemsize` bytes a value.
        size: what they become, `size` x `size`, if that is given.
    """
    read = count * channels * height * width * itemsize
    held = count * channels * (size * size if size else height * width) * 4
    if max(read, held) > LARGEST:
        asked = f" made {size} x {size}" if size else ""
        advice = "; --size N makes them N x N pixels" if held > LARGEST >= read else ""
        raise InputError(
            f"--data: {count:,} images of {height} x {width} pixels{asked} take "
            f"{max(read, held) / 2**30:,.1f} GiB, more than the {LARGEST / 2**30:g} GiB that are "
            f"held in memory{advice}"
        )


def assemble(parts: dict[str, Part], most: float, size: int | None, title: str) -> Images:
    """One data set of parts, "train" first.

    Args:
        most: what is white; values are divided by it.
        size: images become `size` x `size`, bilinearly, smoothed where they shrink.

    Raises:
        InputError: naming a part that is empty, of another shape than "train", without a label for
            each image or with labels of its own; or a single class.
    """
    first = parts["train"]
    for part in parts.values():
        if not part.images.size:
            raise InputError(f"--data: {part.images_from} holds no images")
        if len(part.labels) != len(part.images):
            raise InputError(
                f"--data: {part.labels_from} has {len(part.labels):,} labels for the "
                f"{len(part.images):,} images of {part.images_from}"
            )
        if part.images.shape[1:] != first.images.shape[1:]:
            shapes = [list(p.images.shape[1:]) for p in (first, part)]
            raise InputError(
                f"--data: {first.images_from} and {part.images_from} must have images of one shape,"
                f" got {shapes[0]} and {shapes[1]}"
            )
    classes = np.unique(first.labels)
    if len(classes) < 2:
        raise InputError(f"--data: {first.labels_from} has one class alone, {classes[0]}")
    for part in parts.values():
        unknown = np.setdiff1d(part.labels, classes)
        if len(unknown):
            raise InputError(
                f"--data: {part.labels_from} has the label {unknown[0]}, which "
                f"{first.labels_from} has not"
            )
    counts = {name: len(part.images) for name, part in parts.items()}
    _, channels, height, width = first.images.shape
    require_room(sum(counts.values()), channels, height, width, size, first.images.itemsize)
    to = (size, size) if size else (height, width)
    images = torch.empty(sum(counts.values()), channels, *to)
    filled = 0
    for part in parts.values():
        for start in range(0, len(part.images), CHUNK):
            some = torch.from_numpy(part.images[start : start + CHUNK].astype(np.float32) / most)
            if some.shape[2:] != to:  # rounding would make white more than 1
                some = F.interpolate(some, to, mode="bilinear", antialias=True).clamp_(0, 1)
            images[filled : filled + len(some)] = some
            filled += len(some)
    labels = np.searchsorted(classes, np.concatenate([part.labels for part in parts.values()]))
    labels = torch.from_numpy(labels).long()
    return Images(images, labels, tuple(map(str, classes)), None, in_parts(counts), title)
