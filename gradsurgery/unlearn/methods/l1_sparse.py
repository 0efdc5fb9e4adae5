"""l1-sparse: Finetune drawn toward a sparse model at first, descend L_r + a_t |w|_1.

a_t falls linearly from a at the first step to 0 at the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradsurgery.ranks.places import whole_of
from gradsurgery.unlearn.training.described import LogUniform, Space
from gradsurgery.unlearn.training.trainer import Record, Trainer, TrainerConfig, finite, require


@dataclass
class L1SparseConfig(TrainerConfig):
    """Options of L1Sparse."""

    retain_batch: int = 64
    l1: float = 5e-4
    """a, the weight of the norm at the first step, at least 0; 0 is Finetune."""

    def check(self, name: str) -> None:
        super().check(name)
        require(finite(self.l1) and self.l1 >= 0, f"{name}.l1", "finite and at least 0", self.l1)


class L1Sparse(Trainer[L1SparseConfig]):
    """Descend the retain loss and the l1 norm of all weights that train, biases and norms too.

    A subgradient of the norm makes weights small, not exactly 0. Public code lets a_t fall epoch by
    epoch and can spend the last epochs at 0; here it falls step by step, and a run of one step
    has a_t = a.

    Model Sparsity Can Simplify Machine Unlearning, Jia et al. 2023 (arXiv:2304.04934).
    """

    name = "l1_sparse"
    title = "l1-sparse"
    about = "retain, with a penalty on the weights' absolute values that fades"
    paper = "Jia et al. 2023 (arXiv:2304.04934)"
    color = "#8a8a00"
    space: ClassVar[Space] = {
        "steps": (100, 200, 400),
        "lr": LogUniform(3e-4, 1e-2),
        "l1": LogUniform(1e-6, 1e-3),
    }
    Config = L1SparseConfig
    draws = ("retain",)

    def gradients(self) -> Record:
        retain_losses = self.accumulate(self.draw("retain"), self.losses)
        weight = self.config.l1 * (1 - self.step / max(self.total_steps() - 1, 1))
        norm = torch.stack([p.abs().sum() for p in self.parameters]).sum()
        (weight * norm).backward()
        return {
            "retain_loss_batch": retain_losses.mean().item(),
            "l1_weight": weight,
            "l1_norm": whole_of(norm.detach()).item(),
        }
