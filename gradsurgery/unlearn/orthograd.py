"""OrthoGrad: climb the forget loss along the part of its gradient orthogonal to every retain
sample's.

g = alpha mean_i g_i - (1 - alpha) g_perp, with g_perp = g_u minus its projection on span{g_1..g_k}.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from statistics import median
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradsurgery import OrthoGrad, Surgeon
from gradsurgery.step import joined
from gradsurgery.unlearn.data import Batch, batch_size
from gradsurgery.unlearn.trainer import (
    Record,
    Trainer,
    TrainerConfig,
    finite,
    make_optimizer,
    require,
)

TIMED = 9  # steps of either kind; the median of so few is steady to a few percent


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
            **self._limited(self.draw("forget"), self.draw("retain")), loss=self._capped_loss
        )
        return {
            "forget_loss_batch": info.forget_loss,
            "retain_loss_batch": info.retain_loss,
            "cosine_mean": float(info.cosines.mean()),
            "cosine_max": float(info.cosines.max()),
            "conflict_rate": info.conflict_rate,
            "kept_norm": cast(float, info.kept_norm),
            "rank": int(cast(float, info.rank)),
        }

    def step_seconds(self) -> dict[str, float]:
        """Median seconds of a step as `update` takes it, and of plain training on its samples.

        The two take turns on a copy of the model, at a rate of 0 so that it stays where it is. The
        run goes on as if this had not been called.
        """
        model = copy.deepcopy(self.model).train()
        batches = [next(copy.copy(self.batches[kind])) for kind in self.draws]
        limited = self._limited(*batches)
        whole = joined(*batches)
        parts = batches if whole is None else [whole]
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizers = [make_optimizer(parameters, self.config) for _ in range(2)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        surgeon = Surgeon(model, optimizers[0], self.rule)

        def plain() -> None:
            optimizers[1].zero_grad()
            loss = torch.cat([self.losses(part, model) for part in parts]).mean()
            loss.backward()
            optimizers[1].step()
            loss.item()

        steps = {
            "orthograd": lambda: surgeon.step(**limited, loss=self._capped_loss),
            "plain": plain,
        }
        taken: dict[str, list[float]] = {name: [] for name in steps}
        with torch.random.fork_rng(devices=[]):
            for _ in range(1 + TIMED):
                for name, step in steps.items():
                    start = time.perf_counter()
                    step()
                    taken[name].append(time.perf_counter() - start)
        # the first of each allocates the optimizer's state
        return {name: median(seconds[1:]) for name, seconds in taken.items()}

    def _limited(self, forget: Batch, retain: Batch) -> dict[str, Batch]:
        """Both batches as a step takes them: a forget sample past the ceiling no longer pushes."""
        ceiling = self.config.forget_ceiling
        return {"forget": with_ceiling(forget, ceiling), "retain": with_ceiling(retain, math.inf)}

    def _capped_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return torch.minimum(self.losses(batch["samples"], model), batch["ceiling"])


def with_ceiling(batch: Batch, ceiling: float) -> Batch:
    """`batch` with a ceiling per sample, [B]: one loss function then serves both sets."""
    device = next(leaf.device for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
    ceilings = torch.full((batch_size(batch),), ceiling, device=device)
    return {"samples": batch, "ceiling": ceilings}
