"""Finetune: go on training on the retain set and rely on forgetting by neglect, descend L_r."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradsurgery.unlearn.training.described import LogUniform, Space
from gradsurgery.unlearn.training.trainer import Record, Trainer, TrainerConfig


@dataclass
class FinetuneConfig(TrainerConfig):
    """Options of Finetune."""

    retain_batch: int = 64


class Finetune(Trainer[FinetuneConfig]):
    """Descend the retain loss alone. Slow where a model has memorized: nothing pushes."""

    name = "finetune"
    title = "Finetune"
    about = "goes on training on retain"
    color = "#5a9e1e"
    space: ClassVar[Space] = {"steps": (100, 200, 400), "lr": LogUniform(3e-4, 1e-2)}
    Config = FinetuneConfig
    draws = ("retain",)

    def gradients(self) -> Record:
        retain_losses = self.accumulate(self.draw("retain"), self.losses)
        return {"retain_loss_batch": retain_losses.mean().item()}
