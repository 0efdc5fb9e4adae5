"""Any forget loss with any rule of surgery, by their names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.language import rule_for
from gradsurgery.step import StepInfo
from gradsurgery.surgery import Rule
from gradsurgery.text import show
from gradsurgery.unlearn.objectives.base import Batch, Named
from gradsurgery.unlearn.training.described import SURGERY, Asked, Space
from gradsurgery.unlearn.training.modes import evaluating
from gradsurgery.unlearn.training.shared import part_of
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
    loss: str = OWN
    """What moves on the forget set: own, the task's own loss, raised; of language models a name of
    gradsurgery.language.FORGET, which is raised or lowered as it says."""
    loss_options: tuple[str, ...] = ()
    """The forget loss's own, each NAME=VALUE, such as beta=0.1 of npo."""
    retain_loss: str = OWN
    """What is lowered on the retain set: own, or of language models a name of RETAIN."""

    def check(self, name: str) -> None:
        super().check(name)
        known = values(self.rule_options, f"--{name}.rule-options")
        values(self.loss_options, f"--{name}.loss-options")
        try:
            rule_for(self.rule, "lower", **known)
        except InputError as error:
            raise InputError(f"--{name}.rule: {error}") from None


def values(options: Sequence[str], where: str = "options") -> dict[str, Any]:
    """Options from lines NAME=VALUE; values that are numbers, true or false are so."""
    found: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise InputError(f"{where} must be NAME=VALUE, each name once, got {show(option, 80)}")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, (bool, int, float)) else text


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
        named: list[tuple[Asked, str]] = [
            ("forget_loss", self.config.loss),
            ("retain_loss", self.config.retain_loss),
        ]
        return self.asks.union(name for name, given in named if given != OWN)

    def prepare(self) -> None:
        config, task = self.config, self.objective
        self.forget, self.retain = Named(task.losses, "raise"), Named(task.losses, "lower")
        if config.loss != OWN:
            # as many at a time as a step takes: a model with many words needs much for each
            samples = self.whole("forget", config.micro_batch or config.forget_batch)
            self.forget = task.forget_loss(
                config.loss, self.model, samples, **values(config.loss_options)
            )
        if config.retain_loss != OWN:
            self.retain = task.retain_loss(config.retain_loss, self.model)
        if self.forget.objective == "lower" and config.forget_ceiling < math.inf:
            raise InputError(
                f"forget_ceiling is for losses that are raised; {config.loss} is lowered"
            )
        super().prepare()

    def originals(self) -> dict[str, Any]:
        """What the losses hold of the original, which later steps depend on."""
        held = {"forget_original": self.forget.original, "retain_original": self.retain.original}
        return {name: original for name, original in held.items() if original is not None}

    def extra_state(self) -> dict[str, Any]:
        held = {name: original.state_dict() for name, original in self.originals().items()}
        return {**super().extra_state(), **held}

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        held = self.originals()
        super().check_extra_state({k: v for k, v in state.items() if k not in held})
        for name, original in held.items():
            known, given = original.state_dict(), state.get(name)
            if not isinstance(given, Mapping) or given.keys() != known.keys():
                raise InputError(f"state: extra: {name} is not that of this loss")

    def load_extra_state(self, state: dict[str, Any]) -> None:
        held = self.originals()
        super().load_extra_state({k: v for k, v in state.items() if k not in held})
        for name, original in held.items():
            original.load_state_dict(state[name])

    def check_losses(self) -> None:
        """Raise what the losses raise, on a batch of each set: no gradients, and nothing moves."""
        with torch.no_grad(), evaluating(self.model):
            self._forget_loss(self.model, self.draw("forget"))
            self._retain_loss(self.model, self.draw("retain"))

    def make_rule(self) -> Rule:
        return rule_for(self.config.rule, self.forget.objective, **values(self.config.rule_options))

    def operate(self, forget: Batch, retain: Batch) -> StepInfo:
        surgeon = self.made_surgeon()
        surgeon.discard()
        mine, others = part_of(forget, self.ranks), part_of(retain, self.ranks)
        # a rank may have none, but of a sharded model all ranks add
        if mine is not None or self.shards is not None:
            surgeon.add(forget=mine, loss=self._forget_loss)
        if others is not None or self.shards is not None:
            surgeon.add(retain=others, loss=self._retain_loss)
        return surgeon.backward()

    def _forget_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        found = self._answer(self.forget.values, batch, model)
        ceiling = self.config.forget_ceiling
        return found if ceiling == math.inf else torch.clamp(found, max=ceiling)

    def _retain_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._answer(self.retain.values, batch, model)
