"""SalUn: random labels, and only the weights change that the forget loss depends on most.

m_j = 1 where |dL_f/dw_j| is among the largest share of all weights, at the start; dw = m * dw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.ranks.places import grad_of, whole_of
from gradsurgery.spread import is_split
from gradsurgery.unlearn.methods.random_label import RandomLabel, RandomLabelConfig
from gradsurgery.unlearn.objectives.base import batch_size
from gradsurgery.unlearn.training.described import PAIRED, LogUniform, Space
from gradsurgery.unlearn.training.modes import evaluating
from gradsurgery.unlearn.training.resume import same_tensors
from gradsurgery.unlearn.training.trainer import Record, require


@dataclass
class SalUnConfig(RandomLabelConfig):
    """Options of SalUn."""

    lr: float = 0.013
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    saliency: float = 0.5
    """Share of all weights that may change, in (0, 1]."""

    def check(self, name: str) -> None:
        super().check(name)
        share = self.saliency
        require(0 < share <= 1, f"{name}.saliency", "in (0, 1]", share)


class SalUn(RandomLabel[SalUnConfig]):
    """Random labels under a saliency mask.

    The mask is that of the whole forget set, in evaluation mode, with the true labels and the model
    as given. Public code ranks all weights together too, but lets an optimizer move the model while
    it adds up the gradients. No other weight moves, whatever momentum or weight decay would do;
    statistics of batch norm are no weights and do move.

    SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
    Classification and Generation, Fan et al. 2023 (arXiv:2310.12508).
    """

    name = "salun"
    title = "SalUn"
    about = "random labels, only in the half of the weights that matter most to forget"
    paper = "Fan et al. 2023 (arXiv:2310.12508)"
    color = "#cc79a7"
    asks = frozenset({"losses", "relabel"})
    space: ClassVar[Space] = {
        **PAIRED,
        "lr": LogUniform(1e-3, 1e-1),
        "saliency": (0.3, 0.5, 0.8),
        "forget_weight": (0.1, 0.3, 1.0),
    }
    Config = SalUnConfig
    keeps = ("masks",)

    def prepare(self) -> None:
        self.model.zero_grad()
        try:
            with evaluating(self.model):
                for batch in self.whole("forget"):
                    # the sum over samples: it ranks as their mean does
                    self.accumulate(batch, self.losses, batch_size(batch))
            sizes = [
                torch.zeros_like(p) if p.grad is None else p.grad.abs() for p in self.parameters
            ]
        finally:
            self.model.zero_grad()
        # one [*p.shape] per parameter
        self._put(largest([whole_of(size) for size in sizes], self.config.saliency))
        self.ranked = list(self.trained)  # their names

    def _put(self, masks: list[Tensor]) -> None:
        """Masks, as shards where parameters are."""
        pairs = zip(masks, self.parameters, strict=True)
        self.masks = [grad_of(m.to(p.device), p).bool() if is_split(p) else m for m, p in pairs]

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self._put([mask.to(self.device) for mask in state["masks"]])

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        super().check_extra_state(state)
        same_tensors(self.masks, state["masks"], "extra.masks")

    def gradients(self) -> Record:
        masks = self._masks()
        numbers = super().gradients()
        for p, mask in zip(self.parameters, masks, strict=True):
            if p.grad is not None:
                p.grad.mul_(mask)
        self.before = [p.detach().clone() for p in self.parameters]
        return numbers

    def after_step(self) -> None:
        # weight decay and what an optimizer remembers move weights of gradient zero as well
        with torch.no_grad():
            for p, mask, old in zip(self.parameters, self._masks(), self.before, strict=True):
                p.copy_(torch.where(mask, p, old))
        self.before = []

    def _masks(self) -> list[Tensor]:
        """Of the parameters that train now."""
        known = dict(zip(self.ranked, self.masks, strict=True))
        for name, p in self.trained.items():
            if name not in known or known[name].shape != p.shape:
                raise InputError(
                    f"model: {name} trains, but SalUn ranked its weights without it: make a new "
                    "Trainer"
                )
        return [known[name] for name in self.trained]


def largest(sizes: list[Tensor], share: float) -> list[Tensor]:
    """Where the largest share of all entries is, as masks; of equal ones the first."""
    flat = torch.cat([size.flatten() for size in sizes])
    if not bool(flat.isfinite().all()):
        raise NonFiniteError("the gradient of the forget loss is not finite")
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[: round(share * len(flat))]] = True
    parts = mask.split([size.numel() for size in sizes])
    return [part.view(size.shape) for part, size in zip(parts, sizes, strict=True)]
