"""The protocol every unlearning method follows: one step at a time, resumable bit for bit.

A method is a `Trainer` with an `update`: it draws batches, changes the model once and says what it
saw. Order of data, schedule, probes, stopping and checkpoints are the same for all of them.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.jacobian import per_sample_losses
from gradsurgery.unlearn import classification
from gradsurgery.unlearn.config import check_types
from gradsurgery.unlearn.data import (
    Batch,
    Batches,
    Data,
    LoaderBatches,
    batch_size,
    batches,
    count,
    take,
    to_device,
    whole,
)
from gradsurgery.unlearn.data import overlap as samples_in_both
from gradsurgery.unlearn.seeds import derived

PerSampleLoss = Callable[[nn.Module, Batch], Tensor]  # -> losses [B]
Probe = Callable[[nn.Module], dict[str, float]]
Record = dict[str, Any]

# beyond float32: a run that reaches it has diverged even if nothing is infinite yet
DIVERGED = 1e30


class TrainingError(RuntimeError):
    """A run that cannot go on: the loss or the model stopped being finite."""


@dataclass
class TrainerConfig:
    """What every method needs: how many steps, with which optimizer, when to stop."""

    steps: int = 100
    """Most steps taken."""
    lr: float = 1e-3
    """Peak learning rate."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    momentum: float = 0.0
    """Momentum of sgd; ignored by the others."""
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "onecycle"] = "constant"
    stop: Literal["never", "target", "validation"] = "never"
    """Stop early once forget accuracy is at most `target`, or at most the validation accuracy."""
    target: float = 0.0
    """Forget accuracy at which `stop = target` ends the run."""
    micro_batch: int | None = None
    """Most samples in one forward pass; a larger batch goes in parts, with the same gradients.
    None: all at once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: losses are computed under torch.autocast; weights stay as they are."""
    batch_norm: Literal["train", "eval"] = "train"
    """eval: batch norm keeps its statistics, so that a sample's loss depends on it alone."""

    def check(self, name: str) -> None:
        """Raise `InputError` naming the first option that makes no sense; `name` is its prefix."""
        check_types(self, f"--{name}.")
        require(self.steps >= 0, f"{name}.steps", "at least 0", self.steps)
        require(finite(self.lr) and self.lr > 0, f"{name}.lr", "positive and finite", self.lr)
        require(0 <= self.momentum < 1, f"{name}.momentum", "in [0, 1)", self.momentum)
        decay = self.weight_decay
        require(finite(decay) and decay >= 0, f"{name}.weight-decay", "at least 0", decay)
        require(0 <= self.target <= 1, f"{name}.target", "in [0, 1]", self.target)
        for field in ("forget_batch", "retain_batch"):
            size = getattr(self, field, 1)
            require(size >= 1, f"{name}.{field.replace('_', '-')}", "at least 1", size)
        part = self.micro_batch
        require(part is None or part >= 1, f"{name}.micro-batch", "at least 1", part)
        ceiling = getattr(self, "forget_ceiling", math.inf)
        require(ceiling > 0, f"{name}.forget-ceiling", "positive (inf: no ceiling)", ceiling)


def require(condition: bool, option: str, wanted: str, got: object) -> None:
    """Raise `InputError` naming a command-line option unless `condition` holds."""
    if not condition:
        raise InputError(f"--{option} must be {wanted}, got {got}")


def finite(value: float) -> bool:
    return math.isfinite(value)


def rate_share(config: TrainerConfig, step: int, steps: int) -> float:
    """Share of the peak rate in step `step` of [0, steps): of the counter alone, so that resuming
    is exact.

    cosine: (1 + cos(pi t)) / 2. onecycle: linear from 1 / 25 over the first 30 %, then cosine to 0.
    """
    t = (step + 0.5) / steps
    warm = 0.3 if config.schedule == "onecycle" else 0.0
    if config.schedule == "constant":
        return 1.0
    if t < warm:
        return 0.04 + 0.96 * t / warm
    return 0.5 * (1 + math.cos(math.pi * (t - warm) / (1 - warm)))


def make_optimizer(
    parameters: Sequence[nn.Parameter], config: TrainerConfig
) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, config.lr, weight_decay=config.weight_decay)


C = TypeVar("C", bound=TrainerConfig)
Callback = Callable[["Trainer", Record], None]


