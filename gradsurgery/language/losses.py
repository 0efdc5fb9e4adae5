"""Losses of a model's predictions, token by token: likelihoods, weighted ones, other targets.

z_t are the logits for label token t and z'_t the original's, p_t is the token's probability, n the
number of a sample's label tokens that count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.batch import WeightedLosses
from gradsurgery.language.base import LanguageLoss, Objective, TokenLoss
from gradsurgery.language.packed import IGNORED, packing
from gradsurgery.language.reference import Frozen, WithoutAdapter, alternate
from gradsurgery.language.tokens import (
    Batch,
    Predictions,
    Tokens,
    aligned,
    known_labels,
    label_tokens,
    last,
    model_logits,
    predictions,
    text_tokens,
)
from gradsurgery.ops._inputs import check, one_of


@dataclass(frozen=True, kw_only=True)
class NLL(TokenLoss):
    """Negative log-likelihood of a sample's label tokens, the mean over them, in nats."""

    formula: ClassVar[str] = "L = -(1/n) sum_t log p_t"

    def _each(self, found: Predictions) -> Tensor:
        return -found.log_probs()


@overload
def lm_losses(model: nn.Module, batch: Batch, mean: Literal["sequence"] = "sequence") -> Tensor: ...
@overload
def lm_losses(model: nn.Module, batch: Batch, mean: Literal["token"]) -> WeightedLosses: ...
def lm_losses(model: nn.Module, batch: Batch, mean: str = "sequence") -> Tensor | WeightedLosses:
    """Negative log-likelihood of each sample's label tokens, [B], in nats: what models train on.

    The head of a model of transformers runs only where labels are; of another, everywhere.

    Args:
        model: as for every loss here (`LanguageLoss`).
        batch: likewise.
        mean: "sequence" weights samples alike; "token" returns `gs.WeightedLosses`, whose mean is
            that over the tokens of all batches of a step.

    Raises:
        InputError: another mean; as `LanguageLoss`.
    """
    one_of("mean", mean, ("sequence", "token"))
    return NLL(as_published=mean == "token")(model, batch)


@dataclass(frozen=True, kw_only=True)
class GradAscent(NLL):
    """The same, to be raised: gradient ascent, and with a retain loss GradDiff.

    Unlearning of Large Language Models, Yao et al. 2023 (arXiv:2310.10683); TOFU, Maini et al. 2024
    (arXiv:2401.06121).
    """

    objective: ClassVar[Objective] = "raise"
    paper: ClassVar[str] = "Yao et al. 2023 (arXiv:2310.10683)"


@dataclass(frozen=True, kw_only=True)
class IdkNLL(NLL):
    """NLL of the answers in the batch's `alternate`, such as "I don't know".

    TOFU: A Task of Fictitious Unlearning for LLMs, Maini et al. 2024 (arXiv:2401.06121).
    """

    formula: ClassVar[str] = "L of the alternate answer"
    paper: ClassVar[str] = "Maini et al. 2024 (arXiv:2401.06121)"

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor | WeightedLosses:
        return super().__call__(model, alternate(batch))


@dataclass(frozen=True, kw_only=True)
class WGA(TokenLoss):
    """NLL that counts a token the more, the surer the model is of it.

    Args:
        beta: b, 0 or more; 0 is `GradAscent`.

    Rethinking LLM Unlearning Objectives, Wang et al. 2025 (arXiv:2502.19301).
    """

    objective: ClassVar[Objective] = "raise"
    formula: ClassVar[str] = "-(1/n) sum_t [p_t^b] log p_t, [.] without gradient"
    paper: ClassVar[str] = "Wang et al. 2025 (arXiv:2502.19301)"

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "beta")

    def _each(self, found: Predictions) -> Tensor:
        each = found.log_probs()
        return -(self.beta * each.detach()).exp() * each


@dataclass(frozen=True, kw_only=True)
class SatImp(TokenLoss):
    """NLL that counts most the tokens that are neither certain nor lost.

    Args:
        beta1: b1, 0 or more, of the weight for what is not yet forgotten.
        beta2: b2, 0 or more, of the weight for what is not certain.

    Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning, Yang et al. 2025
    (arXiv:2505.11953).
    """

    objective: ClassVar[Objective] = "raise"
    formula: ClassVar[str] = "-(1/n) sum_t [p_t^b1 (1 - p_t)^b2] log p_t, [.] without gradient"
    paper: ClassVar[str] = "Yang et al. 2025 (arXiv:2505.11953)"

    beta1: float = 5.0
    beta2: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "beta1", "beta2")

    def _each(self, found: Predictions) -> Tensor:
        each = found.log_probs()
        fixed = each.detach()
        return -(self.beta1 * fixed).exp() * (-fixed.expm1()) ** self.beta2 * each


@dataclass(frozen=True, kw_only=True)
class CEU(TokenLoss):
    """Cross-entropy to the model's own prediction without the label.

    Args:
        skip: the first label tokens of a sample, which do not count. A sample must have more.

    CE-U: Cross Entropy Unlearning, Yang 2025 (arXiv:2503.01224).
    """

    formula: ClassVar[str] = "-(1/n) sum_t [softmax(z_t without the label)] . log softmax(z_t)"
    paper: ClassVar[str] = "Yang 2025 (arXiv:2503.01224)"

    skip: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "skip", whole=True)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor | WeightedLosses:
        return self._mean(predictions(model, batch, skip=self.skip))

    def _each(self, found: Predictions) -> Tensor:
        others = found.logits.detach().scatter(-1, found.labels.unsqueeze(-1), -math.inf)
        return _cross_entropy(found.logits, others.softmax(-1))


