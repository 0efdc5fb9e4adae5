"""NegGrad: climb the forget loss and look at nothing else, ascend L_f."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gradsurgery.unlearn.training.described import CLIMB, LogUniform, Space
from gradsurgery.unlearn.training.forgetting import ForgetConfig, Forgetting
from gradsurgery.unlearn.training.trainer import Record


@dataclass
class NegGradConfig(ForgetConfig):
    """Options of NegGrad."""

    batch_norm: Literal["train", "eval"] = "eval"
    """eval: batch norm keeps its statistics, which would become those of forget samples alone."""


class NegGrad(Forgetting[NegGradConfig]):
    """Gradient ascent on the forget set. Nothing holds the retain set: few steps, a low rate.

    Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks, Golatkar et al.
    2020 (arXiv:1911.04933), where it is a baseline.
    """

    name = "neggrad"
    title = "NegGrad"
    about = "climbs the forget loss, looks at nothing else"
    paper = "Golatkar et al. 2020 (arXiv:1911.04933)"
    color = "#c4356b"
    space: ClassVar[Space] = {**CLIMB, "steps": (10, 20, 50), "lr": LogUniform(1e-5, 1e-3)}
    Config = NegGradConfig
    draws = ("forget",)

    def gradients(self) -> Record:
        losses = self.accumulate(self.draw("forget"), self.forget_losses, self.climb)
        return {"forget_loss_batch": losses.mean().item()}
