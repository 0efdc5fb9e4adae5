"""Data and model of the digits job: scikit-learn's 1,797 real handwritten digits, a small CNN."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.classifiers import LabeledSplit, divide
from gradsurgery.unlearn.jobs.networks import SmallCNN

Task = Literal["mislabeled", "class", "random"]
CLASSES = 10
MISLABELED = 100  # training samples given a wrong label
RANDOM_PERCENT = 10.0  # of the training samples
TEST_SIZE, VALIDATION_SIZE, TRAIN_SIZE = 360, 180, 1257
# the test set is one and the same for every seed, so no choice made on another seed's validation
# split can have seen a test sample
TEST_SEED = 20_260


class DigitsCNN(SmallCNN):
    """124,426 parameters, [B, 1, 8, 8] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__(1, (8, 8), CLASSES)


def random_count(percent: float) -> int:
    """How many of the training samples `percent` of them are; at least one must go and one stay."""
    if not 0 < percent < 100:
        raise InputError(f"--random-percent must be in (0, 100), got {percent:g}")
    count = round(percent / 100 * TRAIN_SIZE)
    if not 0 < count < TRAIN_SIZE:
        raise InputError(
            f"--random-percent must leave at least one of {TRAIN_SIZE} training samples to forget "
            f"and one to retain, got {percent:g}"
        )
    return count


def load(
    task: str,
    seed: int,
    forget_class: int | None = None,
    random_percent: float = RANDOM_PERCENT,
) -> LabeledSplit:
    """Split the digits for one seed.

    Test (360) is fixed; validation (180) and training (1,257) are drawn from the rest by `seed`,
    all stratified by class. What to forget: mislabeled, 100 training samples each given another
    label drawn uniformly; class, every training sample of `forget_class` (by default `seed` modulo
    10); random, `random_percent` of the training samples.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if task not in get_args(Task):
        raise InputError(f"--task must be one of {', '.join(get_args(Task))}, got {task}")
    if forget_class is not None and not 0 <= forget_class < CLASSES:
        raise InputError(f"--forget-class must be a digit from 0 to 9, got {forget_class}")
    if forget_class is not None and task != "class":
        raise InputError(f"--forget-class applies to --task class only, got --task {task}")

    images, labels = load_digits(return_X_y=True)
    data = {
        "image": torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16,
        "label": torch.tensor(labels, dtype=torch.int64),
    }
    everything = torch.arange(len(labels)).numpy()
    pool, test = train_test_split(
        everything, test_size=TEST_SIZE, stratify=labels, random_state=TEST_SEED
    )
    train, validation = train_test_split(
        pool, test_size=VALIDATION_SIZE, stratify=labels[pool], random_state=seed
    )
    train = torch.as_tensor(train)
    train_labels = data["label"][train]

    generator = torch.Generator().manual_seed(seed)
    if task == "class":
        forget_class = seed % CLASSES if forget_class is None else forget_class
        forgotten = train_labels == forget_class
    else:
        count = MISLABELED
        if task == "random":
            count = random_count(random_percent)
        forgotten = torch.zeros(len(train), dtype=torch.bool)
        forgotten[torch.randperm(len(train), generator=generator)[:count]] = True
    wrong = None
    if task == "mislabeled":
        true_labels = train_labels[forgotten]
        shift = torch.randint(1, CLASSES, true_labels.shape, generator=generator)
        wrong = (true_labels + shift) % CLASSES
    held_out = {"validation": torch.as_tensor(validation), "test": torch.as_tensor(test)}
    return divide(data, train, held_out, forgotten, wrong, forget_class)
