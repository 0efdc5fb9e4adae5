"""Retrain: forget the weights and train from scratch on the retain set, the gold standard."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.training.seeds import seeded
from gradsurgery.unlearn.training.trainer import Record, Trainer, TrainerConfig


@dataclass
class RetrainConfig(TrainerConfig):
    """How a model is trained from scratch."""

    steps: int = 380
    retain_batch: int = 64
    lr: float = 3e-3
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    weight_decay: float = 1e-2
    schedule: Literal["constant", "cosine", "onecycle"] = "onecycle"
    start: Literal["scratch", "given"] = "scratch"
    """scratch: weights are drawn anew. given: they are those of the model, such as a backbone's."""


def reset_parameters(model: nn.Module, seed: int) -> None:
    """Draw fresh weights by every module's own `reset_parameters`; torch's generators stay.

    Parameters that require no gradient, such as a frozen backbone, stay. So do buffers of modules
    without a `reset_parameters`: a fixed table is right to stay, but one learned from data would
    bring back what it was learned from, and needs that method.

    Raises:
        InputError: naming a parameter that no module draws; the model is then as it was.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    named = dict(model.named_parameters())
    try:
        with torch.no_grad(), seeded(seed, next(iter(named.values())).device):
            for parameter in named.values():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.fill_(math.nan)  # whatever keeps it was not drawn
            for module in model.modules():
                # torch's attention has it under the second name
                for method in ("reset_parameters", "_reset_parameters"):
                    getattr(module, method, lambda: None)()
            for name, parameter in named.items():
                if not parameter.requires_grad:
                    parameter.copy_(before[name])
                elif bool(parameter.isnan().any()):
                    owner = model.get_submodule(name.rpartition(".")[0])
                    raise InputError(
                        f"model: {name} ({type(owner).__name__}) is drawn by no "
                        "reset_parameters(), so the model cannot be made anew"
                    )
    except BaseException:
        model.load_state_dict(before)
        raise


class Retrain(Trainer[RetrainConfig]):
    """Train from scratch on the retain set; with all the data as `retain`, train an original.

    With `start="given"` from weights that never saw the forget set, which is for you to know.
    """

    name = "retrain"
    title = "Retrain"
    about = "trains from scratch on retain"
    color = "#1b1e23"
    Config = RetrainConfig
    draws = ("retain",)

    def prepare(self) -> None:
        if self.config.start == "scratch":
            if self.shards is not None:
                raise InputError(
                    "start = scratch: the model is in fully_shard, and weights are drawn whole: "
                    "draw them before, and take start = given"
                )
            reset_parameters(self.model, self.seed)

    def gradients(self) -> Record:
        losses = self.accumulate(self.draw("retain"), self.losses)
        return {"retain_loss_batch": losses.mean().item()}
