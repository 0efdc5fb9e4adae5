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
from gradsurgery.unlearn.training.forgetting import ASCENT, ForgetConfig, Forgetting
from gradsurgery.unlearn.training.shared import part_of
from gradsurgery.unlearn.training.trainer import Record


@dataclass
class SurgicalConfig(ForgetConfig):
    """What every method needs that is a rule of surgery."""

    batch_norm: Literal["train", "eval"] = "eval"
    """eval: batch norm keeps its statistics, so that a sample's loss depends on it alone; train: an
    error where batch norm would mix samples of different rows."""
    retain_batch: int = 64


S = TypeVar("S", bound=SurgicalConfig)


class SurgicalTrainer(Forgetting[S]):
    """A method whose update is a rule's; subclasses set `Config` and write `make_rule`.

    The ceiling is no part of any rule: cross-entropy pushes hardest on the samples that are already
    forgotten, so without one a long run ends by destroying the model.
    """

    draws = ("forget", "retain")

    @abstractmethod
    def make_rule(self) -> Rule:
        """The rule, from the config's options."""

    def prepare(self) -> None:
        super().prepare()
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
        surgeon = self.made_surgeon()
        surgeon.discard()
        mine = [part_of(batch, self.ranks) for batch in (forget, retain)]
        try:
            return surgeon.backward(**self.given(surgeon, *mine))
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
        """What the rule remembers too: nothing of most."""
        return {**super().extra_state(), **self.rule.state_dict()}

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        super().check_extra_state(state)
        state = {name: value for name, value in state.items() if name not in self.originals()}
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
        held = self.originals()
        super().load_extra_state({k: v for k, v in state.items() if k in held})
        remembered = {k: v.to(self.device) for k, v in state.items() if k not in held}
        self.rule.load_state_dict(remembered)

    def given(self, surgeon: Surgeon, forget: Batch | None, retain: Batch | None) -> dict[str, Any]:
        """What a step is to be given of two batches, where it takes the task's own loss of both;
        other losses are added to the surgeon now, each with its batch."""
        if self.alike:
            each = {"forget": forget, "retain": retain}
            parts = {k: b if b is None else marked(b, k == "forget") for k, b in each.items()}
            return {**parts, "loss": self._capped_loss}
        # a rank may have none, but of a sharded model all ranks add
        if forget is not None or self.shards is not None:
            surgeon.add(forget=forget, loss=self._forget_loss)
        if retain is not None or self.shards is not None:
            surgeon.add(retain=retain, loss=self._retain_loss)
        return {}

    @property
    def alike(self) -> bool:
        """Whether one loss serves both batches, which may then share a pass."""
        return self.config.forget_loss == ASCENT

    def _forget_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        found = self._answer(self.forget.values, batch, model)
        return found if self.ceiling == math.inf else torch.clamp(found, max=self.ceiling)

    def _retain_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._answer(self.objective.losses, batch, model)

    def _capped_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        found = self.losses(batch["samples"], model)
        return torch.where(batch["forget"], found.clamp(max=self.ceiling), found)


def marked(batch: Batch, forget: bool) -> Batch:
    """`batch` with what its samples are for, [B]: one loss function then serves both sets."""
    which = torch.full((batch_size(batch),), forget, device=tensors(batch)[0].device)
    return {"samples": batch, "forget": which}
