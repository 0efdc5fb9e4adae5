"""The digits job: a seed's original, retrained and unlearned models, all measured alike."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, make_dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from gradsurgery.errors import InputError, TrainingError
from gradsurgery.text import brief
from gradsurgery.unlearn.jobs import shadows
from gradsurgery.unlearn.jobs.digits import data as digits
from gradsurgery.unlearn.jobs.digits.data import DigitsCNN, DigitsData
from gradsurgery.unlearn.jobs.digits.evaluation import COMPARED, evaluate, make_probe, summarize
from gradsurgery.unlearn.jobs.digits.tuned import TUNED
from gradsurgery.unlearn.jobs.directory import RunDirectory, Stage, fingerprint
from gradsurgery.unlearn.jobs.progress import Progress
from gradsurgery.unlearn.jobs.stages import TRAINED, parts, stage_name
from gradsurgery.unlearn.methods import METHODS
from gradsurgery.unlearn.methods.finetune import FinetuneConfig
from gradsurgery.unlearn.methods.orthograd import OrthoGradTrainer
from gradsurgery.unlearn.methods.retrain import Retrain, RetrainConfig
from gradsurgery.unlearn.metrics.accuracy import accuracy
from gradsurgery.unlearn.metrics.accuracy import losses as losses_of
from gradsurgery.unlearn.metrics.cost import measured as cost_of
from gradsurgery.unlearn.metrics.relearn import relearn_steps
from gradsurgery.unlearn.objectives.classification import cross_entropy
from gradsurgery.unlearn.training.config import update
from gradsurgery.unlearn.training.seeds import derived
from gradsurgery.unlearn.training.trainer import Trainer, require

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[("all", *METHODS, "retrain")]
# how the forget set is learned again, to see how well it was forgotten
RELEARN = FinetuneConfig(steps=60, lr=3e-3, retain_batch=128)

# a section of options for every method there is
MethodOptions = make_dataclass(
    "MethodOptions",
    [(name, kind.Config, field(default_factory=kind.Config)) for name, kind in METHODS.items()],
)


@dataclass(frozen=True)
class Variant:
    """A method as one stage runs it: with a share of the retain set, and some options changed."""

    method: str
    fraction: float = 1.0
    label: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return stage_name(self.method, self.fraction, self.label)


@dataclass
class DigitsConfig(MethodOptions):
    """Unlearn part of scikit-learn's handwritten digits and compare with retraining without it."""

    task: digits.Task = "mislabeled"
    """What to forget: 100 training samples with wrong labels, one class, or some at random."""
    method: tuple[Method, ...] = ("orthograd", "ltu", "graddiff", "finetune")
    """One or more methods, or all; the original and the retrained model are always made."""
    seeds: int = 2
    """How many seeds; each draws its own split, forget set, weights and order of the data."""
    first_seed: int = 0
    forget_class: int | None = None
    """Digit to forget with --task class; none: the seed modulo 10."""
    random_percent: float = digits.RANDOM_PERCENT
    """Training samples to forget with --task random, in percent, in (0, 100)."""
    retain_fraction: tuple[float, ...] = (1.0,)
    """Share of the retain set that the methods are given, in (0, 1], the same of every class;
    several: each method runs with each. Original and Retrain always have all of it, and retain
    accuracy is over all of it."""
    tune: int = 0
    """First draw each method's options at random so many times and keep what does best on
    validation data, on seeds of its own."""
    shadows: int = 0
    """Shadow models of U-LiRA, an attack on every sample: so many originals, retrained and, of each
    method, unlearned models more for every seed. 0: no such attack; a few do."""
    threads: int = 1
    """CPU threads of torch; the model is so small that more gain little, and on a busy machine they
    cost a lot. Another number can change the last bits of every result."""
    probe_every: int = 5
    """Steps between measurements of the model during unlearning."""
    checkpoint_every: int = 20
    """Most steps a kill can cost."""
    training: RetrainConfig = field(default_factory=RetrainConfig)
    """How the original and the retrained model are trained."""

    @classmethod
    def for_task(cls, task: str) -> DigitsConfig:
        """The options chosen for a task on validation data; docs/results.md says how."""
        if task not in TUNED:
            raise InputError(f"--task must be one of {', '.join(TUNED)}, got {task}")
        return update(cls(), {"task": task, **TUNED[task]})

    @property
    def methods(self) -> list[str]:
        """The methods to run besides Original and Retrain, in the order of the report."""
        return [name for name in METHODS if name in self.method or "all" in self.method]

    @property
    def fractions(self) -> list[float]:
        """Shares of the retain set to run them with, the largest first."""
        return sorted(set(self.retain_fraction), reverse=True)

    @property
    def variants(self) -> list[Variant]:
        return [Variant(name, share) for share in self.fractions for name in self.methods]

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def check(self) -> None:
        """Raise `InputError` naming the first option that makes no sense."""
        require(len(self.method) > 0, "method", "at least one method", "none")
        require(self.seeds >= 1, "seeds", "at least 1", brief(self.seeds))
        require(self.seeds <= 2**31, "seeds", "at most 2^31", brief(self.seeds))
        require(0 <= self.first_seed < 2**31, "first-seed", "in [0, 2^31)", self.first_seed)
        require(len(self.retain_fraction) > 0, "retain-fraction", "at least one share", "none")
        for fraction in self.retain_fraction:
            require(0 < fraction <= 1, "retain-fraction", "in (0, 1]", fraction)
        require(self.tune >= 0, "tune", "at least 0", self.tune)
        require(self.tune <= 10**6, "tune", "at most a million", brief(self.tune))
        require(self.shadows in (0, *range(2, 1001)), "shadows", "0, or 2 to 1000", self.shadows)
        require(1 <= self.threads <= 1024, "threads", "from 1 to 1024", self.threads)
        require(self.probe_every >= 1, "probe-every", "at least 1", self.probe_every)
        require(self.checkpoint_every >= 1, "checkpoint-every", "at least 1", self.checkpoint_every)
        for name in ("training", *METHODS):
            getattr(self, name).check(name.replace("_", "-"))
        require(self.training.steps >= 1, "training.steps", "at least 1", self.training.steps)
        require(self.training.stop == "never", "training.stop", "never", self.training.stop)
        if self.forget_class is not None:
            require(self.task == "class", "task", "class where --forget-class is given", self.task)
            in_range = 0 <= self.forget_class < digits.CLASSES
            require(in_range, "forget-class", "a digit from 0 to 9", self.forget_class)
        if self.random_percent != digits.RANDOM_PERCENT:
            wanted = "random where --random-percent is given"
            require(self.task == "random", "task", wanted, self.task)
            digits.random_count(self.random_percent)


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Fixed threads and deterministic algorithms; torch's global settings come back afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def make_trainer(
    config: DigitsConfig,
    data: DigitsData,
    seed: int,
    name: str,
    model: nn.Module,
    probed: bool = True,
) -> Trainer:
    """The trainer of one stage; all unlearning methods of a seed see the same order of data."""
    training = name in TRAINED
    method, _, fraction = parts(name)
    kind: type[Trainer] = Retrain if training else METHODS[method]
    options: Any = config.training if training else getattr(config, method)
    retain = data.retain
    if fraction < 1:
        retain = digits.share(retain, fraction, derived(seed, "retain"))
    torch.manual_seed(derived(seed, name if training else method))
    return kind(
        model,
        cross_entropy,
        forget=None if training else data.forget,
        retain=data.train if name == "original" else retain,
        config=options,
        validation=data.validation,
        probe=make_probe(data) if probed else None,
        # some 20 points make a curve; more would cost more than the training itself
        probe_every=max(config.probe_every, options.steps // 20 if training else 1),
        seed=derived(seed, name if training else "unlearn"),
    )


def peak_memory(config: DigitsConfig, data: DigitsData, seed: int, name: str) -> float | None:
    """MB that a stage's preparation and first three steps need beyond what was in use before them.

    They are taken by another trainer than the run's, without measurements; None where the peak
    cannot be known.
    """
    method = "training" if name in TRAINED else parts(name).method
    options = replace(getattr(config, method), steps=3, stop="never")
    model = DigitsCNN()
    if sys.platform == "linux":
        # or what was freed before would be used again and cost nothing
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    few = replace(config, **{method: options})
    with cost_of() as cost, suppress(TrainingError):
        make_trainer(few, data, seed, name, model, probed=False).run()
    return None if cost.memory is None else cost.memory / 1e6


def shadowed(config: DigitsConfig, data: DigitsData) -> shadows.Shadowed:
    """This job as the attack by shadow models needs it."""
    trainer = partial(make_trainer, config, data)
    return shadows.Shadowed(config.shadows, data.forget, DigitsCNN, trainer)


def load_data(config: DigitsConfig, seed: int) -> DigitsData:
    return digits.load(config.task, seed, config.forget_class, config.random_percent)


def run(
    config: DigitsConfig,
    directory: RunDirectory,
    progress: Progress,
    variants: Sequence[Variant] = (),
) -> dict[str, Any]:
    """Do what is left to do in `directory`; the summary.

    Every stage starts from files and seeds alone, so an interrupted run continued here ends with
    the numbers of one that was not. `variants` run besides those that the options ask for.
    """
    config.check()
    directory.rewind()
    everything = [*config.variants, *variants]
    changed = [update(config, {each.method: each.changes}) for each in everything]
    for each in changed:
        each.check()
    forget_sets = {}
    with reproducible(config.threads):
        for seed in config.all_seeds:
            data = load_data(config, seed)
            forget_sets[str(seed)] = {
                "samples": len(data.forget_ids),
                "sha256": fingerprint(data.forget_ids),
                "class": data.forget_class,
            }
            # either is measured against the other, so both must be there first
            for name in TRAINED:
                _train(config, directory, progress, data, (seed, name), {})
            for name in TRAINED:
                _measure(config, directory, progress, data, (seed, name))
            for each, options in zip(everything, changed, strict=True):
                _train(options, directory, progress, data, (seed, each.name), each.changes)
                _measure(options, directory, progress, data, (seed, each.name))
    names = [*TRAINED, *(each.name for each in everything)]
    return summarize(config.task, directory.results(), forget_sets, names)


def _label(stage: Stage) -> str:
    return f"seed {stage[0]}  {stage[1]:<20}"


def _train(
    config: DigitsConfig,
    directory: RunDirectory,
    progress: Progress,
    data: DigitsData,
    stage: Stage,
    changes: dict[str, Any],
) -> None:
    """Make the model of a stage, unless it has been made."""
    seed, name = stage
    done = directory.result(stage)
    if done is not None:
        if done.get("changes", {}) != changes:
            had = done.get("changes", {})
            raise InputError(f"--out: {directory.path} holds {name} with {had}, not {changes}")
        directory.model_bytes(stage)  # nothing else may read it again, and it is a result
        return
    model = DigitsCNN()
    if name not in TRAINED:
        directory.load_model(model, (seed, "original"))
    trainer = make_trainer(config, data, seed, name, model)
    saved = directory.checkpoint(stage)
    if saved is not None:
        directory.restore(trainer, saved)
        progress.say(f"{_label(stage)}  continues after step {trainer.step}")
    with progress.stage(f"seed {seed}  {name}", trainer.total_steps(), trainer.step) as advance:
        try:
            for record in trainer.fit():
                directory.log(stage, record)
                if record["step"] and record["step"] % config.checkpoint_every == 0:
                    directory.save_checkpoint(stage, trainer.state_dict())
                advance(record["step"])
        except TrainingError as error:
            raise TrainingError(f"seed {seed}, {name}: {error}") from None
    timed = trainer.step_seconds() if isinstance(trainer, OrthoGradTrainer) else None
    memory = peak_memory(config, data, seed, name)
    directory.finish(
        stage,
        model,
        {
            "steps": trainer.step,
            "seconds": trainer.seconds,
            "retain_samples": trainer.samples["retain"],
            **({} if memory is None else {"memory": memory}),
            **({"changes": changes} if changes else {}),
            **({} if timed is None else {"step_seconds": timed}),
        },
    )


def _measure(
    config: DigitsConfig,
    directory: RunDirectory,
    progress: Progress,
    data: DigitsData,
    stage: Stage,
) -> None:
    """Add to a stage's result what its model is like, unless that is known."""
    seed, name = stage
    done = directory.result(stage) or {}
    if "metrics" in done:
        progress.say(f"{_label(stage)}  already done")
        return
    model, retrain, original = DigitsCNN(), DigitsCNN(), DigitsCNN()
    directory.load_model(model, stage)
    directory.load_model(retrain, (seed, "retrain"))
    directory.load_model(original, (seed, "original"))
    measured = evaluate(model, data, retrain=None if name == "retrain" else retrain)
    bar = accuracy(original, data.forget)
    if name != "original":
        steps = relearn_steps(model, cross_entropy, data.forget, bar, RELEARN)
        measured["relearn"] = RELEARN.steps if steps is None else steps
    if config.shadows and name not in TRAINED:
        measured |= shadows.attack(shadowed(config, data), directory, progress, stage)
    losses = {
        key: losses_of(model, cross_entropy, part).tolist()
        for key, part in (("forget", data.forget), ("test", data.test))
    }
    directory.add(stage, {"metrics": measured, "losses": losses})
    cost = f"{done['steps']:>4} steps {done['seconds']:6.1f} s"
    numbers = "  ".join(f"{key} {measured[key]:.3f}" for key in COMPARED if key in measured)
    progress.say(f"{_label(stage)}  {cost}  {numbers}")
