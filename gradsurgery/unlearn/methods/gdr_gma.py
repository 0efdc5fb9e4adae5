"""GDR-GMA: both directions rectified, and mixed by how well the model still retains.

With f = -grad L_f and r = grad L_r, descend λ orth(f, r) + (1 - λ) orth(r, f), where orth(a, b)
is a without its part along b, if it opposes b, and λ = 1 / (1 + exp(gamma (L_r - eps))).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradsurgery import GDRGMA
from gradsurgery.unlearn.training.described import SURGERY, Space
from gradsurgery.unlearn.training.surgical import SurgicalConfig, SurgicalTrainer
from gradsurgery.unlearn.training.trainer import finite, require


@dataclass
class GDRGMAConfig(SurgicalConfig):
    """Options of GDR-GMA; `gradsurgery.GDRGMA` says more of the rule's."""

    gamma: float = 100.0
    """Steepness of the switch from forgetting to retaining, per nat; at least 0."""
    eps: float = 0.02
    """Mean retain loss of a batch (nats) at which both directions count the same; at least 0."""

    def check(self, name: str) -> None:
        super().check(name)
        for option in ("gamma", "eps"):
            value = getattr(self, option)
            require(finite(value) and value >= 0, f"{name}.{option}", "finite, at least 0", value)


class GDRGMATrainer(SurgicalTrainer[GDRGMAConfig]):
    """Forgets while the retain loss is below eps, and mends it above.

    Both directions are rectified against the other's original, where the authors' code rectifies
    the second against the first as already rectified; and they are those of one batch each, where
    that code keeps a bank of retain gradients. The ceiling is not part of the paper's rule.

    GDR-GMA: Machine Unlearning via Direction-Rectified and Magnitude-Adjusted Gradients, Lin et al.
    2024 (ACM Multimedia).
    """

    name = "gdr_gma"
    title = "GDR-GMA"
    about = "both gradients, each made orthogonal to the other, mixed by the retain loss"
    paper = "Lin et al. 2024"
    color = "#5e3c99"
    space: ClassVar[Space] = {**SURGERY, "gamma": (1.0, 10.0, 100.0), "eps": (0.005, 0.02, 0.1)}
    Config = GDRGMAConfig

    def make_rule(self) -> GDRGMA:
        config, objective = self.config, self.forget.objective
        return GDRGMA(gamma=config.gamma, eps=config.eps, objective=objective)
