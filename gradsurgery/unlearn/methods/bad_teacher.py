"""Bad Teacher: learn forget from a teacher who knows nothing, and retain from the original.

Descend KL(incompetent || student) on forget + KL(competent || student) on retain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradsurgery.unlearn.methods.retrain import reset_parameters
from gradsurgery.unlearn.objectives.base import Batch, batch_size, divergence, per_sample
from gradsurgery.unlearn.training.described import PAIRED, Space
from gradsurgery.unlearn.training.trainer import Record, Trainer, TrainerConfig, finite, require


@dataclass
class BadTeacherConfig(TrainerConfig):
    """Options of Bad Teacher."""

    forget_batch: int = 64
    retain_batch: int = 64
    temperature: float = 1.0
    """T, by which all models' logits are divided in the divergences; positive."""

    def check(self, name: str) -> None:
        super().check(name)
        heat = self.temperature
        require(finite(heat) and heat > 0, f"{name}.temperature", "positive and finite", heat)


class BadTeacher(Trainer[BadTeacherConfig]):
    """Both sets are learned from outputs. No label is looked at; `loss` is never called, and a
    function of your own is a warning.

    The incompetent teacher is the original's architecture with weights drawn afresh. The paper has
    one batch of both sets mixed and its mean; here a step takes the sum of two means, one of each
    set, so that a small forget set counts as much as a large retain set. The factor T² on the
    divergences is inferred: the paper's T is 1, where it makes no difference.

    Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks using an Incompetent Teacher,
    Chundawat et al. 2023 (arXiv:2205.08096).
    """

    name = "bad_teacher"
    title = "Bad Teacher"
    about = "the original teaches on retain, a random network on forget"
    paper = "Chundawat et al. 2023 (arXiv:2205.08096)"
    color = "#9b2226"
    asks = frozenset({"outputs"})
    space: ClassVar[Space] = {**PAIRED, "temperature": (1.0, 2.0, 4.0)}
    Config = BadTeacherConfig
    draws = ("forget", "retain")
    keeps = ("competent", "incompetent")
    sharded = False
    instead_of_loss = "it takes divergences of the model's outputs from two teachers'"

    def prepare(self) -> None:
        self.competent, self.incompetent = self.frozen_copy(), self.copied()
        # a seed of its own: with the trainer's the weights may be those the original began with
        seed = torch.randint(2**31, (), generator=self.generator)
        reset_parameters(self.incompetent, int(seed))
        self.incompetent.eval().requires_grad_(False)

    def gradients(self) -> Record:
        forget = self.accumulate(self.draw("forget"), lambda b: self._apart(b, self.incompetent))
        retain = self.accumulate(self.draw("retain"), lambda b: self._apart(b, self.competent))
        return {
            "forget_loss_batch": forget.mean().item(),
            "retain_loss_batch": retain.mean().item(),
        }

    def _apart(self, batch: Batch, teacher: nn.Module) -> Tensor:
        wanted, found = self.outputs(batch, teacher), self.outputs(batch)
        apart = divergence(found.logits, wanted.logits, self.config.temperature)
        return per_sample(apart, found.sample, batch_size(batch))
