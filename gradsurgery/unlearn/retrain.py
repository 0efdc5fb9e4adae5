"""Retrain: forget the weights and train from scratch on the retain set, the gold standard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.trainer import Record, Trainer, TrainerConfig


@dataclass
class RetrainConfig(TrainerConfig):
    """How a model is trained from scratch."""

    steps: int = 380
    retain_batch: int = 64
    lr: float = 3e-3
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    weight_decay: float = 1e-2
    schedule: Literal["constant", "cosine", "onecycle"] = "onecycle"


def reset_parameters(model: nn.Module, seed: int) -> None:
    """Draw fresh weights by every module's own `reset_parameters`, leaving the global generator
    alone.

    Raises:
        InputError: naming a module that owns parameters and cannot draw them.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            elif next(module.parameters(recurse=False), None) is not None:
                kind = type(module).__name__
                raise InputError(
                    f"model: module {name or 'root'} ({kind}) owns parameters but has no "
                    "reset_parameters(), so it cannot be trained from scratch"
                )


class Retrain(Trainer[RetrainConfig]):
    """Train from scratch on the retain set; with all the data as `retain`, train an original."""

    Config = RetrainConfig
    draws = ("retain",)

    def prepare(self) -> None:
        reset_parameters(self.model, self.seed)

    def update(self) -> Record:
        self.optimizer.zero_grad()
        losses = self.accumulate(self.draw("retain"), self.losses)
        self.optimizer.step()
        return {"retain_loss_batch": losses.mean().item()}
