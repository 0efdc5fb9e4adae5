"""The run of a method: steps, schedule, probes and stopping, and what an error puts back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from gradsurgery.errors import InputError, NonFiniteError, TrainingError
from gradsurgery.ranks.shards import rest
from gradsurgery.spread import local
from gradsurgery.surgery import Rule
from gradsurgery.undo import Undo
from gradsurgery.unlearn.training import given
from gradsurgery.unlearn.training.asking import Asking, C
from gradsurgery.unlearn.training.data import Batches, LoaderBatches
from gradsurgery.unlearn.training.modes import evaluating, grads_kept, modes_kept
from gradsurgery.unlearn.training.options import rate_share
from gradsurgery.unlearn.training.sets import LONE

Probe = Callable[[nn.Module], dict[str, float]]
Record = dict[str, Any]
Callback = Callable[[Any, Record], None]  # of the trainer and a record

# beyond float32: a run that reaches it has diverged even if nothing is infinite yet
DIVERGED = 1e30


class Loop(Asking[C]):
    """The part of a `Trainer` that takes its steps."""

    keeps: ClassVar[tuple[str, ...]]
    uses_optimizer: ClassVar[bool]
    samples: dict[str, int]
    batches: dict[str, Batches | LoaderBatches]
    optimizer: torch.optim.Optimizer
    schedule: Any
    probe: Probe | None
    probe_every: int
    callbacks: tuple[Callback, ...]
    trained: dict[str, nn.Parameter]  # those of the model, by name
    step: int
    seconds: float
    stopped: bool
    _left_out: set[str]
    _peaks: list[float]

    # -- a step, which a method writes

    def gradients(self) -> Record:
        """Leave a step's gradients in `.grad`, which is None before, and return its numbers.

        Numbers are batch losses and diagnostics.
        """
        raise InputError(f"{type(self).__name__} takes no step of an optimizer: call fit()")

    def after_step(self) -> None:
        """What follows the optimizer's step. It does not raise: the parameters have moved."""

    def update(self) -> Record:
        """One step: gradients, the optimizer's step along them, what follows it; its numbers.

        A method that takes no optimizer's step has `uses_optimizer = False` and an `update` of its
        own, in which what can raise comes before the parameters change.
        """
        record = self.gradients()
        self.optimizer.step()
        self.after_step()
        return record

    def total_steps(self) -> int:
        return self.config.steps

    # -- the run

    def fit(self) -> Iterator[Record]:
        """Take the remaining steps, yielding one record after each.

        The first record, step 0, measures the model as given. After a record has been yielded
        `state_dict()` is a point from which another trainer continues to the same numbers.

        A step leaves modes (train or eval) and `.grad` as they were. One that raises leaves the
        model, its optimizer and what the method remembers as they were before it too; a batch that
        a loader has given is gone, as are draws from torch's generators. A copy of parameters and
        of the optimizer's state is held for that only where code that is neither torch's nor ours
        may run once they have changed: hooks of an optimizer, a step or a method of one's own.
        Not undone: an interrupt once parameters have begun to move.

        Parameters are looked up in every step: those that train and that the optimizer holds move,
        and one that trains since without being held is an `InputError` that names it.
        """
        if self.step == 0 and self.probe is not None:
            record = self._measured({"step": 0, "seconds": self.seconds})
            self._check_finite(record)
            yield self._told(record)
        total = self.total_steps()
        while self.step < total and not self.stopped:
            start = time.perf_counter()
            self.sets.drawn.clear()
            self._look_up()
            try:
                with self._undone_by_errors():
                    if self.schedule is None:
                        share = rate_share(self.config, self.step, total)
                        for group, peak in zip(self._groups(), self._peaks, strict=True):
                            group["lr"] = share * peak
                    rate = self._groups()[0]["lr"]
                    self._mode()
                    numbers = self.update()
            except NonFiniteError as error:
                raise self._diverged(str(error), self.step + 1) from None
            except ValueError as error:
                if LONE not in str(error) or isinstance(error, InputError):
                    raise
                raise self.sets.lone() from error
            self.sets.drawn.clear()
            self.step += 1
            if self.schedule is not None:
                self.schedule.step()
            self.seconds += time.perf_counter() - start
            record = {"step": self.step, "seconds": self.seconds, "lr": rate, **numbers}
            if self.probe is not None and (self.step % self.probe_every == 0 or self.step == total):
                self._measured(record)
            self._check_finite(record)
            if self.step == total or self.stopped:
                self._check_model()
            yield self._told(record)

    def run(self) -> nn.Module:
        """Take all steps; the model."""
        for _ in self.fit():
            pass
        return self.model

    @contextmanager
    def _undone_by_errors(self) -> Iterator[None]:
        """A step inside, and everything as it was before it where it raises."""
        samples, generator = dict(self.samples), self.generator.get_state()
        positions = {k: b.drawn for k, b in self.batches.items() if isinstance(b, Batches)}
        rates = [group["lr"] for group in self._groups()]
        kept = {name: getattr(self, name) for name in self.keeps}  # replaced, never changed
        written = (type(self).update, type(self).gradients, type(self).after_step)
        package = __name__.partition(".")[0]
        ours = all(each.__module__.partition(".")[0] == package for each in written)
        rule: Rule | None = getattr(self, "rule", None)  # of surgery, whose memory is put back
        undo = Undo(self.model, self.optimizer, rule)
        try:
            with modes_kept(self.model), grads_kept(self.model), undo, undo:
                for parameter in undo.held:  # those outside of the model too
                    parameter.grad = None
                with undo.begun_by_step(copies=not ours):
                    yield
                undo.keep()
        except BaseException:
            self.samples.update(samples)
            self.generator.set_state(generator)
            for kind, drawn in positions.items():
                self.batches[kind].drawn = drawn
            for group, rate in zip(self._groups(), rates, strict=True):
                group["lr"] = rate
            for name, value in kept.items():
                setattr(self, name, value)
            raise

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _note_peaks(self) -> None:
        """The peak rate of each group of parameters is the one that it came with."""
        groups = self._groups()
        if len(groups) < len(self._peaks):
            raise InputError(
                f"optimizer: it had {len(self._peaks)} groups of parameters and has {len(groups)}: "
                "make a new Trainer"
            )
        self._peaks += [group["lr"] for group in groups[len(self._peaks) :]]

    def _look_up(self) -> None:
        """The parameters that train now. Raises `InputError` where a step could not move one."""
        rest(self.model)
        self.trained = given.trained(self.model)
        self.parameters = list(self.trained.values())
        self._note_peaks()
        known = self._left_out | self.held().keys()
        alone = [name for name in self.trained if name not in known]
        if alone and self.uses_optimizer:
            raise InputError(
                f"model: {alone[0]} trains, but the optimizer does not hold it, so no step would "
                "move it: give it to optimizer.add_param_group, or make a new Trainer"
            )

    def moved(self) -> list[nn.Parameter]:
        optimizer = getattr(self, "optimizer", None)  # made after `prepare`
        more = [] if optimizer is None else [p for g in optimizer.param_groups for p in g["params"]]
        return list({id(p): p for p in (*self.parameters, *more) if p.requires_grad}.values())

    def held(self) -> dict[str, nn.Parameter]:
        """Those of the parameters that train which the optimizer holds, by name."""
        held = {id(p) for group in self._groups() for p in group["params"]}
        return {name: p for name, p in self.trained.items() if id(p) in held}

    def _mode(self) -> None:
        """Training mode, but of batch norm what the config says."""
        self.model.train()
        if self.config.batch_norm == "eval":
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _told(self, record: Record) -> Record:
        for callback in self.callbacks:
            callback(self, record)
        return record

    def _measured(self, record: Record) -> Record:
        if self.probe is not None:
            with self.ranks.agreed("probe") as said, evaluating(self.model):
                said.mine = self.probe(self.model)
            found = said.every[0]  # by which all stop, or none
            if not isinstance(found, Mapping):
                raise InputError(f"probe must return a dict of numbers, got {type(found).__name__}")
            record.update(found)
        if self.config.stop != "never":
            fixed = self.config.stop == "target"
            for name in ("forget_accuracy", "validation_accuracy")[: 1 if fixed else 2]:
                if name not in record:
                    raise InputError(f"stop = {self.config.stop} needs a probe that gives {name}")
            bar = self.config.target if fixed else record["validation_accuracy"]
            self.stopped = record["forget_accuracy"] <= bar
        return record

    def _check_finite(self, record: Record) -> None:
        for name, value in record.items():
            if isinstance(value, float) and not abs(value) < DIVERGED:
                raise self._diverged(f"{name} became {value}", self.step)

    def _check_model(self) -> None:
        """A step's losses are those before it: what it did to the weights shows in them alone."""
        rest(self.model)
        named = self.model.named_parameters()
        broken = (name for name, p in named if not bool(local(p).isfinite().all()))
        first = next(broken, None)  # of shards, perhaps one rank's alone
        for name in self.ranks.settled("look at the weights", mine=first):
            if name is not None:
                raise self._diverged(f"{name} is no longer finite", self.step)

    def _diverged(self, what: str, step: int) -> TrainingError:
        broken = self.sets.not_finite()
        advice = "lower the learning rate or set a forget ceiling"
        if not step:
            advice = "the model or its samples gave that before anything was trained"
        if broken:
            advice = f"values of the {' and '.join(broken)} batch are not finite either"
        return TrainingError(f"{what} at step {step} of {type(self).__name__}: {advice}")
