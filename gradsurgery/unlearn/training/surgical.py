"""Methods that are one rule of gradient surgery: a `Surgeon` makes the update of both batches."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from gradsurgery import Surgeon
from gradsurgery.batch import tensors
from gradsurgery.errors import CoupledSamplesError, InputError
from gradsurgery.step import StepInfo
from gradsurgery.surgery import Rule
from gradsurgery.unlearn.objectives.base import Batch, batch_size
from gradsurgery.unlearn.training.shared import part_of
from gradsurgery.unlearn.training.trainer import Record, Trainer, TrainerConfig


@dataclass
class SurgicalConfig(TrainerConfig):
    """What every method needs that is a rule of surgery."""

    batch_norm: Literal["train", "eval"] = "eval"
    """eval: batch norm keeps its statistics, so that a sample's loss depends on it alone; train: an
    error where batch norm would mix samples of different rows."""
    forget_batch: int = 64
    retain_batch: int = 64
    forget_ceiling: float = math.inf
    """A forget sample whose loss is above this (nats) no longer pushes; inf is plain ascent."""


S = TypeVar("S", bound=SurgicalConfig)


class SurgicalTrainer(Trainer[S]):
    """A method whose update is a rule's; subclasses set `Config` and write `make_rule`.

    The ceiling is no part of any rule: cross-entropy pushes hardest on the samples that are already
    forgotten, so without one a long run ends by destroying the model.
    """

    draws = ("forget", "retain")

    @abstractmethod
    def make_rule(self) -> Rule:
        """The rule, from the config's options."""

    def prepare(self) -> None:
        self.rule = self.make_rule()
        self.surgeon: Surgeon | None = None  # needs the optimizer, which is made after this

    def gradients(self) -> Record:
        info = self.operate(self.draw("forget"), self.draw("retain"))
        seen = {
            "forget_loss_batch": info.forget_loss,
            "retain_loss_batch": info.retain_loss,
            "cosine_mean": float(info.cosines.mean()),
            "cosine_max": float(info.cosines.max()),
            "conflict_rate": info.conflict_rate,
            "kept_norm": info.kept_norm,
            "rank": None if info.rank is None else int(info.rank),
            "frozen": len(info.frozen) or None,  # tensors a projection left no signal
        }
        return {name: value for name, value in seen.items() if value is not None}

    def operate(self, forget: Batch, retain: Batch) -> StepInfo:
        """The surgeon's update of two batches, of which each rank takes its part, in `.grad`."""
        limited = self._limited(forget, retain)
        mine: Any = {name: part_of(batch, self.ranks) for name, batch in limited.items()}
        try:
            return self.made_surgeon().backward(**mine, loss=self._capped_loss)
        except CoupledSamplesError as error:
            if not error.modules:  # no batch norm: the config cannot help
                raise
            raise InputError(f"batch_norm = {self.config.batch_norm}: {error}") from error

    def made_surgeon(self) -> Surgeon:
        """The one surgeon of a run."""
        if self.surgeon is None:
            self.surgeon = Surgeon(
                self.model,
                self.optimizer,
                self.rule,
                micro_batch=self.config.micro_batch,
                process_group=self.process_group,
            )
        return self.surgeon

    def extra_state(self) -> dict[str, Any]:
        """What the rule remembers: nothing of most."""
        return self.rule.state_dict()

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        rule, held = copy.deepcopy(self.rule), self.held()
        try:
            rule.load_state_dict(dict(state))
            rule.check_columns(list(held))
        except InputError as error:
            raise InputError(f"state: extra: {error}") from None
        size = sum(p.numel() for p in held.values())
        if "average" in state and state["average"].shape != (size,):
            got = list(state["average"].shape)
            raise InputError(f"state: extra.average is {got}, of parameters with {size} values")

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict({name: value.to(self.device) for name, value in state.items()})

    def _limited(self, forget: Batch, retain: Batch) -> dict[str, Batch]:
        """Both batches as a step takes them: a forget sample past the ceiling no longer pushes."""
        ceiling = self.config.forget_ceiling
        return {"forget": with_ceiling(forget, ceiling), "retain": with_ceiling(retain, math.inf)}

    def _capped_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return torch.minimum(self.losses(batch["samples"], model), batch["ceiling"])


def with_ceiling(batch: Batch, ceiling: float) -> Batch:
    """`batch` with a ceiling per sample, [B]: one loss function then serves both sets."""
    ceilings = torch.full((batch_size(batch),), ceiling, device=tensors(batch)[0].device)
    return {"samples": batch, "ceiling": ceilings}
