"""The losses of a trainer, by name or as they are, on the side on which its rule takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from gradsurgery.batch import WeightedLosses
from gradsurgery.errors import InputError
from gradsurgery.language import PDU, Frozen, LanguageLoss, LogProbs, Opposite, WithoutAdapter
from gradsurgery.language.base import Objective, TokenLoss
from gradsurgery.language.registry import FORGET, RETAIN, forget_loss, retain_loss
from gradsurgery.language.tokens import Batch
from gradsurgery.ops._inputs import check, is_number, one_of, shown
from gradsurgery.surgery import Rule

Reference = LogProbs | Frozen | WithoutAdapter | None
Named = str | Mapping[str, Any] | LanguageLoss


class Losses(NamedTuple):
    """What is made of both batches, and what of the original is to be computed for it."""

    forget: LanguageLoss
    retain: LanguageLoss
    objective: Objective  # of the forget loss as its user knows it
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


def losses_for(
    rule: Rule,
    model: nn.Module,
    forget: Named,
    retain: Named,
    *,
    mean: Literal["sequence", "token"] = "sequence",
    reference: Reference = None,
    ceiling: float = math.inf,
) -> Losses:
    """The losses of a trainer, from what it was given; `SurgeryMixin` says what each may be.

    Raises:
        InputError: what is given does not go together; the message names it.
    """
    one_of("mean", mean, ("sequence", "token"))
    original = _Original(model, reference)
    made = _made("forget", forget, original), _made("retain", retain, original)
    check(
        made[1].objective == "lower",
        f"retain_loss must be one to lower, {_name(made[1])} is to be raised",
    )
    first, second = (_averaged(loss, mean) for loss in made)
    if mean == "token":
        names = " nor ".join(map(_name, made))
        token = any(isinstance(loss, TokenLoss) for loss in made)
        check(token, f"mean='token' is for means over tokens, neither {names} is one")
        check(
            "forget" in rule.roles,
            f"mean='token' needs a rule that tells forget from retain, {type(rule).__name__} "
            "weights all samples alike",
        )
    objective = first.objective
    first = _taken(rule, _capped(first, ceiling))
    return Losses(first, second, objective, original.log_probs, original.adapter)


class _Original:
    """What losses are given of the original, where their user has said nothing of it."""

    def __init__(self, model: nn.Module, reference: Reference) -> None:
        kinds = (LogProbs, Frozen, WithoutAdapter)
        check(
            reference is None or isinstance(reference, kinds),
            f"reference must be LogProbs, Frozen, WithoutAdapter or None, got {shown(reference)}",
        )
        self.model, self.reference = model, reference
        self.log_probs: LogProbs | None = None
        self.adapter = False

    def of(self, name: str, needs: str) -> Reference:
        if self.reference is not None:
            return self.reference
        if needs == "log-probabilities":
            self.log_probs = self.log_probs or LogProbs()
            return self.log_probs
        if hasattr(self.model, "disable_adapter"):  # of peft
            self.adapter = True
            return WithoutAdapter()
        raise InputError(
            f"{name} needs the original model: pass reference=Frozen(copy.deepcopy(model)), which "
            "stays in memory, or take an adapter of peft"
        )


def _made(which: Literal["forget", "retain"], given: Named, original: _Original) -> LanguageLoss:
    if isinstance(given, LanguageLoss):
        return given
    known, make = (FORGET, forget_loss) if which == "forget" else (RETAIN, retain_loss)
    options: dict[str, Any] = {}
    name: Any = given
    if isinstance(given, Mapping):
        options = {key: value for key, value in given.items() if key != "name"}
        name = given.get("name")
    if not isinstance(name, str):
        raise InputError(
            f"{which}_loss must be a name, a mapping with one and options, or a loss of "
            f"gradsurgery.language, got {shown(given)}"
        )
    kind = known.get(name)
    if kind is not None and kind.needs and "reference" not in options:
        options["reference"] = original.of(f"{which}_loss {name}", kind.needs)
    return make(name, **options)


def _averaged(loss: LanguageLoss, mean: str) -> LanguageLoss:
    if not isinstance(loss, TokenLoss):
        return loss
    name = _name(loss)
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
        f"ceiling is for forget losses that are raised; {_name(loss)} is lowered, and ends by "
        "itself",
    )
    return Capped(loss=loss, ceiling=float(ceiling))


def _taken(rule: Rule, loss: LanguageLoss) -> LanguageLoss:
    """A forget loss as a rule takes it."""
    wanted = getattr(rule, "objective", None)
    if wanted is None:
        wanted = "raise" if "forget" in rule.roles else "lower"
        return loss if loss.objective == wanted else Opposite(loss=loss)
    name, needed = type(rule).__name__, loss.objective
    check(
        wanted == needed,
        f"{name}(objective={wanted!r}) would {wanted} {_name(loss)}, which forgetting "
        f"{needed}s: pass {name}(objective={needed!r})",
    )
    return loss


def _name(loss: LanguageLoss) -> str:
    return type(loss.loss if isinstance(loss, Capped) else loss).__name__
