"""OrthoGrad: climb the forget loss along the part of its gradient orthogonal to every retain
sample's.

g = alpha mean_i g_i - (1 - alpha) g_perp, with g_perp = g_u minus its projection on span{g_1..g_k}.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, Literal

import torch

from gradsurgery import OrthoGrad, Surgeon
from gradsurgery.batch import joined
from gradsurgery.unlearn.training.data import whole
from gradsurgery.unlearn.training.described import SURGERY, Space
from gradsurgery.unlearn.training.surgical import SurgicalConfig, SurgicalTrainer
from gradsurgery.unlearn.training.trainer import finite, make_optimizer, require

TIMED = 9  # steps of either kind; the median of so few is steady to a few percent


@dataclass
class OrthoGradConfig(SurgicalConfig):
    """Options of OrthoGrad; `gradsurgery.OrthoGrad` says what the ones of the rule mean."""

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

    def check(self, name: str) -> None:
        super().check(name)
        require(0 <= self.alpha <= 1, f"{name}.alpha", "in [0, 1]", self.alpha)
        require(self.refine >= 0, f"{name}.refine", "at least 0", self.refine)
        if self.rtol is not None:
            require(finite(self.rtol) and self.rtol > 0, f"{name}.rtol", "positive", self.rtol)


class OrthoGradTrainer(SurgicalTrainer[OrthoGradConfig]):
    """Per-sample gradient orthogonalization. The ceiling is not part of the paper's rule.

    Go Beyond Your Means: Unlearning with Per-Sample Gradient Orthogonalization, Shamsian et al.
    (arXiv:2503.02312).
    """

    name = "orthograd"
    title = "OrthoGrad"
    about = "climbs the forget gradient's part orthogonal to every retain sample's"
    paper = "Shamsian et al. 2025 (arXiv:2503.02312)"
    color = "#0072b2"
    space: ClassVar[Space] = {
        **SURGERY,
        "alpha": (0.3, 0.5, 0.7, 0.9),
        "granularity": ("model", "tensor"),
    }
    Config = OrthoGradConfig

    def make_rule(self) -> OrthoGrad:
        return OrthoGrad(
            alpha=self.config.alpha,
            objective=self.forget.objective,
            granularity=self.config.granularity,
            retain=self.config.retain,
            refine=self.config.refine,
            small_tensors=self.config.small_tensors,
            precondition=None if self.config.precondition == "none" else self.config.precondition,
            rtol=self.config.rtol,
        )

    def step_seconds(self) -> dict[str, float]:
        """Median seconds of a step as `update` takes it, and of plain training on its samples.

        The two take turns on a copy of the model, at a rate of 0 so that it stays where it is. The
        run goes on as if this had not been called. Of several ranks each takes whole steps alone.
        """
        twin = copy.copy(self)
        twin.model = model = copy.deepcopy(self.model)
        twin._mode()
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed for each pass
            passes = [whole(self.data[k], self.batches[k].size, self.device) for k in self.draws]
            batches = [next(samples) for samples in passes]
        both = joined(*batches)
        parts = batches if both is None else [both]
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizers = [make_optimizer(parameters, self.config) for _ in range(2)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        surgeon = Surgeon(model, optimizers[0], self.rule, process_group=False)

        def climb() -> None:
            surgeon.step(**self.given(surgeon, *batches))

        def plain() -> None:
            optimizers[1].zero_grad()
            loss = torch.cat([self.losses(part, model) for part in parts]).mean()
            loss.backward()
            optimizers[1].step()
            loss.item()

        steps = {
            "orthograd": climb,
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
