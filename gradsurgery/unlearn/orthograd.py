"""OrthoGrad: climb the forget loss along the part of its gradient orthogonal to every retain
sample's.

g = alpha mean_i g_i - (1 - alpha) g_perp, with g_perp = g_u minus its projection on span{g_1..g_k}.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gradsurgery import OrthoGrad, Surgeon
from gradsurgery.unlearn.trainer import (
    Batch,
    Record,
    Trainer,
    TrainerConfig,
    batch_size,
    finite,
    require,
)


@dataclass
class OrthoGradConfig(TrainerConfig):
    """Options of OrthoGrad; `gradsurgery.OrthoGrad` says what the ones of the rule mean."""

    forget_batch: int = 64
    retain_batch: int = 64
    """k, the retain samples each update leaves unchanged to first order."""
    alpha: float = 0.5
    """Weight of descending the retain loss, in [0, 1]; 0 only climbs along the orthogonal part."""
    granularity: Literal["model", "tensor", "module"] = "model"
    retain: Literal["samples", "mean"] = "samples"
    rtol: float | None = None
    """Relative tolerance below which a direction does not count as one; none: the rule's own."""
    refine: int = 0
    small_tensors: Literal["project", "leave"] = "project"
    precondition: Literal["none", "optimizer"] = "none"
    forget_ceiling: float = math.inf
    """A forget sample whose loss is above this (nats) no longer pushes; inf is plain ascent."""

    def check(self, name: str) -> None:
        super().check(name)
        require(0 <= self.alpha <= 1, f"{name}.alpha", "in [0, 1]", self.alpha)
        require(self.refine >= 0, f"{name}.refine", "at least 0", self.refine)
        if self.rtol is not None:
            require(finite(self.rtol) and self.rtol > 0, f"{name}.rtol", "positive", self.rtol)


class OrthoGradTrainer(Trainer[OrthoGradConfig]):
    """Per-sample gradient orthogonalization.

    The ceiling is not part of the paper's rule: cross-entropy pushes hardest on the samples that
    are already forgotten, so without one a long run ends by destroying the model.

    Go Beyond Your Means: Unlearning with Per-Sample Gradient Orthogonalization, Shamsian et al.
    (arXiv:2503.02312).
    """

    Config = OrthoGradConfig
    draws = ("forget", "retain")

    def prepare(self) -> None:
        tolerance = {} if self.config.rtol is None else {"rtol": self.config.rtol}
        self.rule = OrthoGrad(
            alpha=self.config.alpha,
            granularity=self.config.granularity,
            retain=self.config.retain,
            refine=self.config.refine,
            small_tensors=self.config.small_tensors,
            precondition=None if self.config.precondition == "none" else self.config.precondition,
            **tolerance,
        )
        self.surgeon: Surgeon | None = None

    def update(self) -> Record:
        if self.surgeon is None:
            self.surgeon = Surgeon(self.model, self.optimizer, self.rule)
        info = self.surgeon.step(
            forget=with_ceiling(next(self.batches["forget"]), self.config.forget_ceiling),
            retain=with_ceiling(next(self.batches["retain"]), math.inf),
            loss=self._capped_loss,
        )
        return {
            "forget_loss_batch": info.forget_loss,
            "retain_loss_batch": info.retain_loss,
            "cosine_mean": float(info.cosines.mean()),
            "cosine_max": float(info.cosines.max()),
            "conflict_rate": info.conflict_rate,
            "kept_norm": float(info.kept_norm),
            "rank": int(info.rank),
        }

    def _capped_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return torch.minimum(self.loss(model, batch["samples"]), batch["ceiling"])


def with_ceiling(batch: Batch, ceiling: float) -> Batch:
    """`batch` with a ceiling per sample, [B]: one loss function then serves both sets."""
    return {"samples": batch, "ceiling": torch.full((batch_size(batch),), ceiling)}
