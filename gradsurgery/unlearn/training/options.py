"""What every method can be told, the rate of each step, and the optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.text import brief
from gradsurgery.unlearn.training.config import check_types
from gradsurgery.unlearn.training.given import check_plain


@dataclass
class TrainerConfig:
    """What every method needs: how many steps, with which optimizer, when to stop."""

    steps: int = 100
    """Most steps taken."""
    lr: float = 1e-3
    """Peak learning rate."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    momentum: float = 0.0
    """Momentum of sgd; ignored by the others."""
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "onecycle"] = "constant"
    stop: Literal["never", "target", "validation"] = "never"
    """Stop early once forget accuracy is at most `target`, or at most the validation accuracy."""
    target: float = 0.0
    """Forget accuracy at which `stop = target` ends the run."""
    stop_every: int = 1
    """Steps between measurements of what `stop` compares. In a few steps more all can be lost; of a
    large model each costs passes over the forget and the validation set."""
    micro_batch: int | None = None
    """Most samples in one forward pass; a larger batch goes in parts, with the same gradients.
    None: all at once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: losses are computed under torch.autocast; weights stay as they are."""
    batch_norm: Literal["train", "eval"] = "train"
    """eval: batch norm keeps its statistics, so that a sample's loss depends on it alone."""

    def check(self, name: str) -> None:
        """Raise `InputError` naming the first option that makes no sense; `name` is its prefix."""
        for field in dataclasses.fields(self):
            option = field.name.replace("_", "-")
            check_plain(f"--{name}.{option}", getattr(self, field.name))
        check_types(self, f"--{name}.")
        require(self.steps >= 0, f"{name}.steps", "at least 0", self.steps)
        require(self.steps < 2**63, f"{name}.steps", "less than 2^63", brief(self.steps))
        require(finite(self.lr) and self.lr > 0, f"{name}.lr", "positive and finite", self.lr)
        require(0 <= self.momentum < 1, f"{name}.momentum", "in [0, 1)", self.momentum)
        decay = self.weight_decay
        require(finite(decay) and decay >= 0, f"{name}.weight-decay", "at least 0", decay)
        require(0 <= self.target <= 1, f"{name}.target", "in [0, 1]", self.target)
        require(self.stop_every >= 1, f"{name}.stop-every", "at least 1", self.stop_every)
        for field in ("forget_batch", "retain_batch"):
            size = getattr(self, field, 1)
            require(size >= 1, f"{name}.{field.replace('_', '-')}", "at least 1", size)
        part = self.micro_batch
        require(part is None or part >= 1, f"{name}.micro-batch", "at least 1", part)
        ceiling = getattr(self, "forget_ceiling", None)
        low = ceiling is not None and not ceiling > 0
        require(not low, f"{name}.forget-ceiling", "positive (inf: no ceiling)", ceiling)


def require(condition: bool, option: str, wanted: str, got: object) -> None:
    """Raise `InputError` naming a command-line option unless `condition` holds."""
    if not condition:
        raise InputError(f"--{option} must be {wanted}, got {got}")


def finite(value: float) -> bool:
    """Whether float32 holds it: torch fails in mid-run where a larger one meets a parameter."""
    return abs(value) <= torch.finfo(torch.float32).max


def rate_share(config: TrainerConfig, step: int, steps: int) -> float:
    """Share of the peak rate in step `step` of [0, steps): of the counter alone, so that resuming
    is exact.

    cosine: (1 + cos(pi t)) / 2. onecycle: linear from 1 / 25 over the first 30 %, then cosine to 0.
    """
    t = (step + 0.5) / steps
    warm = 0.3 if config.schedule == "onecycle" else 0.0
    if config.schedule == "constant":
        return 1.0
    if t < warm:
        return 0.04 + 0.96 * t / warm
    return 0.5 * (1 + math.cos(math.pi * (t - warm) / (1 - warm)))


def make_optimizer(
    parameters: Sequence[nn.Parameter], config: TrainerConfig
) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, config.lr, weight_decay=config.weight_decay)
