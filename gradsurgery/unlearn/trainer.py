"""The protocol every unlearning method follows: one step at a time, resumable bit for bit.

A method is a `Trainer` with an `update`: it draws batches, changes the model once and says what it
saw. Order of data, schedule, probes, stopping and checkpoints are the same for all of them.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradsurgery.errors import InputError, NonFiniteError

Batch = Any  # pytree of tensors that share their leading dimension B
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

    def check(self, name: str) -> None:
        """Raise `InputError` naming the first option that makes no sense; `name` is its prefix."""
        require(self.steps >= 0, f"{name}.steps", "at least 0", self.steps)
        require(finite(self.lr) and self.lr > 0, f"{name}.lr", "positive and finite", self.lr)
        require(0 <= self.momentum < 1, f"{name}.momentum", "in [0, 1)", self.momentum)
        decay = self.weight_decay
        require(finite(decay) and decay >= 0, f"{name}.weight-decay", "at least 0", decay)
        require(0 <= self.target <= 1, f"{name}.target", "in [0, 1]", self.target)
        for field in ("forget_batch", "retain_batch"):
            size = getattr(self, field, 1)
            require(size >= 1, f"{name}.{field.replace('_', '-')}", "at least 1", size)
        ceiling = getattr(self, "forget_ceiling", math.inf)
        require(ceiling > 0, f"{name}.forget-ceiling", "positive (inf: no ceiling)", ceiling)


def require(condition: bool, option: str, wanted: str, got: object) -> None:
    """Raise `InputError` naming a command-line option unless `condition` holds."""
    if not condition:
        raise InputError(f"--{option} must be {wanted}, got {got}")


def finite(value: float) -> bool:
    return math.isfinite(value)


def batch_size(batch: Batch) -> int:
    """Leading dimension shared by every tensor of `batch`."""
    sizes = {leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)}
    if len(sizes) != 1:
        raise InputError(f"batch: tensors must share one leading dimension, got {sorted(sizes)}")
    return sizes.pop()


def take(batch: Batch, indices: Tensor) -> Batch:
    """The samples `indices` of a pytree of tensors."""
    return pytree.tree_map_only(Tensor, lambda leaf: leaf[indices], batch)


class Batches:
    """Endless shuffled batches whose whole state is a counter.

    Epoch e is shuffled by a generator seeded with (seed, e), so the t-th batch depends on t alone
    and a resumed run sees what the interrupted one would have seen. A remainder smaller than a
    batch is left out of its epoch, hence every batch has the same size, min(size, N).
    """

    def __init__(self, data: Batch, size: int, seed: int) -> None:
        self.data, self.seed, self.drawn = data, seed, 0
        self.n = batch_size(data)
        if self.n == 0:
            raise InputError("data: no samples to draw batches from")
        self.size = min(size, self.n)
        self.per_epoch = self.n // self.size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __next__(self) -> Batch:
        epoch, position = divmod(self.drawn, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        self.drawn += 1
        return take(self.data, self._order[position * self.size : (position + 1) * self.size])

    def __iter__(self) -> Batches:
        return self


def learning_rate(config: TrainerConfig, step: int, steps: int) -> float:
    """Rate of step `step` in [0, steps), a function of the counter alone so that resuming is exact.

    cosine: lr (1 + cos(pi t)) / 2. onecycle: linear from lr / 25 over the first 30 %, then cosine
        to 0.
    """
    t = (step + 0.5) / steps
    warm = 0.3 if config.schedule == "onecycle" else 0.0
    if config.schedule == "constant":
        return config.lr
    if t < warm:
        return config.lr * (0.04 + 0.96 * t / warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (t - warm) / (1 - warm)))


def make_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("model: no parameter requires a gradient, so there is nothing to unlearn")
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, config.lr, weight_decay=config.weight_decay)


C = TypeVar("C", bound=TrainerConfig)


class Trainer(ABC, Generic[C]):
    """One unlearning method on one model.

    Subclasses set `Config` and `draws` (the sets they draw batches from; the config has a
    `<set>_batch` for each) and write `update`. A loss given here is per sample and is one that
    training would lower; a method that climbs it does so itself.

    Args:
        model: changed in place.
        loss: `loss(model, batch)` -> [B], not reduced.
        forget: samples to forget, a pytree of tensors with leading dimension N. May be None for
            methods that never look at them.
        retain: samples to keep, likewise.
        config: the method's own `Config`.
        probe: measures the model during the run; must give `forget_accuracy` (and
            `validation_accuracy`) where `config.stop` needs them.
        probe_every: steps between probes; the first and the last step are always probed.
        seed: order of the data, and the initial weights where a method draws them.
    """

    Config: ClassVar[type[TrainerConfig]] = TrainerConfig
    draws: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        forget: Batch,
        retain: Batch,
        config: C,
        *,
        probe: Probe | None = None,
        probe_every: int = 10,
        seed: int = 0,
    ) -> None:
        if config.stop != "never" and probe is None:
            raise InputError(f"stop = {config.stop} needs a probe that measures forget accuracy")
        self.model, self.loss, self.config, self.seed = model, loss, config, seed
        self.probe, self.probe_every = probe, probe_every
        self.batches: dict[str, Batches] = {}
        for offset, kind in enumerate(self.draws):
            data = forget if kind == "forget" else retain
            if data is None:
                raise InputError(f"{kind}: {type(self).__name__} needs this data, got None")
            size = getattr(config, f"{kind}_batch")
            self.batches[kind] = Batches(data, size, seed * 2 + offset)
        self.prepare()
        self.optimizer = make_optimizer(model, config)
        self.step, self.seconds, self.stopped = 0, 0.0, False

    def prepare(self) -> None:
        """Change the model once before the optimizer is made."""

    @abstractmethod
    def update(self) -> Record:
        """Take one optimizer step and return its numbers (batch losses, diagnostics)."""

    def fit(self) -> Iterator[Record]:
        """Take the remaining steps, yielding one record after each.

        The first record, step 0, measures the model as given. After a record has been yielded
        `state_dict()` is a point from which another trainer continues to the same numbers.
        """
        if self.step == 0 and self.probe is not None:
            yield self._measured({"step": 0, "seconds": 0.0})
        while self.step < self.config.steps and not self.stopped:
            rate = learning_rate(self.config, self.step, self.config.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.model.train()
            start = time.perf_counter()
            try:
                numbers = self.update()
            except NonFiniteError as error:
                raise self._diverged(str(error), self.step + 1) from None
            self.seconds += time.perf_counter() - start
            self.step += 1
            record = {"step": self.step, "seconds": self.seconds, "lr": rate, **numbers}
            if self.probe is not None and (
                self.step % self.probe_every == 0 or self.step == self.config.steps
            ):
                self._measured(record)
            self._check_finite(record)
            yield record

    def run(self) -> nn.Module:
        """Take all steps; the model."""
        for _ in self.fit():
            pass
        return self.model

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

    def _diverged(self, what: str, step: int) -> TrainingError:
        advice = "lower the learning rate or set a forget ceiling"
        return TrainingError(f"{what} at step {step} of {type(self).__name__}: {advice}")

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on: tensors and numbers, safe for `weights_only` loading."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "drawn": {kind: batches.drawn for kind, batches in self.batches.items()},
            "rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "stopped": self.stopped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a trainer made with the same arguments."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for kind, drawn in state["drawn"].items():
            self.batches[kind].drawn = drawn
        torch.set_rng_state(state["rng"])
        self.step, self.seconds, self.stopped = state["step"], state["seconds"], state["stopped"]
