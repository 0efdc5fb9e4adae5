"""Any forget loss with any rule of surgery, by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.language import rule_for
from gradsurgery.surgery import Rule
from gradsurgery.unlearn.objectives.base import Batch, Named
from gradsurgery.unlearn.training.described import SURGERY, Asked, Space
from gradsurgery.unlearn.training.forgetting import values
from gradsurgery.unlearn.training.modes import evaluating
from gradsurgery.unlearn.training.surgical import SurgicalConfig, SurgicalTrainer

OWN = "own"  # the task's own loss


@dataclass
class SurgeryConfig(SurgicalConfig):
    """Options of any loss with any rule."""

    rule: str = "pcgrad"
    """A rule of gradsurgery.RULES by its lower-case name; rules that know no forget rows are given
    two tasks, to forget and to retain."""
    rule_options: tuple[str, ...] = ()
    """The rule's own, each NAME=VALUE, such as alpha=0.5 of orthograd."""
    retain_loss: str = OWN
    """What is lowered on the retain set: own, or of language models a name of RETAIN."""

    def check(self, name: str) -> None:
        super().check(name)
        known = values(self.rule_options, f"--{name}.rule-options")
        try:
            rule_for(self.rule, "lower", **known)
        except InputError as error:
            raise InputError(f"--{name}.rule: {error}") from None


class SurgeryTrainer(SurgicalTrainer[SurgeryConfig]):
    """Moves a forget loss and lowers a retain loss, by an update that a rule makes of both.

    The ceiling is for losses that are raised: those that are lowered let go by themselves.
    """

    name = "surgery"
    title = "Surgery"
    about = "any forget loss with any rule of surgery"
    paper = ""
    color = "#7a5195"
    space: ClassVar[Space] = {**SURGERY, "rule": ("pcgrad", "upgrad", "munba", "ngdiff", "blur")}
    Config = SurgeryConfig

    def asked(self) -> frozenset[Asked]:
        more: tuple[Asked, ...] = () if self.config.retain_loss == OWN else ("retain_loss",)
        return super().asked().union(more)

    def prepare(self) -> None:
        super().prepare()
        task, name = self.objective, self.config.retain_loss
        self.retain = Named(task.losses, "lower")
        if name != OWN:
            self.retain = task.retain_loss(name, self.model)

    def originals(self) -> dict[str, Any]:
        kept = self.retain.original
        return {**super().originals(), **({} if kept is None else {"retain_original": kept})}

    def check_losses(self) -> None:
        """Raise what the losses raise, on a batch of each set: no gradients, and nothing moves."""
        with torch.no_grad(), evaluating(self.model):
            self._forget_loss(self.model, self.draw("forget"))
            self._retain_loss(self.model, self.draw("retain"))

    def make_rule(self) -> Rule:
        return rule_for(self.config.rule, self.forget.objective, **values(self.config.rule_options))

    @property
    def alike(self) -> bool:
        return False

    def _retain_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._answer(self.retain.values, batch, model)
