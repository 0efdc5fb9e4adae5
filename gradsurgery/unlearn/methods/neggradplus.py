"""NegGrad+: one loss out of both, descend a L_r - (1 - a) L_f."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradsurgery.unlearn.training.described import SURGERY, Space
from gradsurgery.unlearn.training.forgetting import ForgetConfig, Forgetting
from gradsurgery.unlearn.training.trainer import Record, require


@dataclass
class NegGradPlusConfig(ForgetConfig):
    """Options of NegGradPlus."""

    retain_batch: int = 64
    retain_weight: float = 0.9999
    """a, in [0, 1]: 1 is Finetune, 0 is NegGrad."""

    def check(self, name: str) -> None:
        super().check(name)
        weight = self.retain_weight
        require(0 <= weight <= 1, f"{name}.retain-weight", "in [0, 1]", weight)


class NegGradPlus(Forgetting[NegGradPlusConfig]):
    """GradDiff with weights that sum to one: with a near 1 the ascent is a slight push, no more.

    The default a is that of the paper's larger problems; on its small ones it is 0.95. The ceiling
    is not part of the paper's rule.

    Towards Unbounded Machine Unlearning, Kurmanji et al. 2023 (arXiv:2302.09880), where it is a
    baseline.
    """

    name = "neggradplus"
    title = "NegGrad+"
    about = "the same, almost all weight on retain"
    paper = "Kurmanji et al. 2023 (arXiv:2302.09880)"
    color = "#8a5a14"
    space: ClassVar[Space] = {**SURGERY, "retain_weight": (0.5, 0.7, 0.9, 0.95, 0.99, 0.9999)}
    Config = NegGradPlusConfig
    draws = ("forget", "retain")

    def gradients(self) -> Record:
        weight = self.config.retain_weight
        forget = self.accumulate(self.draw("forget"), self.forget_losses, self.climb * (1 - weight))
        retain = self.accumulate(self.draw("retain"), self.losses, weight)
        return {
            "forget_loss_batch": forget.mean().item(),
            "retain_loss_batch": retain.mean().item(),
        }
