"""The digits job: a seed's original, retrained and unlearned models, all measured alike."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn import METHODS, digits, metrics
from gradsurgery.unlearn.classification import cross_entropy
from gradsurgery.unlearn.config import update
from gradsurgery.unlearn.data import take
from gradsurgery.unlearn.digits import DigitsCNN, DigitsData
from gradsurgery.unlearn.finetune import FinetuneConfig
from gradsurgery.unlearn.graddiff import GradDiffConfig
from gradsurgery.unlearn.neggrad import NegGradConfig
from gradsurgery.unlearn.orthograd import OrthoGradConfig, OrthoGradTrainer
from gradsurgery.unlearn.progress import Progress
from gradsurgery.unlearn.retrain import Retrain, RetrainConfig
from gradsurgery.unlearn.run import RunDirectory, Stage, fingerprint
from gradsurgery.unlearn.trainer import Trainer, TrainingError, require
from gradsurgery.unlearn.tuned import TUNED

Method = Literal["all", "orthograd", "graddiff", "neggrad", "finetune", "retrain"]
PROBED = 256  # retain samples measured during a run; at its end all of them are
UIS_KIND = {"mislabeled": "class", "class": "class", "random": "random"}


@dataclass
class DigitsConfig:
    """Unlearn part of scikit-learn's handwritten digits and compare with retraining without it."""

    task: digits.Task = "mislabeled"
    """What to forget: 100 training samples with wrong labels, one class, or 10 % at random."""
    method: tuple[Method, ...] = ("all",)
    """One or more methods; the original and the retrained model are always made."""
    seeds: int = 2
    """How many seeds; each draws its own split, forget set, weights and order of the data."""
    first_seed: int = 0
    forget_class: int | None = None
    """Digit to forget with --task class; none: the seed modulo 10."""
    threads: int = 1
    """CPU threads of torch; the model is so small that more gain little, and on a busy machine they
    cost a lot. Another number can change the last bits of every result."""
    probe_every: int = 5
    """Steps between measurements of the model during unlearning."""
    checkpoint_every: int = 20
    """Most steps a kill can cost."""
    training: RetrainConfig = field(default_factory=RetrainConfig)
    """How the original and the retrained model are trained."""
    orthograd: OrthoGradConfig = field(default_factory=OrthoGradConfig)
    graddiff: GradDiffConfig = field(default_factory=GradDiffConfig)
    neggrad: NegGradConfig = field(default_factory=NegGradConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

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

    def check(self) -> None:
        """Raise `InputError` naming the first option that makes no sense."""
        require(len(self.method) > 0, "method", "at least one method", "none")
        require(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        require(0 <= self.first_seed < 2**31, "first-seed", "in [0, 2^31)", self.first_seed)
        require(1 <= self.threads <= 1024, "threads", "from 1 to 1024", self.threads)
        require(self.probe_every >= 1, "probe-every", "at least 1", self.probe_every)
        require(self.checkpoint_every >= 1, "checkpoint-every", "at least 1", self.checkpoint_every)
        for name in ("training", *METHODS):
            getattr(self, name).check(name)
        require(self.training.steps >= 1, "training.steps", "at least 1", self.training.steps)
        require(self.training.stop == "never", "training.stop", "never", self.training.stop)
        if self.forget_class is not None:
            require(self.task == "class", "task", "class where --forget-class is given", self.task)
            in_range = 0 <= self.forget_class < digits.CLASSES
            require(in_range, "forget-class", "a digit from 0 to 9", self.forget_class)


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


def stage_seed(seed: int, name: str) -> int:
    """A seed of its own for each purpose of a run."""
    return zlib.crc32(f"{seed}/{name}".encode()) % 2**31


def evaluate(
    model: nn.Module, data: DigitsData, held_out: Literal["validation", "test"] = "test"
) -> dict[str, float]:
    """Every metric of one model, in [0, 1], by the name it has in summary.json.

    forget: accuracy on the forget set with the labels it was trained on. repaired: the same
    samples with their true labels (mislabeled only). retain. test: held-out accuracy, without the
    forgotten class if there is one, whose own accuracy is test_forgotten. mia: attack on forget
    against held-out losses.
    """
    model.eval()
    kept, forgotten = data.split(held_out)
    found = {"forget": metrics.accuracy(model, data.forget)}
    if data.task == "mislabeled":
        found["repaired"] = metrics.accuracy(model, data.forget, data.true_labels)
    found["retain"] = metrics.accuracy(model, data.retain)
    found["test"] = metrics.accuracy(model, kept)
    if forgotten is not None:
        found["test_forgotten"] = metrics.accuracy(model, forgotten)
    unseen = data.validation if held_out == "validation" else data.test
    found["mia"] = metrics.mia(
        metrics.losses(model, cross_entropy, data.forget),
        metrics.losses(model, cross_entropy, unseen),
    )
    return found


def make_probe(data: DigitsData) -> Callable[[nn.Module], dict[str, float]]:
    """What is measured during a run: forget, some retain and validation data, never test data."""
    validation, _ = data.split("validation")
    # all of the retain set would double the time of a run; its order is random: the first will do
    retain = take(data.retain, torch.arange(min(PROBED, len(data.retain["label"]))))

    @torch.no_grad()
    def probe(model: nn.Module) -> dict[str, float]:
        found = {}
        for name, samples in {"forget": data.forget, "retain": retain}.items():
            logits, labels = model(samples["image"]), samples["label"]
            found[f"{name}_accuracy"] = metrics.share_right(logits, labels)
            found[f"{name}_loss"] = F.cross_entropy(logits, labels).item()
            if name == "forget" and data.task == "mislabeled":
                found["repaired_accuracy"] = metrics.share_right(logits, data.true_labels)
        found["validation_accuracy"] = metrics.accuracy(model, validation)
        return found

    return probe


def make_trainer(
    config: DigitsConfig, data: DigitsData, seed: int, name: str, model: nn.Module
) -> Trainer:
    """The trainer of one stage; all unlearning methods of a seed see the same order of data."""
    training = name in ("original", "retrain")
    kind: type[Trainer] = Retrain if training else METHODS[name]
    options: Any = config.training if training else getattr(config, name)
    torch.manual_seed(stage_seed(seed, name))
    return kind(
        model,
        cross_entropy,
        None if training else data.forget,
        data.train if name == "original" else data.retain,
        options,
        validation=data.validation,
        probe=make_probe(data),
        # some 20 points make a curve; more would cost more than the training itself
        probe_every=max(config.probe_every, options.steps // 20 if training else 1),
        seed=stage_seed(seed, name if training else "unlearn"),
    )


def run(config: DigitsConfig, directory: RunDirectory, progress: Progress) -> dict[str, Any]:
    """Do what is left to do in `directory`; the summary.

    Every stage starts from files and seeds alone, so an interrupted run continued here ends with
    the numbers of one that was not.
    """
    config.check()
    directory.rewind()
    forget_sets = {}
    with reproducible(config.threads):
        for seed in range(config.first_seed, config.first_seed + config.seeds):
            data = digits.load(config.task, seed, config.forget_class)
            forget_sets[str(seed)] = {
                "samples": len(data.forget_ids),
                "sha256": fingerprint(data.forget_ids),
                "class": data.forget_class,
            }
            for name in ("original", "retrain", *config.methods):
                _stage(config, directory, progress, data, (seed, name))
    return summarize(config, directory.results(), forget_sets)


def _stage(
    config: DigitsConfig,
    directory: RunDirectory,
    progress: Progress,
    data: DigitsData,
    stage: Stage,
) -> None:
    seed, name = stage
    if directory.result(stage) is not None:
        progress.say(f"seed {seed}  {name:<9}  already done")
        return
    model = DigitsCNN()
    if name not in ("original", "retrain"):
        directory.load_model(model, (seed, "original"))
    trainer = make_trainer(config, data, seed, name, model)
    saved = directory.checkpoint(stage)
    if saved is not None:
        trainer.load_state_dict(saved)
        progress.say(f"seed {seed}  {name:<9}  continues after step {trainer.step}")
    total = trainer.config.steps
    with progress.stage(f"seed {seed}  {name}", total, trainer.step) as advance:
        try:
            for record in trainer.fit():
                directory.log(stage, record)
                if record["step"] and record["step"] % config.checkpoint_every == 0:
                    directory.save_checkpoint(stage, trainer.state_dict())
                advance(record["step"])
        except TrainingError as error:
            raise TrainingError(f"seed {seed}, {name}: {error}") from None
    timed = trainer.step_seconds() if isinstance(trainer, OrthoGradTrainer) else None
    measured = evaluate(model, data)
    directory.finish(
        stage,
        model,
        {
            "metrics": measured,
            "steps": trainer.step,
            "seconds": trainer.seconds,
            **({} if timed is None else {"step_seconds": timed}),
            "losses": {
                "forget": metrics.losses(model, cross_entropy, data.forget).tolist(),
                "test": metrics.losses(model, cross_entropy, data.test).tolist(),
            },
        },
    )
    cost = f"{trainer.step:>4} steps {trainer.seconds:6.1f} s"
    numbers = "  ".join(f"{key} {value:.3f}" for key, value in measured.items())
    progress.say(f"seed {seed}  {name:<9}  {cost}  {numbers}")


def summarize(
    config: DigitsConfig, results: list[dict[str, Any]], forget_sets: dict[str, Any]
) -> dict[str, Any]:
    """Mean, spread and values over seeds of every metric, gap to Retrain, UIS and cost.

    step: seconds of one OrthoGrad step and of one plain training step on the same samples.
    """
    by_stage = {(result["seed"], result["method"]): result for result in results}
    seeds = [int(seed) for seed in forget_sets]
    columns: dict[str, Any] = {}
    for name in ("original", "retrain", *config.methods):
        rows: dict[str, list[float]] = {}
        for seed in seeds:
            result = by_stage[seed, name]
            measured = result["metrics"]
            original, retrain = (
                by_stage[seed, other]["metrics"] for other in ("original", "retrain")
            )
            score = metrics.uis(
                original["test"], measured["test"], measured["forget"], kind=UIS_KIND[config.task]
            )
            values = {
                **measured,
                "uis": score,
                "seconds": result["seconds"],
                "steps": result["steps"],
            }
            if name != "retrain":
                gaps = metrics.gap(measured, retrain)
                values |= {f"gap_{metric}": value for metric, value in gaps.items()}
            for key, value in values.items():
                rows.setdefault(key, []).append(value)
        columns[name] = {key: metrics.spread(values) for key, values in rows.items()}
    stages = [by_stage[seed, "orthograd"] for seed in seeds] if "orthograd" in columns else []
    timed = [stage["step_seconds"] for stage in stages if "step_seconds" in stage]
    step = {}
    if timed and len(timed) == len(seeds):
        step = {kind: metrics.spread([t[kind] for t in timed]) for kind in timed[0]}
    return {
        "job": "digits",
        "task": config.task,
        "seeds": seeds,
        "forget_sets": forget_sets,
        "columns": columns,
        **({"step": {"seconds": step}} if step else {}),
    }
