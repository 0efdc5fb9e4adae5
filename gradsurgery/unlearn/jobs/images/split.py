"""One seed's split of images: what is forgotten, what is kept, what no model is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.classifiers import LabeledSplit, divide
from gradsurgery.unlearn.jobs.images.arrays import Images
from gradsurgery.unlearn.jobs.images.data import numbers

Task = Literal["random", "class", "mislabeled", "confusion", "memorized", "ids"]
# the test set is one and the same for every seed, so no choice made on another seed's validation
# split can have seen a test sample; so are the samples to train with, where not all are
TEST_SEED = 20_260
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1  # of all samples, and of those that are left


@dataclass(frozen=True)
class Wanted:
    """What a task forgets, as the options say."""

    task: Task
    forget_class: str | None  # by its name; None: the seed's
    confused: tuple[str, ...]  # two classes by their names; (): the seed's
    percent: float  # of the training samples; with confusion, of those of the two classes
    ids: Path | None
    samples: int | None = None  # to train with; None: all
    # of samples, by their numbers, how much is known by heart, [N]
    memorization: Callable[[Tensor], Tensor] | None = None


def split(images: Images, samples: dict[str, Tensor], wanted: Wanted, seed: int) -> LabeledSplit:
    """Split a data set for one seed.

    Test and validation are the data set's own parts, where it has them. Otherwise test is a fifth
    of all samples, the same for every seed, and validation a tenth of the rest, drawn by the seed,
    both stratified by class; training samples are all others. Samples of --ids are always training
    samples.

    Args:
        samples: the data set as a classifier takes it, "image" and "label".

    Raises:
        InputError: naming the option that cannot be served with these data.
    """
    named = numbers(wanted.ids, images) if wanted.ids is not None else torch.tensor([]).long()
    train, held_out = _parts(images, named, wanted.samples, seed)
    labels = images.labels[train]
    generator = torch.Generator().manual_seed(seed)
    wrong = None
    chosen: list[int] = []
    if wanted.task == "ids":
        forgotten = torch.isin(train, named)
    elif wanted.task == "class":
        chosen = [_class(images, "forget-class", wanted.forget_class, seed)]
        forgotten = labels == chosen[0]
    elif wanted.task == "confusion":
        pair = wanted.confused or (None, None)
        chosen = [_class(images, "confused", name, seed + k) for k, name in enumerate(pair)]
        forgotten = _drawn((labels == chosen[0]) | (labels == chosen[1]), wanted.percent, generator)
        wrong = sum(chosen) - labels[forgotten]
    elif wanted.task == "memorized" and wanted.memorization is not None:
        every = (
            train if "validation" in images.parts else torch.cat([train, held_out["validation"]])
        )
        every = every.sort().values  # the same for every seed
        scores = torch.zeros(len(images.labels), dtype=torch.float64)
        scores[every] = wanted.memorization(every)
        count = round(wanted.percent / 100 * len(train))
        forgotten = torch.zeros(len(train), dtype=torch.bool)
        forgotten[scores[train].argsort(descending=True, stable=True)[:count]] = True
    else:
        forgotten = _drawn(torch.ones(len(train), dtype=torch.bool), wanted.percent, generator)
        if wanted.task == "mislabeled":
            classes = len(images.classes)
            shift = torch.randint(1, classes, (int(forgotten.sum()),), generator=generator)
            wrong = (labels[forgotten] + shift) % classes
    if not bool(forgotten.any()) or bool(forgotten.all()):
        what = "none" if not bool(forgotten.any()) else "all"
        raise InputError(f"--task {wanted.task} would forget {what} of {len(train)} samples")
    found = divide(
        samples, train, held_out, forgotten, wrong, chosen[0] if wanted.task == "class" else None
    )
    for name in ("validation", "test"):
        if wanted.task == "class" and len(found.held_out(name)[0]["label"]) == 0:
            raise InputError(f"--data: {name} has samples of {images.classes[chosen[0]]} alone")
    # a folder's name may be no text that a JSON file can hold
    of = " and ".join(show(images.classes[each], 80) for each in chosen)
    return replace(found, about={"class": of or None})


def _parts(
    images: Images, named: Tensor, samples: int | None, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Numbers of the training samples, and of those of either held-out set."""
    held_out = {name: images.parts[name] for name in ("validation", "test") if name in images.parts}
    for name, part in held_out.items():
        both = part[torch.isin(part, named)]
        if len(both):
            sample = images.names[int(both[0])] if images.names else int(both[0])
            raise InputError(
                f"--ids: {show(sample)} is a {name} sample, which no model is trained on"
            )
    pool = images.parts.get("train", torch.arange(len(images.labels)))
    pool = pool[~torch.isin(pool, named)]
    if "test" not in held_out:
        size = TEST_SHARE * len(pool)
        pool, held_out["test"] = _stratified(images, pool, size, TEST_SEED, "a test set")
    if samples is not None:
        size = samples - len(named)
        if not 0 < size <= len(pool):
            some = "" if not len(named) else f" beside {len(named)} of --ids"
            raise InputError(
                f"--train-samples must be of the {len(pool):,} there are{some}, got {samples:,}"
            )
        if size < len(pool):
            _, pool = _stratified(images, pool, size, TEST_SEED, "training samples")
    if "validation" not in held_out:
        size = VALIDATION_SHARE * len(pool)
        pool, held_out["validation"] = _stratified(images, pool, size, seed, "a validation set")
    return torch.cat([pool, named]), held_out


def _stratified(
    images: Images, pool: Tensor, wanted: float, seed: int, what: str
) -> tuple[Tensor, Tensor]:
    """What is left of a pool, and about `wanted` samples of it, of every class its share."""
    from sklearn.model_selection import train_test_split

    labels = images.labels[pool]
    counts = torch.bincount(labels, minlength=len(images.classes))
    counts = counts[counts > 0]
    size = max(round(wanted), len(counts))
    if len(counts) < 2 or int(counts.min()) < 2 or size > len(pool) - len(counts):
        raise InputError(
            f"--data: {len(pool)} samples of {len(counts)} classes are too few to draw {what} "
            "with some of each class"
        )
    left, drawn = train_test_split(
        np.arange(len(pool)), test_size=size, stratify=labels.numpy(), random_state=seed
    )
    return pool[torch.as_tensor(left)], pool[torch.as_tensor(drawn)]


def _class(images: Images, option: str, name: str | None, seed: int) -> int:
    """The number of a class; the seed's where none is named."""
    if name is None:
        return seed % len(images.classes)
    if name not in images.classes:
        known = ", ".join(images.classes[:20])
        raise InputError(
            f"--{option}: there is no class {show(name, 80)}, only {show(known)}"
            + (f" and {len(images.classes) - 20} more" if len(images.classes) > 20 else "")
        )
    return images.classes.index(name)


def _drawn(among: Tensor, percent: float, generator: torch.Generator) -> Tensor:
    """A share of the samples where `among` is true, drawn at random, as a mask."""
    candidates = among.nonzero().squeeze(1)
    count = round(percent / 100 * len(candidates))
    order = torch.randperm(len(candidates), generator=generator)
    mask = torch.zeros(len(among), dtype=torch.bool)
    mask[candidates[order[:count]]] = True
    return mask