@dataclass(frozen=True, kw_only=True)
class PDU(TokenLoss):
    """How far the largest logit is above the mean one, squared: at 0 all tokens are as likely.

    The forget loss alone: what the method makes of it, with a dual variable for the retain loss, is
    not a loss of a sample.

    Args:
        as_published: the logits at the label tokens, which predict the tokens after them, in place
            of those that predict the label tokens; and the mean over the tokens of a batch.

    Constrained Entropic Unlearning, Entesari et al. 2025 (arXiv:2506.05314).
    """

    formula: ClassVar[str] = "(1/n) sum_t (max z_t - mean z_t)^2"
    paper: ClassVar[str] = "Entesari et al. 2025 (arXiv:2506.05314)"

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor | WeightedLosses:
        if not self.as_published:
            return super().__call__(model, batch)
        tokens = text_tokens(batch)
        logits = last(model_logits(model, batch), tokens.shape)
        tokens = tokens.to(logits.device)
        return self._mean(Predictions(logits, tokens.long(), tokens))

    def _each(self, found: Predictions) -> Tensor:
        return (found.logits.max(-1).values - found.logits.mean(-1)).square()


@dataclass(frozen=True, kw_only=True)
class RAUL(LanguageLoss):
    """Divergence of the model's predictions from uniform ones, which is log V at most.

    Multi-Objective Reference-Aligned Machine Unlearning, Khosrowshahli et al. 2026
    (arXiv:2606.00399), with the uniform reference.
    """

    formula: ClassVar[str] = "(1/n) sum_t KL(softmax(z_t) || uniform)"
    paper: ClassVar[str] = "Khosrowshahli et al. 2026 (arXiv:2606.00399)"

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        found = predictions(model, batch)
        logs = found.logits.log_softmax(-1)
        return found.means((logs.exp() * logs).sum(-1) + math.log(logs.shape[-1]))


@dataclass(frozen=True, kw_only=True)
class UNDIAL(LanguageLoss):
    """Cross-entropy to the original's prediction with the label's logit lowered by b.

    Args:
        beta: b, 0 or more.
        reference: `Frozen(copy.deepcopy(model))` or `WithoutAdapter()`.
        as_published: the public code's mean over all positions but the last, those of prompts and
            padding too, where the label -100 stands for token V - 100. A sample's loss then depends
            on how far it is padded.

    UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models,
    Dong et al. 2024 (arXiv:2402.10052).
    """

    needs: ClassVar[str] = "model"
    formula: ClassVar[str] = "-(1/n) sum_t softmax(z'_t - b at the label) . log softmax(z_t)"
    paper: ClassVar[str] = "Dong et al. 2024 (arXiv:2402.10052)"

    beta: float = 10.0
    reference: Frozen | WithoutAdapter | None = None
    as_published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "beta")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.as_published:
            label_tokens(batch)  # to be refused before the original is asked
            _check_unpacked(batch, self)
            original = self._original(model, batch)
            tokens = _every_token(batch, original.shape[-1])
            target, found = aligned(original, tokens), aligned(model_logits(model, batch), tokens)
        else:
            target, found = self._both(model, batch)
        at = found.labels.unsqueeze(-1)
        theirs = target.logits.to(found.logits)
        theirs = theirs.scatter_add(-1, at, torch.full_like(at, -self.beta, dtype=theirs.dtype))
        return found.means(_cross_entropy(found.logits, theirs.softmax(-1)))


@dataclass(frozen=True, kw_only=True)
class KL(LanguageLoss):
    """Divergence of the model's predictions from the original's, for what is retained.

    Args:
        reference: `Frozen(copy.deepcopy(model))` or `WithoutAdapter()`.
        as_published: the public code's mean over all positions, those of prompts and padding too. A
            sample's loss then depends on how far it is padded.

    TOFU: A Task of Fictitious Unlearning for LLMs, Maini et al. 2024 (arXiv:2401.06121).
    """

    needs: ClassVar[str] = "model"
    formula: ClassVar[str] = "(1/n) sum_t KL(softmax(z'_t) || softmax(z_t))"
    paper: ClassVar[str] = "Maini et al. 2024 (arXiv:2401.06121)"

    reference: Frozen | WithoutAdapter | None = None
    as_published: bool = False

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.as_published:
            label_tokens(batch)
            _check_unpacked(batch, self)
            original = self._original(model, batch)
            return _divergence(original, model_logits(model, batch)).mean(1)
        theirs, found = self._both(model, batch)
        return found.means(_divergence(theirs.logits, found.logits))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of distributions `target` to the softmax of logits, [..., V] each; [...]."""
    return -(target * logits.log_softmax(-1)).sum(-1)


def _divergence(original: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(original) || softmax(logits)) of logits [..., V]; [...]."""
    both = logits.log_softmax(-1), original.to(logits).log_softmax(-1)
    return F.kl_div(*both, reduction="none", log_target=True).sum(-1)


def _check_unpacked(batch: Batch, loss: LanguageLoss) -> None:
    """The published means are over padding too, which a packed batch has none of."""
    name = type(loss).__name__
    check(packing(batch) is None, f"as_published of {name} is of padded batches: unpacked(batch)")


def _every_token(batch: Batch, words: int) -> Tokens:
    """All tokens of a batch but the first, with -100 for token V - 100."""
    labels = known_labels(batch)[:, 1:]
    check(
        words > -IGNORED,
        f"as_published of UNDIAL takes label -100 for token V - 100: V is {words}",
    )
    every = torch.ones_like(labels).bool()
    return Tokens(torch.where(labels < 0, labels + words, labels), every, words - 1, every.shape[1])
