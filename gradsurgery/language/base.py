"""What a loss of language models is: per sample, with the side on which a rule takes it."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar, Literal

from torch import Tensor, nn

from gradsurgery.batch import WeightedLosses, batch_size
from gradsurgery.errors import InputError
from gradsurgery.language.packed import packing
from gradsurgery.language.reference import Frozen, LogProbs, WithoutAdapter
from gradsurgery.language.tokens import (
    Batch,
    Predictions,
    label_tokens,
    model_logits,
    predicted,
    predictions,
)
from gradsurgery.ops._inputs import check, check_number, shown

Objective = Literal["raise", "lower"]
KINDS = {"log-probabilities": (LogProbs, Frozen, WithoutAdapter), "model": (Frozen, WithoutAdapter)}


@dataclass(frozen=True, kw_only=True)
class LanguageLoss:
    """A loss (model, batch) -> losses [B], its direction and what it needs.

    A batch is a mapping: `input_ids`, `attention_mask` and `labels`, each [B, T], labels not
    shifted and -100 where a token does not count, and whatever else the model takes. `id` [B] is
    the sample's number, `alternate` a batch of the same samples with other answers; the model is
    given neither. The loss of a sample does not depend on the others, nor on padding, unless the
    class says that its published form does.

    Raises:
        InputError: an option out of range, or a reference missing, as the loss is made; when it is
            called, what `tokens.predictions` refuses.
    """

    objective: ClassVar[Objective] = "lower"
    """What forgetting does to it: "raise" is climbed by a rule, "lower" descended. Of a loss on
    what is retained, always "lower"."""
    needs: ClassVar[str] = ""
    """What it needs of the original: nothing, its "log-probabilities" or the "model" itself."""
    needs_reference: ClassVar[bool] = False
    formula: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        if "needs_reference" not in vars(cls):
            cls.needs_reference = bool(cls.needs)

    def __post_init__(self) -> None:
        given = getattr(self, "reference", None)
        kinds = KINDS.get(self.needs, ())
        if kinds and not isinstance(given, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(
                f"{type(self).__name__} needs the original's {self.needs}: reference= must be "
                f"{names}, got {shown(given)}"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor | WeightedLosses:
        raise NotImplementedError

    def count_samples(self, batch: Batch) -> int:
        """How many losses it has of a batch, for `Surgeon`: documents, where it is packed."""
        packed = packing(batch)
        return batch_size(batch) if packed is None else packed.documents

    def _original(self, model: nn.Module, batch: Batch) -> Tensor:
        """The original's logits for a batch, [B, T or more, V], without gradients."""
        # a field of the losses that call this, checked when they are made
        with self.reference.running(model) as original:  # type: ignore[attr-defined]
            return model_logits(original, batch)

    def _both(self, model: nn.Module, batch: Batch) -> tuple[Predictions, Predictions]:
        """What the original and what the model predict for the label tokens of a batch."""
        tokens = label_tokens(batch)
        # a field of the losses that call this, checked when they are made
        with self.reference.running(model) as original:  # type: ignore[attr-defined]
            theirs = predicted(original, batch, tokens)
        return theirs, predicted(model, batch, tokens)

    def _at_least(self, least: float, *options: str, whole: bool = False) -> None:
        """Raise `InputError` naming the first option that is no number from `least` on."""
        for option in options:
            value, name = getattr(self, option), f"{option} of {type(self).__name__}"
            check_number(name, value, Integral if whole else Real)
            check(value >= least, f"{name} must be {least} or more, got {value}")


@dataclass(frozen=True, kw_only=True)
class TokenLoss(LanguageLoss):
    """The mean, over a sample's own label tokens, of something that each of them has.

    Args:
        as_published: the public code's mean, over the tokens of a batch: `gs.WeightedLosses`, a
            sample's loss with its number of tokens. Rows are then captured ones.
    """

    as_published: bool = False

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor | WeightedLosses:
        return self._mean(predictions(model, batch))

    def _mean(self, found: Predictions) -> Tensor | WeightedLosses:
        losses = found.means(self._each(found))
        return WeightedLosses(losses, found.counts) if self.as_published else losses

    def _each(self, found: Predictions) -> Tensor:
        """Of every token, [B, P]; what does not count is not looked at."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Opposite(LanguageLoss):
    """The negative of a loss, for a rule of the other direction."""

    loss: LanguageLoss

    # read-only where other losses have a constant of their class
    @property
    def objective(self) -> Objective:  # type: ignore[override]
        return "lower" if self.loss.objective == "raise" else "raise"

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.loss.needs_reference

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor | WeightedLosses:
        found = self.loss(model, batch)
        if isinstance(found, WeightedLosses):
            return found._replace(losses=-found.losses)
        return -found


def raised(loss: LanguageLoss) -> LanguageLoss:
    """A forget loss for rules that always raise it: itself, or its negative.

    Rules with an option `objective` (OrthoGrad, GRU, BLUR, MUNBa, ...) take any loss as it is, with
    `objective=loss.objective`.
    """
    got = type(loss).__name__
    check(isinstance(loss, LanguageLoss), f"loss must be a LanguageLoss, got {got}")
    return loss if loss.objective == "raise" else Opposite(loss=loss)
