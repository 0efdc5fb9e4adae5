"""The digits job: unlearn some of scikit-learn's handwritten digits, compare with retraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from gradsurgery.unlearn.jobs.base import JobConfig, Summary, Texts, with_weights
from gradsurgery.unlearn.jobs.classifiers import NUMBERS, ClassifierJob, LabeledSplit, counted
from gradsurgery.unlearn.jobs.digits import data
from gradsurgery.unlearn.jobs.digits.data import DigitsCNN
from gradsurgery.unlearn.training.seeds import seeded
from gradsurgery.unlearn.training.trainer import require


@dataclass
class DigitsConfig(JobConfig):
    """Unlearn part of scikit-learn's handwritten digits and compare with retraining without it."""

    task: data.Task = "mislabeled"
    """What to forget: 100 training samples with wrong labels, one class, or some at random."""
    forget_class: int | None = None
    """Digit to forget with --task class; none: the seed modulo 10."""
    random_percent: float = data.RANDOM_PERCENT
    """Training samples to forget with --task random, in percent, in (0, 100)."""
    second_retrain: bool = True

    def check(self) -> None:
        super().check()
        if self.forget_class is not None:
            require(self.task == "class", "task", "class where --forget-class is given", self.task)
            in_range = 0 <= self.forget_class < data.CLASSES
            require(in_range, "forget-class", "a digit from 0 to 9", self.forget_class)
        if self.random_percent != data.RANDOM_PERCENT:
            wanted = "random where --random-percent is given"
            require(self.task == "random", "task", wanted, self.task)
            data.random_count(self.random_percent)


TITLES = {
    "mislabeled": "Unlearning mislabeled digits",
    "class": "Unlearning one digit",
    "random": "Unlearning random digits",
}
MADE_UP = {
    "mislabeled": "The wrong labels are made up: 100 training samples each get another, at random.",
    "class": "Nothing in them is made up.",
    "random": "Nothing in them is made up.",
}


class DigitsJob(ClassifierJob[DigitsConfig]):
    name = "digits"
    about = "real handwritten digits: mislabeled samples, a class, random samples"
    Config = DigitsConfig
    tasks = get_args(data.Task)

    def split(self, config: DigitsConfig, seed: int) -> LabeledSplit:
        return data.load(config.task, seed, config.forget_class, config.random_percent)

    def model(self, config: DigitsConfig, seed: int = 0) -> nn.Module:
        with seeded(seed, torch.device("cpu")):
            return DigitsCNN()

    def texts(self, summary: Summary) -> Texts:
        task, sets = summary["task"], list(summary["forget_sets"].values())
        digits = sorted({entry["class"] for entry in sets if entry["class"] is not None})
        size = counted(entry["samples"] for entry in sets)
        forgotten = {
            "mislabeled": f"{size} training samples with wrong labels",
            "class": f"every training sample of digit {', '.join(map(str, digits))} ({size} samples"
            + (", one digit a seed)" if len(digits) > 1 else ")"),
            "random": f"{size} training samples drawn at random",
        }[task]
        return Texts(
            title=TITLES[task],
            forgotten=forgotten,
            real="The images are real: 1,797 digits written by hand, from scikit-learn (UCI's "
            "Optical Recognition of Handwritten Digits). Test is one fixed set of 360; validation "
            f"(180) and training (1,257) are drawn by the seed. {MADE_UP[task]}",
            doubts="The data set is small and clean; nothing here says how the model does on other "
            "images.",
            price="So small a model retrains in seconds: time is no reason to unlearn here.",
            model="A convolutional network of 124,426 parameters for 8 x 8 images of handwritten "
            "digits",
            card_title="Digits classifier",
            loading=with_weights(
                "from gradsurgery.unlearn.jobs.digits.data import DigitsCNN\n\nmodel = DigitsCNN()"
            ),
            numbers=NUMBERS,
        )
