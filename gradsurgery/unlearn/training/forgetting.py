"""The loss of the forget set that a method moves: the task's own, up, or another as it asks.

A bounded one is KL(p || q) of outputs p and a distribution q, and is lowered: it is 0 where p is q,
and at most -log min q.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradsurgery.batch import per_sample_losses
from gradsurgery.errors import InputError
from gradsurgery.text import show
from gradsurgery.unlearn.objectives.base import (
    Batch,
    Named,
    batch_size,
    divergence,
    per_sample,
)
from gradsurgery.unlearn.objectives.classification import Classification, cross_entropy
from gradsurgery.unlearn.training import resume
from gradsurgery.unlearn.training.described import Asked
from gradsurgery.unlearn.training.modes import evaluating
from gradsurgery.unlearn.training.trainer import Trainer, TrainerConfig

ASCENT = "ascent"
BOUNDED = ("uniform", "held_out")


@dataclass
class ForgetConfig(TrainerConfig):
    """What every method needs that moves a forget loss."""

    forget_batch: int = 64
    forget_loss: str = ASCENT
    """What moves on the forget set. ascent: the task's own loss, raised. uniform: the divergence of
    the outputs from the uniform distribution, lowered; held_out: from the original's mean output on
    the validation set. Of language models also a name of gradsurgery.language.FORGET, which is
    raised or lowered as it says."""
    forget_loss_options: tuple[str, ...] = ()
    """The forget loss's own, each NAME=VALUE, such as beta=0.1 of npo."""
    forget_ceiling: float | None = None
    """A forget sample whose loss is above this (nats) no longer pushes; inf is plain ascent. For
    losses that are raised. None: of a classifier's cross-entropy ln C, the loss of a guess among
    its C classes; of other losses inf."""

    def check(self, name: str) -> None:
        super().check(name)
        option, given = f"--{name}.forget-loss-options", self.forget_loss_options
        values(given, option)
        if given and self.forget_loss in (ASCENT, *BOUNDED):
            raise InputError(f"{option}: {self.forget_loss} has none, got {show(given[0], 80)}")


F = TypeVar("F", bound=ForgetConfig)


class Forgetting(Trainer[F]):
    """A method that moves a forget loss.

    Of the bounded losses two things are inferred: the direction of the divergence, the one in which
    it is bounded; and how outputs on held-out samples become one distribution, their mean, of the
    original in evaluation mode.

    Multi-Objective Reference-Aligned Machine Unlearning, Khosrowshahli et al. 2026
    (arXiv:2606.00399).
    """

    def asked(self) -> frozenset[Asked]:
        kind = self.config.forget_loss
        more: Asked = "outputs" if kind in BOUNDED else "forget_loss"
        return self.asks if kind == ASCENT else self.asks.union((more,))

    def prepare(self) -> None:
        config = self.config
        self.forget = self._named()
        given = math.inf if config.forget_ceiling is None else config.forget_ceiling
        if self.forget.objective == "lower" and given < math.inf:
            raise InputError(
                f"forget_ceiling is for losses that are raised; {config.forget_loss} is lowered"
            )

    def _named(self) -> Named:
        config, kind = self.config, self.config.forget_loss
        if kind == ASCENT:
            return Named(self.objective.losses, "raise")
        if kind in BOUNDED:
            target = self._held_out() if kind == "held_out" else None
            return Named(lambda model, batch: self._apart(model, batch, target), "lower", target)
        # as many at a time as a step takes: a model with many words needs much for each
        samples = self.whole("forget", config.micro_batch or config.forget_batch)
        options = values(config.forget_loss_options)
        return self.objective.forget_loss(kind, self.model, samples, **options)

    def _held_out(self) -> Target:
        if self.data["validation"] is None:
            raise InputError(
                f"validation: {type(self).__name__} with forget_loss = held_out needs this data, "
                "got None"
            )
        total, count = torch.zeros(()), 0
        with torch.no_grad(), evaluating(self.model):
            for batch in self.whole("validation", self.config.micro_batch or 256):
                found = self.logits(batch).double().softmax(1)
                total, count = found.sum(0) + total.to(found), count + len(found)
        if not count:
            raise InputError("validation: the model predicts nothing there")
        return Target((total / count).log())

    def _apart(self, model: nn.Module, batch: Batch, target: Target | None) -> Tensor:
        """KL(outputs || target), or to the uniform distribution, [B]."""
        found = self.outputs(batch, model)
        wanted = torch.zeros_like(found.logits)
        if target is not None:
            wanted = wanted + target.log.to(wanted)
        return per_sample(divergence(wanted, found.logits), found.sample, batch_size(batch))

    @property
    def climb(self) -> float:
        """What the gradient of the forget loss is multiplied by, to be descended."""
        return -1.0 if self.forget.objective == "raise" else 1.0

    @property
    def ceiling(self) -> float:
        """Where a forget loss no longer pushes, once the model was asked: it counts its classes."""
        given, task = self.config.forget_ceiling, self.objective
        if given is not None:
            return given
        if self.config.forget_loss != ASCENT or not isinstance(task, Classification):
            return math.inf
        known = task.loss is cross_entropy and task.n_classes
        return math.log(known) if known and known > 1 else math.inf

    def forget_losses(self, batch: Batch) -> Tensor:
        """What moves on the forget set, [B], no larger than the ceiling."""
        found = self._answer(self.forget.values, batch, None)
        return per_sample_losses(found, batch_size(batch)).clamp(max=self.ceiling)

    # -- its state

    def originals(self) -> dict[str, Any]:
        """What the losses hold of the original, which later steps depend on."""
        kept = self.forget.original
        return {} if kept is None else {"forget_original": kept}

    def extra_state(self) -> dict[str, Any]:
        held = {name: original.state_dict() for name, original in self.originals().items()}
        return {**super().extra_state(), **held}

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        held = self.originals()
        super().check_extra_state({k: v for k, v in state.items() if k not in held})
        if "forget_original" in state and not held:
            resume.fail("extra: forget_original is of a loss that holds one, and this does not")
        for name, original in held.items():
            known, given = original.state_dict(), state.get(name)
            if not isinstance(given, Mapping) or given.keys() != known.keys():
                resume.fail(f"extra: {name} is not that of this loss")

    def load_extra_state(self, state: dict[str, Any]) -> None:
        held = self.originals()
        super().load_extra_state({k: v for k, v in state.items() if k not in held})
        for name, original in held.items():
            original.load_state_dict(state[name])


class Target(nn.Module):
    """A distribution that outputs are to come to.

    Args:
        log: its logarithm, [C] float64.
    """

    log: Tensor

    def __init__(self, log: Tensor) -> None:
        super().__init__()
        self.register_buffer("log", log)


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
