"""SCRUB: a student that leaves its teacher, the original, on forget and stays with it on retain.

Pass over forget: ascend D. Pass over retain: descend gamma CE + alpha D, with
D = T² KL(teacher || student) at temperature T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradsurgery.unlearn.objectives.base import Batch, batch_size, divergence, per_sample
from gradsurgery.unlearn.objectives.classification import label_losses
from gradsurgery.unlearn.training.described import LogUniform, Space
from gradsurgery.unlearn.training.trainer import Record, Trainer, TrainerConfig, finite, require


@dataclass
class SCRUBConfig(TrainerConfig):
    """Options of SCRUB. How long it takes is a matter of epochs, `steps` only ends it early."""

    steps: int = 10_000
    """Most steps taken, of those the epochs have."""
    lr: float = 5e-4
    forget_batch: int = 16
    retain_batch: int = 32
    epochs: int = 5
    """Passes over the retain set, at least 1."""
    msteps: int = 3
    """Epochs, the first ones, that begin with a pass over the forget set; at least 0."""
    retain_weight: float = 1.0
    """gamma, of the cross-entropy on retain, at least 0."""
    distill_weight: float = 0.5
    """alpha, of the divergence from the teacher on retain, at least 0."""
    temperature: float = 4.0
    """T, by which both models' logits are divided in the divergence; positive."""

    def check(self, name: str) -> None:
        super().check(name)
        require(self.epochs >= 1, f"{name}.epochs", "at least 1", self.epochs)
        require(self.msteps >= 0, f"{name}.msteps", "at least 0", self.msteps)
        for field in ("retain_weight", "distill_weight"):
            weight = getattr(self, field)
            option = f"{name}.{field.replace('_', '-')}"
            require(finite(weight) and weight >= 0, option, "finite and at least 0", weight)
        heat = self.temperature
        require(finite(heat) and heat > 0, f"{name}.temperature", "positive and finite", heat)


class SCRUB(Trainer[SCRUBConfig]):
    """Passes over forget and retain by turns, then over retain alone.

    At the start the student is its teacher, where D is smallest and its gradient zero: the first
    pass over forget moves little but for what dropout, batch norm or rounding brings in, and it is
    the retain pass after it that parts the two. Nothing bounds D: `msteps` is what ends its climb.
    CE is cross-entropy with the batch's labels, from the same forward pass as D: `loss` is never
    called, and a function of your own is a warning. The authors' code also lowers the learning rate
    at fixed epochs (here: `schedule`), and their variant that rewinds to an earlier checkpoint is
    not here.

    Towards Unbounded Machine Unlearning, Kurmanji et al. 2023 (arXiv:2302.09880).
    """

    name = "scrub"
    title = "SCRUB"
    about = "by turns leaves the original on forget and stays with it on retain"
    paper = "Kurmanji et al. 2023 (arXiv:2302.09880)"
    color = "#009e73"
    asks = frozenset({"outputs"})
    space: ClassVar[Space] = {
        "forget_batch": (16, 32, 64),
        "retain_batch": (32, 64),
        "epochs": (3, 5, 10),
        "msteps": (1, 2, 3, 5),
        "lr": LogUniform(1e-4, 3e-3),
        "distill_weight": (0.1, 0.5, 1.0),
    }
    Config = SCRUBConfig
    draws = ("forget", "retain")
    keeps = ("teacher",)
    sharded = False
    instead_of_loss = "it takes divergences and the cross-entropy of the model's outputs"

    def labeled_sets(self) -> tuple[str, ...]:
        return ("retain",)

    def prepare(self) -> None:
        self.teacher = self.frozen_copy()

    def total_steps(self) -> int:
        forget, retain = (self.batches[kind].per_epoch for kind in self.draws)
        epochs = self.config.epochs
        return min(self.config.steps, min(self.config.msteps, epochs) * forget + epochs * retain)

    def phase(self) -> str:
        """The set that the present step is of."""
        forget, retain = (self.batches[kind].per_epoch for kind in self.draws)
        epoch, position = divmod(self.step, forget + retain)  # of epochs that have both passes
        return "forget" if epoch < self.config.msteps and position < forget else "retain"

    def gradients(self) -> Record:
        kind = self.phase()
        values, weight = (self._apart, -1.0) if kind == "forget" else (self._kept, 1.0)
        found = self.accumulate(self.draw(kind), values, weight)
        return {f"{kind}_loss_batch": found.mean().item()}

    def _apart(self, batch: Batch) -> Tensor:
        teacher, student = self.outputs(batch, self.teacher), self.outputs(batch)
        apart = divergence(student.logits, teacher.logits, self.config.temperature)
        return per_sample(apart, student.sample, batch_size(batch))

    def _kept(self, batch: Batch) -> Tensor:
        student, teacher = self.outputs(batch), self.outputs(batch, self.teacher)
        right = label_losses(student.logits, student.labels)
        apart = divergence(student.logits, teacher.logits, self.config.temperature)
        both = self.config.retain_weight * right + self.config.distill_weight * apart
        return per_sample(both, student.sample, batch_size(batch))
