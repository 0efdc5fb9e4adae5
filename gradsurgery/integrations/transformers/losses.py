"""The rule and the losses of a trainer, by name or as they are, and whether they go together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from gradsurgery.batch import WeightedLosses
from gradsurgery.errors import InputError
from gradsurgery.language import PDU, Frozen, LanguageLoss, LogProbs, WithoutAdapter, rule_for
from gradsurgery.language.base import Objective, TokenLoss
from gradsurgery.language.registry import FORGET, RETAIN, forget_loss, retain_loss
from gradsurgery.language.tokens import Batch
from gradsurgery.ops._inputs import check, is_number, one_of, shown
from gradsurgery.ranks.shards import kind_of
from gradsurgery.surgery import Rule

Reference = LogProbs | Frozen | WithoutAdapter | None
NamedLoss = str | Mapping[str, Any] | LanguageLoss
NamedRule = str | Mapping[str, Any] | Rule


class Parts(NamedTuple):
    """What a step is made of, and what of the original is to be computed for it."""

    rule: Rule
    forget: LanguageLoss
    retain: LanguageLoss
    log_probs: LogProbs | None  # empty as yet; None where no loss looks anything up in it
    adapter: bool  # whether the model without its adapter was taken for the original


@dataclass(frozen=True, kw_only=True)
class Capped(LanguageLoss):
    """A loss that is raised, but not that of a sample above the ceiling: min(loss, ceiling)."""

    loss: LanguageLoss
    ceiling: float

    # read-only where other losses have a constant of their class
    @property
    def objective(self) -> Objective:  # type: ignore[override]
        return self.loss.objective

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor | WeightedLosses:
        found = self.loss(model, batch)
        if isinstance(found, WeightedLosses):
            return found._replace(losses=found.losses.clamp_max(self.ceiling))
        return found.clamp_max(self.ceiling)


def parts_of(
    model: nn.Module,
    rule: NamedRule,
    forget: NamedLoss,
    retain: NamedLoss,
    *,
    mean: Literal["sequence", "token"] = "sequence",
    reference: Reference = None,
    ceiling: float = math.inf,
) -> Parts:
    """The parts of a step, from what a trainer was given; `SurgeryMixin` says what each may be.

    Raises:
        InputError: what is given does not go together; the message names it.
    """
    one_of("mean", mean, ("sequence", "token"))
    original = _Original(model, reference)
    made = _made("forget", forget, original), _made("retain", retain, original)
    names = [type(loss).__name__ for loss in made]
    check(
        original.taken,
        f"reference is for losses by name that need one; {' and '.join(names)} take none of it",
    )
    check(
        made[1].objective == "lower",
        f"retain_loss must be one to lower, {names[1]} is to be raised",
    )
    first, second = (_averaged(loss, mean) for loss in made)
    check(
        mean == "sequence" or any(isinstance(loss, TokenLoss) for loss in made),
        f"mean='token' is for means over tokens, neither {' nor '.join(names)} is one",
    )
    name, options = _parted("rule", rule, "a rule") if not isinstance(rule, Rule) else (rule, {})
    taken = rule_for(name, first, **options)
    return Parts(taken, _capped(first, ceiling), second, original.log_probs, original.adapter)


class _Original:
    """What losses are given of the original, where their user has said nothing of it."""

    def __init__(self, model: nn.Module, reference: Reference) -> None:
        kinds = (LogProbs, Frozen, WithoutAdapter)
        check(
            reference is None or isinstance(reference, kinds),
            f"reference must be LogProbs, Frozen, WithoutAdapter or None, got {shown(reference)}",
        )
        check(
            not (isinstance(reference, Frozen) and any(kind_of(reference.original))),
            "reference: Frozen holds a model in fully_shard, whose passes wait for all ranks, and "
            "ranks make as many as they have batches: give each a copy of its own, or take LogProbs"
            " or WithoutAdapter",
        )
        self.model, self.reference, self.taken = model, reference, reference is None
        self.log_probs: LogProbs | None = None
        self.adapter = False

    def of(self, name: str, needs: str) -> Reference:
        if self.reference is not None:
            self.taken = True
            return self.reference
        if needs == "log-probabilities":
            if self.log_probs is None:
                self.log_probs = LogProbs()
            return self.log_probs
        if hasattr(self.model, "disable_adapter"):  # of peft
            self.adapter = True
            return WithoutAdapter()
        raise InputError(
            f"{name} needs the original model: pass reference=Frozen(copy.deepcopy(model)), which "
            "stays in memory, or take an adapter of peft"
        )


def _made(
    which: Literal["forget", "retain"], given: NamedLoss, original: _Original
) -> LanguageLoss:
    if isinstance(given, LanguageLoss):
        return given
    known, make = (FORGET, forget_loss) if which == "forget" else (RETAIN, retain_loss)
    name, options = _parted(f"{which}_loss", given, "a loss of gradsurgery.language")
    kind = known.get(name)
    if kind is not None and kind.needs and "reference" not in options:
        options["reference"] = original.of(f"{which}_loss {name}", kind.needs)
    return make(name, **options)


def _parted(what: str, given: Any, otherwise: str) -> tuple[str, dict[str, Any]]:
    """A name and options."""
    options: dict[str, Any] = {}
    name = given
    if isinstance(given, Mapping):
        options = {str(key): value for key, value in given.items() if key != "name"}
        name = given.get("name")
    if not isinstance(name, str):
        raise InputError(
            f"{what} must be a name, a mapping of a name and options, or {otherwise}, "
            f"got {shown(given)}"
        )
    return name, options


def _averaged(loss: LanguageLoss, mean: str) -> LanguageLoss:
    if not isinstance(loss, TokenLoss):
        return loss
    name = type(loss).__name__
    if mean == "sequence":
        check(
            not loss.as_published,
            f"mean='sequence' and {name}(as_published=True), whose mean is over tokens, disagree",
        )
        return loss
    check(
        loss.as_published or not isinstance(loss, PDU),
        "mean='token' of PDU is that of its public code, which has other logits, too: pass "
        "PDU(as_published=True)",
    )
    return replace(loss, as_published=True)


def _capped(loss: LanguageLoss, ceiling: float) -> LanguageLoss:
    fine = is_number(ceiling, Real) and not math.isnan(ceiling)
    check(fine, f"ceiling must be a number, got {shown(ceiling)}")
    if ceiling == math.inf:
        return loss
    check(
        loss.objective == "raise",
        f"ceiling is for forget losses that are raised; {type(loss).__name__} is lowered, and lets "
        "go by itself",
    )
    return Capped(loss=loss, ceiling=float(ceiling))
