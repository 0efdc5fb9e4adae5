"""GradDiff: climb the forget loss and descend the retain loss, descend -gamma L_f + alpha L_r."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradsurgery.unlearn.training.described import SURGERY, Space
from gradsurgery.unlearn.training.forgetting import ForgetConfig, Forgetting
from gradsurgery.unlearn.training.trainer import Record, finite, require


@dataclass
class GradDiffConfig(ForgetConfig):
    """Options of GradDiff."""

    retain_batch: int = 64
    forget_weight: float = 1.0
    """gamma, at least 0."""
    retain_weight: float = 1.0
    """alpha, at least 0."""

    def check(self, name: str) -> None:
        super().check(name)
        for field in ("forget_weight", "retain_weight"):
            weight = getattr(self, field)
            option = f"{name}.{field.replace('_', '-')}"
            require(finite(weight) and weight >= 0, option, "finite and at least 0", weight)


class GradDiff(Forgetting[GradDiffConfig]):
    """A weighted difference of the two losses: conflicts between them are summed, not resolved.

    Continual Learning and Private Unlearning, Liu et al. 2022 (arXiv:2203.12817).
    """

    name = "graddiff"
    title = "GradDiff"
    about = "descends a weighted difference of the two losses"
    paper = "Liu et al. 2022 (arXiv:2203.12817)"
    color = "#d98200"
    space: ClassVar[Space] = {**SURGERY, "forget_weight": (0.1, 0.3, 1.0)}
    Config = GradDiffConfig
    draws = ("forget", "retain")

    def gradients(self) -> Record:
        alpha, gamma = self.config.retain_weight, self.config.forget_weight
        forget = self.accumulate(self.draw("forget"), self.forget_losses, self.climb * gamma)
        retain = self.accumulate(self.draw("retain"), self.losses, alpha)
        return {
            "forget_loss_batch": forget.mean().item(),
            "retain_loss_batch": retain.mean().item(),
        }
