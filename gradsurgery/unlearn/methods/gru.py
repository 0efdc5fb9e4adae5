"""GRU: climb the forget loss along the part of its gradient that does not oppose retaining.

With f = -grad L_f and m a moving average of grad L_r, descend f - min(0, ⟨f, m⟩) / |m|² m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradsurgery import GRU
from gradsurgery.unlearn.training.described import SURGERY, Space
from gradsurgery.unlearn.training.surgical import SurgicalConfig, SurgicalTrainer
from gradsurgery.unlearn.training.trainer import require


@dataclass
class GRUConfig(SurgicalConfig):
    """Options of GRU."""

    retain_momentum: float = 0.2
    """Weight of the past in m, in [0, 1): m becomes this times m plus the rest times the batch's
    retain gradient. 0: that gradient alone; above 0, m is kept, as large as the model."""

    def check(self, name: str) -> None:
        super().check(name)
        momentum = self.retain_momentum
        require(0 <= momentum < 1, f"{name}.retain-momentum", "in [0, 1)", momentum)


class GRUTrainer(SurgicalTrainer[GRUConfig]):
    """Climbs the forget loss, and to first order never against m; nothing lowers the retain loss.

    The momentum of 0.2 is that of public code, which writes it as a weight of 0.8 on the newest
    gradient and begins m at zero; here m begins with the first gradient. The ceiling is not part of
    the paper's rule.

    GRU: Mitigating the Trade-off between Unlearning and Retention for Large Language Models, Wang
    et al. 2025 (arXiv:2503.09117).
    """

    name = "gru"
    title = "GRU"
    about = "the forget gradient, made orthogonal to the running mean of the retain gradients"
    paper = "Wang et al. 2025 (arXiv:2503.09117)"
    color = "#e7298a"
    space: ClassVar[Space] = {**SURGERY, "retain_momentum": (0.0, 0.2, 0.8)}
    Config = GRUConfig

    def make_rule(self) -> GRU:
        return GRU(momentum=self.config.retain_momentum, objective=self.forget.objective)
