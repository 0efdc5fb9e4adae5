"""A run of any job: a seed's original, retrained and unlearned models, all measured alike."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gradsurgery.errors import InputError, RankError, TrainingError
from gradsurgery.ranks import Group
from gradsurgery.unlearn.jobs import shadows
from gradsurgery.unlearn.jobs.base import Job, JobConfig, Split, Summary, Variant
from gradsurgery.unlearn.jobs.directory import RunDirectory, Stage, fingerprint
from gradsurgery.unlearn.jobs.progress import Progress
from gradsurgery.unlearn.jobs.stages import AGAIN, TRAINED, parts, repeated
from gradsurgery.unlearn.jobs.summary import summarize
from gradsurgery.unlearn.methods import METHODS
from gradsurgery.unlearn.methods.orthograd import OrthoGradTrainer
from gradsurgery.unlearn.methods.retrain import Retrain
from gradsurgery.unlearn.metrics.cost import measured as cost_of
from gradsurgery.unlearn.training.config import update
from gradsurgery.unlearn.training.seeds import derived
from gradsurgery.unlearn.training.trainer import Trainer


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Fixed threads and deterministic algorithms; torch's global settings come back afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if torch.cuda.is_available():  # without it cuBLAS may refuse to be deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def drawn_by(seed: int, name: str) -> Stage:
    """Seed and name that a stage's weights and order of the data are drawn by: the second Retrain
    is the retrained model of the first shadow."""
    return (derived(seed, "shadow", 0), "retrain") if name == AGAIN else (seed, name)


@dataclass(frozen=True)
class Run:
    """What is done, with which options, where, and who is told.

    Several ranks do the same, all of them: they share the batches that models are trained on, and
    what a directory holds is the first one's.
    """

    job: Job[Any, Any]
    config: JobConfig
    directory: RunDirectory
    progress: Progress
    ranks: Group = field(default_factory=Group)

    def complete(self, variants: Sequence[Variant] = ()) -> Summary:
        """Do what is left to do in the directory; the summary.

        Every stage starts from files and seeds alone, so an interrupted run continued here ends
        with the numbers of one that was not. `variants` run besides those that the options ask for,
        each once.
        """
        self.config.check()
        self.directory.rewind()
        everything = [*self.config.variants, *variants]
        changed = [update(self.config, {each.method: each.changes}) for each in everything]
        for each in changed:
            each.check()
        trained = self.job.trained(self.config)
        forget_sets = {}
        with reproducible(self.config.threads):
            for seed in self.config.all_seeds:
                split = self.job.split(self.config, seed)
                about = {"samples": len(split.ids), "sha256": fingerprint(split.ids), **split.about}
                forget_sets[str(seed)] = about
                stages = [StageRun(self, split, (seed, name)) for name in trained]
                # either is measured against the other, so both must be there first
                for stage in stages:
                    stage.make()
                for stage in stages:
                    stage.measure()
                for each, options in zip(everything, changed, strict=True):
                    run = replace(self, config=options)
                    runs = 1 if each in variants else self.config.runs
                    for name in repeated(each.name, runs):
                        stage = StageRun(run, split, (seed, name), each.changes)
                        stage.make()
                        stage.measure()
        names = [*trained, *(each.name for each in everything)]
        task, results = self.config.task, self.directory.results()
        found = summarize(self.job, task, results, forget_sets, names, self.config.runs)
        facts = self.directory.facts()
        return {**found, "data": facts} if facts else found

    def trainer(
        self, split: Split, seed: int, name: str, model: nn.Module, probed: bool = True
    ) -> Trainer:
        """Of one stage; a seed's unlearning methods see the same order of data in the same run."""
        seed, name = drawn_by(seed, name)
        training = name in TRAINED
        method, _, fraction, run = parts(name)
        again = (run,) if run > 1 else ()
        kind: type[Trainer] = Retrain if training else METHODS[method]
        options: Any = self.config.training if training else getattr(self.config, method)
        retain = split.train if name == "original" else split.retain
        if fraction < 1:
            retain = self.job.share(retain, fraction, derived(seed, "retain"))
        every = self.job.probe_every(self.config, options)
        if training:  # some 20 points make a curve; more would cost more than the training itself
            every = max(self.config.probe_every, options.steps // 20)
        # ranks have samples of their own, and so other draws for them, as dropout's
        own = (self.ranks.rank,) if self.ranks.rank else ()
        torch.manual_seed(derived(seed, name if training else method, *again, *own))
        return kind(
            model,
            self.job.objective,
            forget=None if training else split.forget,
            retain=retain,
            config=options,
            validation=split.validation,
            probe=self.job.probe(split) if probed else None,
            probe_every=every,
            seed=derived(seed, name if training else "unlearn", *again),
            overlap=self.job.overlap(self.config),
            process_group=self.ranks.handle,
        )

    def peak_memory(self, split: Split, seed: int, name: str) -> float | None:
        """MB that a stage's preparation and first three steps need beyond what was in use before.

        They are taken by another trainer than the run's, without measurements; None where the peak
        cannot be known.
        """
        method = "training" if name in TRAINED else parts(name).method
        options = replace(getattr(self.config, method), steps=3, stop="never")
        few = replace(self, config=replace(self.config, **{method: options}))
        model = self.job.model(self.config)
        if sys.platform == "linux":
            # or what was freed before would be used again and cost nothing
            gc.collect()
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        try:
            with cost_of(next(model.parameters()).device) as cost, suppress(TrainingError):
                few.trainer(split, seed, name, model, probed=False).run()
        except torch.OutOfMemoryError:  # beside the model that has just been trained
            return None
        except RankError as error:  # as that of another rank
            if "OutOfMemoryError" not in str(error):
                raise
            return None
        return None if cost.memory is None else cost.memory / 1e6

    def fresh(self, seed: int, name: str) -> nn.Module:
        """The model that a stage's training begins with."""
        seed, name = drawn_by(seed, name)
        return self.job.model(self.config, derived(seed, name, "weights"))

    def standing(self, stage: Stage) -> nn.Module | None:
        """The model of a stage where it stands in the user's files."""
        seed, name = stage
        if name not in TRAINED:
            return None
        return self.job.standing(self.config, name, derived(seed, name, "weights"))

    def stored(self, stage: Stage) -> nn.Module:
        """The model of a finished stage."""
        if (found := self.standing(stage)) is not None:
            return found
        model = self.job.model(self.config)
        self.directory.load_model(model, stage)
        return model


@dataclass(frozen=True)
class StageRun:
    """One model of a run: of which seed and method, on which data, with which options changed."""

    run: Run
    split: Split
    stage: Stage
    changes: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        return f"seed {self.stage[0]}  {self.stage[1]:<20}"

    def make(self) -> None:
        """Train the model or unlearn, unless that has been done."""
        run, (seed, name), changes = self.run, self.stage, self.changes or {}
        directory = run.directory
        done = directory.result(self.stage)
        if done is not None:
            had = done.get("changes", {})
            if had != changes:
                raise InputError(f"--out: {directory.path} holds {name} with {had}, not {changes}")
            directory.check_model(self.stage)  # nothing else may read it again, and it is a result
            return
        if run.standing(self.stage) is not None:
            directory.finish(self.stage, None, {})
            return
        trained = name in TRAINED
        model = run.fresh(seed, name) if trained else run.stored((seed, "original"))
        if name == "original" and run.job.given(run.config, model):
            directory.finish(self.stage, model, {"steps": 0, "seconds": 0.0, "retain_samples": 0})
            return
        trainer = run.trainer(self.split, seed, name, model)
        saved = directory.checkpoint(self.stage)
        if saved is not None:
            directory.restore(trainer, saved)
            run.progress.say(f"{self.label}  continues after step {trainer.step}")
        self._fit(trainer)
        timed = None
        if isinstance(trainer, OrthoGradTrainer) and trainer.shards is None:
            timed = trainer.step_seconds()  # of a copy, which there is none of a sharded model
        memory = run.peak_memory(self.split, seed, name)
        result = {
            "steps": trainer.step,
            "seconds": trainer.seconds,
            "retain_samples": trainer.samples["retain"],
            **({} if memory is None else {"memory": memory}),
            **({"changes": changes} if changes else {}),
            **({} if timed is None else {"step_seconds": timed}),
        }
        directory.finish(self.stage, model, result)

    def _fit(self, trainer: Trainer) -> None:
        """Take the steps that are left, with a line and now and then a checkpoint of each."""
        (seed, name), directory = self.stage, self.run.directory
        last, every = trainer.total_steps(), self.run.config.checkpoint_every
        with self.run.progress.stage(f"seed {seed}  {name}", last, trainer.step) as advance:
            try:
                for record in trainer.fit():
                    directory.log(self.stage, record)
                    if record["step"] and record["step"] % every == 0:
                        directory.save_checkpoint(self.stage, trainer.state_dict())
                    advance(record["step"])
            except TrainingError as error:
                raise TrainingError(f"seed {seed}, {name}: {error}") from None
        if trainer.stopped and not trainer.step:
            self.run.progress.say(
                f"{self.label}  takes no step: forget accuracy is as low as "
                f"--{parts(name).method.replace('_', '-')}.stop {trainer.config.stop} asks for"
            )

    def measure(self) -> None:
        """Add to the stage's result what its model is like, unless that is known."""
        run, (seed, name) = self.run, self.stage
        done = run.directory.result(self.stage) or {}
        if "metrics" in done:
            run.progress.say(f"{self.label}  already done")
            return
        model = run.stored(self.stage)
        there = name != "retrain" and "retrain" in run.job.trained(run.config)
        retrain = run.stored((seed, "retrain")) if there else None
        measured = run.job.evaluate(model, self.split, retrain=retrain)
        if name != "original":
            original = run.stored((seed, "original"))
            steps = run.job.relearned(model, self.split, original)
            measured |= {} if steps is None else {"relearn": steps}
        # shadows are of a first run
        if run.config.shadows and name not in ("retrain", AGAIN) and parts(name).run == 1:
            measured |= shadows.compare(run, self.split, self.stage)
        losses = run.job.losses(model, self.split)
        details = run.job.details(model, self.split, first=name == "original")
        found = {"metrics": measured, "losses": losses, **({"details": details} if details else {})}
        run.directory.add(self.stage, found)
        cost = f"{done['steps']:>4} steps {done['seconds']:6.1f} s" if "steps" in done else "given"
        shown = "  ".join(f"{k} {measured[k]:.3f}" for k in run.job.compared if k in measured)
        run.progress.say(f"{self.label}  {cost}  {shown}")
