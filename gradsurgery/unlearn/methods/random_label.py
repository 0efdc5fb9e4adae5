"""Random label: teach the forget set labels drawn at random among the wrong ones.

Descend forget_weight CE(x_f, y') + retain_weight L_r, with y' uniform over the classes but y, or
whatever else a task relabels a sample with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor

from gradsurgery.unlearn.objectives.base import Batch
from gradsurgery.unlearn.objectives.classification import Classification, label_losses
from gradsurgery.unlearn.training.described import PAIRED, Space
from gradsurgery.unlearn.training.trainer import Record, Trainer, TrainerConfig, finite, require


@dataclass
class RandomLabelConfig(TrainerConfig):
    """Options of RandomLabel."""

    forget_batch: int = 64
    retain_batch: int = 64
    forget_weight: float = 1.0
    """Weight of the loss to the random labels, at least 0."""
    retain_weight: float = 1.0
    """Weight of the retain loss, at least 0."""

    def check(self, name: str) -> None:
        super().check(name)
        for field in ("forget_weight", "retain_weight"):
            weight = getattr(self, field)
            option = f"{name}.{field.replace('_', '-')}"
            require(finite(weight) and weight >= 0, option, "finite and at least 0", weight)


R = TypeVar("R", bound=RandomLabelConfig)


class RandomLabel(Trainer[R]):
    """Cross-entropy to wrong labels on the forget set, the loss itself on the retain set. A task
    that is no classifier has its own loss on both.

    A sample gets a new label each time it is drawn, so in the mean all wrong classes pull equally.
    Public code differs: some draws once per sample and for good, some once per epoch, and some
    among all classes, the true one too. Weights of the two losses are not part of the method; of
    public code, some joins both sets in one loss and some takes them in turn.

    Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks, Golatkar et al.
    2020 (arXiv:1911.04933), where it is a baseline.
    """

    name = "random_label"
    title = "Random label"
    about = "learns wrong labels on forget, its own on retain"
    paper = "Golatkar et al. 2020 (arXiv:1911.04933)"
    color = "#8c6bb1"
    asks = frozenset({"losses", "relabel"})
    space: ClassVar[Space] = {**PAIRED, "forget_weight": (0.1, 0.3, 1.0)}
    Config = RandomLabelConfig
    draws = ("forget", "retain")

    def labeled_sets(self) -> tuple[str, ...]:
        return ("forget",)

    def gradients(self) -> Record:
        """Leave the gradient of a step in `.grad`; the losses of its batches."""
        config = self.config
        # drawn for the whole batch, of which parts or ranks then take their samples
        relabeled = self.relabel(self.draw("forget"))
        forget = self.accumulate(relabeled, self._relabeled_losses, config.forget_weight)
        retain = self.accumulate(self.draw("retain"), self.losses, config.retain_weight)
        return {
            "relabeled_forget_loss_batch": forget.mean().item(),
            "retain_loss_batch": retain.mean().item(),
        }

    def _relabeled_losses(self, batch: Batch) -> Tensor:
        """Losses [B] of samples that have drawn labels."""
        if not isinstance(self.objective, Classification):
            return self.losses(batch)
        # a loss function of one's own may look at other targets than the label
        found = self.outputs(batch)
        return label_losses(found.logits, found.labels)
