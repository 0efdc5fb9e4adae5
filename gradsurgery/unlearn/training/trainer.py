"""The protocol every unlearning method follows: one step at a time, resumable bit for bit.

A method is a `Trainer` with `gradients`: it draws batches, fills `.grad` and says what it saw. The
optimizer's step, order of data, schedule, probes, stopping and checkpoints are the same for all.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradsurgery.batch import DETACHED, per_sample_losses
from gradsurgery.errors import InputError, NonFiniteError, TrainingError
from gradsurgery.ranks import check_one_rank
from gradsurgery.surgery import Rule
from gradsurgery.undo import Undo
from gradsurgery.unlearn.objectives import classification
from gradsurgery.unlearn.objectives.base import (
    Batch,
    PerSampleLoss,
    batch_size,
    fresh,
    take,
    to_device,
)
from gradsurgery.unlearn.training import given, resume
from gradsurgery.unlearn.training.data import Batches, Data
from gradsurgery.unlearn.training.described import Described
from gradsurgery.unlearn.training.modes import (
    evaluating,
    grads_kept,
    modes_kept,
    values_undone_by_errors,
)
from gradsurgery.unlearn.training.options import TrainerConfig as TrainerConfig
from gradsurgery.unlearn.training.options import finite as finite
from gradsurgery.unlearn.training.options import make_optimizer as make_optimizer
from gradsurgery.unlearn.training.options import rate_share as rate_share
from gradsurgery.unlearn.training.options import require as require
from gradsurgery.unlearn.training.seeds import derived
from gradsurgery.unlearn.training.sets import LONE, Sets

Probe = Callable[[nn.Module], dict[str, float]]
Record = dict[str, Any]

# beyond float32: a run that reaches it has diverged even if nothing is infinite yet
DIVERGED = 1e30


C = TypeVar("C", bound=TrainerConfig)
Callback = Callable[["Trainer", Record], None]


class Trainer(Described, ABC, Generic[C]):
    """One unlearning method on one model.

    Subclasses set `Config` and `draws` (the sets they draw batches from; the config has a
    `<set>_batch` for each) and write `gradients`. A loss given here is per sample and is one that
    training would lower; a method that climbs it does so itself.

    Model and loss may be given by position, all else by name: a set in the place of another would
    be unlearned. What is wrong with an argument is an `InputError` before anything has changed, and
    a step that raises leaves everything as it was before that step.

    Args:
        model: changed in place.
        loss: `loss(model, batch)` -> [B], not reduced. With `classification.cross_entropy`, and in
            sets whose labels a method looks at itself, labels must be integers [B]. SCRUB and
            BadTeacher work on a classifier's outputs and warn of any other loss, which they never
            call.
        forget: samples to forget, tensors with leading dimension N in tuples, mappings or
            dataclasses, or a DataLoader of such batches. May be None for methods that never look
            at them.
        retain: samples to keep, likewise. None of them may be in `forget` as well.
        config: the method's own `Config`.
        validation: held-out samples, likewise, for methods that need some.
        probe: measures the model during the run; must give `forget_accuracy` (and
            `validation_accuracy`) where `config.stop` needs them.
        probe_every: steps between probes; the first and the last step are always probed.
        seed: order of the data, and the initial weights where a method draws them.
        optimizer: makes the optimizer of the parameters, in place of the config's; the config's
            schedule is of its rates.
        schedule: makes a torch scheduler of the optimizer, stepped once a step, in place of the
            config's.
        callbacks: called with the trainer and each record.
        overlap: "error" where a sample of `forget` is in `retain` or `validation` too, or "allow",
            for data that has duplicates.
    """

    Config: ClassVar[type[TrainerConfig]] = TrainerConfig
    draws: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()  # sets it cannot do without and draws no batches from
    passes_over: ClassVar[tuple[str, ...]] = ()  # sets of which it uses no batch of one sample
    uses_optimizer: ClassVar[bool] = True
    instead_of_loss: ClassVar[str] = ""  # what it computes where it never calls `loss`
    # attributes, modules or lists of tensors, that a resumed run must find again
    keeps: ClassVar[tuple[str, ...]] = ()

    @given.by_name("self", "model", "loss", others=("forget", "retain", "config"))
    def __init__(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        *,
        forget: Data,
        retain: Data,
        config: C,
        validation: Data = None,
        probe: Probe | None = None,
        probe_every: int = 10,
        seed: int = 0,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        callbacks: Sequence[Callback] = (),
        overlap: Literal["error", "allow"] = "error",
    ) -> None:
        name = type(self).__name__
        given.check_model(model)
        check_one_rank(model)
        given.check_loss(loss)
        given.check_instance("config", config, self.Config)
        try:
            config.check(name)
        except InputError as error:  # named as on a command line
            raise InputError(str(error).removeprefix("--")) from None
        given.check_functions(probe=probe, optimizer=optimizer, schedule=schedule)
        given.check_callbacks(callbacks)
        seed = given.check_integer("seed", seed)
        probe_every = given.check_integer("probe_every", probe_every, least=1)
        given.check_choice("overlap", overlap, ("error", "allow"))
        if config.stop != "never" and probe is None:
            raise InputError(f"stop = {config.stop} needs a probe that measures forget accuracy")
        self.trained = given.trained(model)
        self.parameters = list(self.trained.values())
        self.device = self.parameters[0].device
        self.model, self.loss, self.config, self.seed = model, loss, config, seed
        self.probe, self.probe_every = probe, probe_every
        self.callbacks = tuple(callbacks)
        self.data = {"forget": forget, "retain": retain, "validation": validation}
        every = loss is classification.cross_entropy
        labeled = tuple(self.data) if every else self.labeled_sets()
        self.sets = Sets(self.data, labeled, (*self.draws, *self.needs), overlap, name)
        self.samples, self.batches = self.sets.samples, self.sets.batches
        for kind in self.draws:
            self.sets.draw_from(kind, getattr(config, f"{kind}_batch"), derived(seed, kind))
        self._check_batch_norm()
        self.generator = torch.Generator().manual_seed(derived(seed, "draws"))
        self.step, self.stopped = 0, False
        # Retrain draws the weights anew before an optimizer can be wrong
        with values_undone_by_errors(model), grads_kept(model):
            start = time.perf_counter()
            self.prepare()
            self.seconds = time.perf_counter() - start
            make = optimizer or (lambda parameters: make_optimizer(parameters, config))
            self.optimizer = given.checked_optimizer(make(self.parameters), model)
            self.schedule = None if schedule is None else schedule(self.optimizer)
            if schedule is not None:
                given.check_schedule(self.schedule)
        # those that a function for `optimizer` left out stay where they are
        self._left_out = self.trained.keys() - self.held().keys()
        self._peaks: list[float] = []
        self._note_peaks()
        if self.instead_of_loss and not every:
            given.warn_of_unused_loss(name, self.instead_of_loss)

    def _check_batch_norm(self) -> None:
        """Raise `InputError` where batch norm in training mode would meet what it cannot take."""
        norms = [
            f"{path or 'model'} ({type(module).__name__})"
            for path, module in self.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        if not norms or self.config.batch_norm == "eval":
            return
        if self.config.micro_batch is not None:
            raise InputError(
                f"micro_batch: {norms[0]} would normalize over a part of the batch; set "
                "batch_norm = eval, or take whole batches"
            )
        used = [kind for kind in self.draws if kind not in self.passes_over]
        self.sets.check_lone(used, self.model, self.loss, self.device)

    # -- what a method writes

    def prepare(self) -> None:
        """What is done once, before the optimizer is made; it counts as time of the method."""

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

    def labeled_sets(self) -> tuple[str, ...]:
        """Sets whose labels the method looks at itself, whatever the loss."""
        return ()

    def total_steps(self) -> int:
        return self.config.steps

    def extra_state(self) -> dict[str, Any]:
        """What later steps depend on besides model, optimizer, order of data and draws."""
        held = {name: getattr(self, name) for name in self.keeps}
        return {k: v.state_dict() if isinstance(v, nn.Module) else v for k, v in held.items()}

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        """Raise `InputError` naming what in another's `extra_state()` does not fit."""
        resume.check_kept(self, state)

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from `extra_state()`."""
        for name, value in state.items():
            held = getattr(self, name)
            if isinstance(held, nn.Module):
                held.load_state_dict(value)
            else:
                setattr(self, name, to_device(value, self.device))

    # -- what a method uses

    def draw(self, kind: str) -> Batch:
        """The next batch of a set, on the model's device."""
        return self.sets.draw(kind, self.device)

    def whole(self, kind: str, size: int = 256) -> Iterator[Batch]:
        """One pass over a set, in batches of at most `size`, in order."""
        return self.sets.whole(kind, size, self.device)

    def losses(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """Per-sample losses [B], in the precision asked for."""
        model = self.model if model is None else model
        with self.precision():
            if self.loss is classification.cross_entropy:
                logits = classification.logits(model, batch)
                self.sets.check_labels(logits.shape[1])
                found = classification.label_losses(logits, classification.labels(batch))
            else:
                found = self.loss(model, batch)
        return per_sample_losses(found, batch_size(batch))

    def capped_losses(self, batch: Batch) -> Tensor:
        """Per-sample losses [B], no larger than the config's `forget_ceiling`."""
        return self.losses(batch).clamp(max=getattr(self.config, "forget_ceiling", math.inf))

    def logits(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """Outputs [B, C] of a classifier, in the precision asked for."""
        with self.precision():
            # several models may look at one batch
            found = classification.logits(self.model if model is None else model, fresh(batch))
        self.sets.check_labels(found.shape[1])
        return found.float() if found.dtype == torch.bfloat16 else found

    def precision(self) -> AbstractContextManager:
        mixed = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()

    def accumulate(
        self, batch: Batch, values: Callable[[Batch], Tensor], weight: float = 1.0
    ) -> Tensor:
        """Add the gradient of weight times the mean of values(batch) [B] to `.grad`; the values.

        A batch larger than `config.micro_batch` goes in parts, with the same result.
        """
        size = batch_size(batch)
        part = self.config.micro_batch or size
        found = []
        for at in range(0, size, part):
            piece = take(batch, slice(at, at + part)) if part < size else batch
            each = differentiable(values(piece))
            (weight / size * each.sum()).backward()
            found.append(each.detach())
        seen = torch.cat(found)
        if not bool(seen.isfinite().all()):  # before they reach the weights
            raise NonFiniteError(f"{self.sets.latest()}: a loss of the batch is not finite")
        return seen

    def frozen_copy(self) -> nn.Module:
        """The model as it is now, in evaluation mode, never to be trained."""
        return self.copied().eval().requires_grad_(False)

    def copied(self) -> nn.Module:
        try:
            return copy.deepcopy(self.model)
        except (RuntimeError, TypeError) as error:  # as of activations that a module has kept
            reason = str(error).split(". ")[0].splitlines()[0]
            raise InputError(
                f"model cannot be copied, which {type(self).__name__} needs: {reason}"
            ) from error

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
            yield self._told(self._measured({"step": 0, "seconds": self.seconds}))
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
            with evaluating(self.model):
                found = self.probe(self.model)
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
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise self._diverged(f"{name} is no longer finite", self.step)

    def _diverged(self, what: str, step: int) -> TrainingError:
        broken = self.sets.not_finite()
        advice = "lower the learning rate or set a forget ceiling"
        if broken:
            advice = f"values of the {' and '.join(broken)} batch are not finite either"
        return TrainingError(f"{what} at step {step} of {type(self).__name__}: {advice}")

    def _generators(self) -> dict[str, torch.Generator]:
        """Those that loaders of the sets draw their order from, where these have their own."""
        loaders = {kind: d for kind, d in self.data.items() if isinstance(d, DataLoader)}
        return {kind: d.generator for kind, d in loaders.items() if d.generator is not None}

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on: tensors and numbers, safe for `weights_only` loading.

        Tensors are copies. A model that is no longer finite is a `TrainingError`: what was saved
        before stays the last good state.
        """
        self._check_model()
        return resume.state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a trainer made with the same arguments.

        Raises:
            InputError: naming what does not fit: another method, optimizer or schedule, other
                groups of parameters, sets or tensors, damage. Nothing has changed then.
        """
        self._note_peaks()
        resume.load(self, state)


def differentiable(losses: Tensor) -> Tensor:
    """`losses`, if a backward pass from them would reach something."""
    if not losses.requires_grad:
        raise InputError(DETACHED)
    return losses
