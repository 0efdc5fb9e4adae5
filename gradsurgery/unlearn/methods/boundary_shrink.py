"""Boundary Shrink: give each forget sample up to the class just across its decision boundary.

Descend CE(x, y'), with y' = argmax over c != y of f(x + bound sign(grad_x CE(f(x), y)))_c and f the
original model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.unlearn.objectives.base import Batch, Outputs
from gradsurgery.unlearn.objectives.classification import label_losses
from gradsurgery.unlearn.training.described import BATCHES, LogUniform, Space
from gradsurgery.unlearn.training.trainer import Record, Trainer, TrainerConfig, finite, require


@dataclass
class BoundaryShrinkConfig(TrainerConfig):
    """Options of Boundary Shrink."""

    batch_norm: Literal["train", "eval"] = "eval"
    """eval: batch norm keeps its statistics, which would become those of forget samples alone."""
    forget_batch: int = 64
    bound: float = 0.1
    """How far each value of an input is moved to find the class nearby, in units of the inputs;
    positive."""

    def check(self, name: str) -> None:
        super().check(name)
        bound = self.bound
        require(finite(bound) and bound > 0, f"{name}.bound", "positive and finite", bound)


class BoundaryShrink(Trainer[BoundaryShrinkConfig]):
    """Fine-tuning on forget with the wrong labels nearest to it. Nothing holds the retain set.

    The authors' code takes the original's prediction after the move, which may still be the true
    label: such a sample is then learned again. Here it gets the second-best class. That code also
    undoes the normalization of images, clamps them to [0, 1] and rounds them to 8 bits; here inputs
    are moved as they are. The paper trains with SGD at a rate of 1e-5 for 10 epochs.

    Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision Boundary, Chen
    et al. 2023 (arXiv:2303.11570).
    """

    name = "boundary_shrink"
    title = "Boundary shrink"
    about = "learns the nearest wrong class on forget"
    paper = "Chen et al. 2023 (arXiv:2303.11570)"
    color = "#1a8a9a"
    asks = frozenset({"losses", "outputs", "inputs", "with_inputs", "with_labels"})
    space: ClassVar[Space] = {
        "forget_batch": BATCHES,
        "steps": (10, 20, 50),
        "lr": LogUniform(1e-5, 1e-3),
        "bound": (0.05, 0.1, 0.3, 1.0),
    }
    Config = BoundaryShrinkConfig
    draws = ("forget",)
    keeps = ("original",)
    sharded = False

    def labeled_sets(self) -> tuple[str, ...]:
        return ("forget",)

    def prepare(self) -> None:
        self.original = self.frozen_copy()

    def gradients(self) -> Record:
        losses = self.accumulate(self.draw("forget"), self._relabeled)
        return {"forget_loss_batch": losses.mean().item()}

    def _relabeled(self, batch: Batch) -> Tensor:
        return self.losses(self.objective.with_labels(batch, self.nearest(batch)))

    def nearest(self, batch: Batch) -> Tensor:
        """For each prediction the wrong class most likely to the original once moved, [N]."""
        given = self.objective.inputs(batch)
        if not (isinstance(given, Tensor) and given.is_floating_point()):
            got = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise InputError(f"forget: inputs must be a tensor of real numbers to move, got {got}")
        moved = given.detach().clone().requires_grad_()
        found = self._of_original(batch, moved)
        losses = label_losses(found.logits, found.labels)
        (slope,) = torch.autograd.grad(losses.sum(), moved)
        with torch.no_grad():
            found = self._of_original(batch, given + self.config.bound * slope.sign())
        return found.logits.scatter(1, found.labels[:, None], -math.inf).argmax(1)

    def _of_original(self, batch: Batch, inputs: Tensor) -> Outputs:
        return self.outputs(self.objective.with_inputs(batch, inputs), self.original)