class Trainer(ABC, Generic[C]):
    """One unlearning method on one model.

    Subclasses set `Config` and `draws` (the sets they draw batches from; the config has a
    `<set>_batch` for each) and write `update`. A loss given here is per sample and is one that
    training would lower; a method that climbs it does so itself.

    Args:
        model: changed in place.
        loss: `loss(model, batch)` -> [B], not reduced.
        forget: samples to forget, a pytree of tensors with leading dimension N, or a DataLoader
            of such batches. May be None for methods that never look at them.
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
    # attributes, modules or lists of tensors, that a resumed run must find again
    keeps: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        forget: Data,
        retain: Data,
        config: C,
        *,
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
        try:
            config.check(name)
        except InputError as error:  # named as on a command line
            raise InputError(str(error).removeprefix("--")) from None
        if config.stop != "never" and probe is None:
            raise InputError(f"stop = {config.stop} needs a probe that measures forget accuracy")
        if probe_every < 1:
            raise InputError(f"probe_every must be at least 1, got {probe_every}")
        if config.micro_batch is not None and config.batch_norm == "train":
            for path, module in model.named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    raise InputError(
                        f"micro_batch: {path or 'model'} ({type(module).__name__}) would normalize "
                        "over a part of the batch; set batch_norm = eval, or take whole batches"
                    )
        if isinstance(loss, nn.Module):
            raise InputError(
                f"loss must be a function (model, batch) -> losses [B], got {type(loss).__name__}: "
                "gradsurgery.unlearn.classification.cross_entropy is one for (inputs, labels)"
            )
        self.model, self.loss, self.config, self.seed = model, loss, config, seed
        self.probe, self.probe_every = probe, probe_every
        self.callbacks = tuple(callbacks)
        self.data = {"forget": forget, "retain": retain, "validation": validation}
        for kind in (*self.draws, *self.needs):
            if self.data[kind] is None:
                raise InputError(f"{kind}: {name} needs this data, got None")
        for kind, data in self.data.items():
            if data is not None:
                count(data, kind)
        for kind in ("retain", "validation"):
            if overlap == "error" and forget is not None and self.data[kind] is not None:
                both = samples_in_both(forget, self.data[kind])
                if both:
                    raise InputError(
                        f"forget and {kind} overlap: {both} samples are in both; if they are "
                        'duplicates that should be, overlap="allow" goes on'
                    )
        self.samples = dict.fromkeys(self.data, 0)  # samples seen of each set, with repetitions
        self.batches: dict[str, Batches | LoaderBatches] = {}
        for kind in self.draws:
            size = getattr(config, f"{kind}_batch")
            self.batches[kind] = batches(self.data[kind], size, derived(seed, kind), kind)
        self.generator = torch.Generator().manual_seed(derived(seed, "draws"))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise InputError("model: no parameter requires a gradient: there is nothing to unlearn")
        self.device = self.parameters[0].device
        self.step, self.stopped = 0, False
        start = time.perf_counter()
        self.prepare()
        self.seconds = time.perf_counter() - start
        make = optimizer or (lambda parameters: make_optimizer(parameters, config))
        self.optimizer = make(self.parameters)
        self.schedule = None if schedule is None else schedule(self.optimizer)
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise InputError("schedule: ReduceLROnPlateau needs a metric after each step; not here")
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]

    # -- what a method writes

    def prepare(self) -> None:
        """What is done once, before the optimizer is made; it counts as time of the method."""

    @abstractmethod
    def update(self) -> Record:
        """Take one step and return its numbers (batch losses, diagnostics)."""

    def total_steps(self) -> int:
        return self.config.steps

    def extra_state(self) -> dict[str, Any]:
        """What later steps depend on besides model, optimizer, order of data and draws."""
        held = {name: getattr(self, name) for name in self.keeps}
        return {k: v.state_dict() if isinstance(v, nn.Module) else v for k, v in held.items()}

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
        batch = to_device(next(self.batches[kind]), self.device)
        self.samples[kind] += batch_size(batch)
        return batch

    def whole(self, kind: str, size: int = 256) -> Iterator[Batch]:
        """One pass over a set, in batches of at most `size`, in order."""
        for batch in whole(self.data[kind], size, self.device):
            self.samples[kind] += batch_size(batch)
            yield batch

    def losses(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """Per-sample losses [B], in the precision asked for."""
        with self.precision():
            found = self.loss(self.model if model is None else model, batch)
        return per_sample_losses(found, batch_size(batch))

    def capped_losses(self, batch: Batch) -> Tensor:
        """Per-sample losses [B], no larger than the config's `forget_ceiling`."""
        return self.losses(batch).clamp(max=getattr(self.config, "forget_ceiling", math.inf))

    def logits(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """Outputs [B, C] of a classifier, in the precision asked for."""
        with self.precision():
            found = classification.logits(self.model if model is None else model, batch)
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
            each = values(take(batch, slice(at, at + part)))
            (weight / size * each.sum()).backward()
            found.append(each.detach())
        seen = torch.cat(found)
        if not bool(seen.isfinite().all()):  # before they reach the weights
            raise NonFiniteError("a loss of the batch is not finite")
        return seen

    def frozen_copy(self) -> nn.Module:
        """The model as it is now, in evaluation mode, never to be trained."""
        return copy.deepcopy(self.model).eval().requires_grad_(False)

    # -- the run

    def fit(self) -> Iterator[Record]:
        """Take the remaining steps, yielding one record after each.

        The first record, step 0, measures the model as given. After a record has been yielded
        `state_dict()` is a point from which another trainer continues to the same numbers.
        """
        if self.step == 0 and self.probe is not None:
            yield self._told(self._measured({"step": 0, "seconds": self.seconds}))
        total = self.total_steps()
        while self.step < total and not self.stopped:
            if self.schedule is None:
                share = rate_share(self.config, self.step, total)
                for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
                    group["lr"] = share * peak
            rate = self.optimizer.param_groups[0]["lr"]
            self._mode()
            start = time.perf_counter()
            try:
                numbers = self.update()
            except NonFiniteError as error:
                raise self._diverged(str(error), self.step + 1) from None
            if self.schedule is not None:
                self.schedule.step()
            self.seconds += time.perf_counter() - start
            self.step += 1
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
            self.model.eval()
            record.update(self.probe(self.model))
        if self.config.stop != "never":
            fixed = self.config.stop == "target"
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
        advice = "lower the learning rate or set a forget ceiling"
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
        cuda = self.device.type == "cuda"
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "batches": {kind: found.state_dict() for kind, found in self.batches.items()},
            "loaders": {kind: own.get_state() for kind, own in self._generators().items()},
            "samples": dict(self.samples),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "stopped": self.stopped,
            "extra": self.extra_state(),
        }
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a trainer made with the same arguments."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        for kind, drawn in state["batches"].items():
            self.batches[kind].load_state_dict(drawn)
        for kind, own in self._generators().items():
            own.set_state(state["loaders"][kind])
        self.samples.update(state["samples"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.generator.set_state(state["generator"])
        self.step, self.seconds, self.stopped = state["step"], state["seconds"], state["stopped"]
        self.load_extra_state(state["extra"])
