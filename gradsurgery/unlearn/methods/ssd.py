"""SSD: shrink the weights that matter far more to the forget set than to all the data.

With I = mean over batches of (dL/dw)², where I_f > alpha I_D: w <- min(lambda I_D / I_f, 1) w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.errors import NonFiniteError
from gradsurgery.ops._inputs import wide
from gradsurgery.ranks.places import whole_of
from gradsurgery.unlearn.training.described import LogUniform, Space
from gradsurgery.unlearn.training.modes import evaluating
from gradsurgery.unlearn.training.trainer import Record, Trainer, TrainerConfig, finite, require


@dataclass
class SSDConfig(TrainerConfig):
    """Options of SSD; no optimizer takes its step, so those of an optimizer do nothing."""

    steps: int = 1
    """0 or 1: more are 1."""
    batch: int = 64
    """Samples of either set whose mean gradient is squared; a loader's own batches go as they
    are."""
    alpha: float = 10.0
    """How many times more a weight must matter to the forget set to be dampened, at least 0."""
    dampening: float = 1.0
    """lambda, at least 0: the smaller, the more a chosen weight shrinks; 0 removes it."""

    def check(self, name: str) -> None:
        super().check(name)
        require(self.batch >= 1, f"{name}.batch", "at least 1", self.batch)
        for field in ("alpha", "dampening"):
            value = getattr(self, field)
            require(finite(value) and value >= 0, f"{name}.{field}", "finite and at least 0", value)


class SSD(Trainer[SSDConfig]):
    """One step without training: importances are squared gradients in evaluation mode.

    D is all the training data, forget and retain together, as in the paper; where `retain` is a
    part of what was kept, so is D. As D holds the forget set, I_D is at least I_f times the share
    of D's batches that are to be forgotten: with alpha = 10 nothing is dampened once that is more
    than a tenth. Choose an alpha well below its inverse.

    The paper's importance is a mean over samples; that over batches is public code's, and depends
    on the batch. Here no batch mixes the two sets; in public code one may.

    Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening, Foster et al.
    2023 (arXiv:2308.07707).
    """

    name = "ssd"
    title = "SSD"
    about = "once shrinks the weights that matter to forget far more than to all"
    paper = "Foster et al. 2023 (arXiv:2308.07707)"
    color = "#35a7de"
    space: ClassVar[Space] = {
        "batch": (1, 16, 64),
        "alpha": LogUniform(0.3, 100),
        "dampening": LogUniform(0.01, 3),
    }
    Config = SSDConfig
    needs = ("forget", "retain")
    uses_optimizer = False

    def total_steps(self) -> int:
        return min(1, self.config.steps)

    def update(self) -> Record:
        with evaluating(self.model):
            forget, forget_batches = self._squares("forget")
            retain, retain_batches = self._squares("retain")
        factors, dampened = [], 0
        for f, r in zip(forget, retain, strict=True):
            importance = f / forget_batches
            overall = (f + r) / (forget_batches + retain_batches)
            chosen = importance > self.config.alpha * overall
            factor = (self.config.dampening * overall / importance).clamp(max=1)
            factors.append(torch.where(chosen, factor, 1))
            dampened += int(whole_of(chosen.sum()))
        with torch.no_grad():
            for p, factor in zip(self.parameters, factors, strict=True):
                p.mul_(factor)
        return {"dampened_share": dampened / sum(p.numel() for p in self.parameters)}

    def _squares(self, kind: str) -> tuple[list[Tensor], int]:
        """The squared gradients of a set's batches, summed, and how many batches they are."""
        squares = [torch.zeros_like(wide(p)) for p in self.parameters]
        batches = 0
        for batch in self.whole(kind, self.config.batch):
            self.model.zero_grad()
            self.accumulate(batch, self.losses)
            for square, p in zip(squares, self.parameters, strict=True):
                if p.grad is not None:
                    square.add_(wide(p.grad).square())
            batches += 1
        self.model.zero_grad()
        if not all(bool(square.isfinite().all()) for square in squares):
            raise NonFiniteError(f"a squared gradient of the {kind} set is not finite")
        return squares, batches
