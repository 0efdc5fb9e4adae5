"""Losses of a whole answer's likelihood: NPO, SimNPO and DPO.

l is the summed negative log-likelihood of a sample's label tokens, n their number, l' the same
under the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.language.base import LanguageLoss
from gradsurgery.language.reference import Frozen, LogProbs, WithoutAdapter, alternate, summed
from gradsurgery.language.tokens import Batch, predictions, text_tokens
from gradsurgery.ops._inputs import check, check_number


@dataclass(frozen=True, kw_only=True)
class _Preference(LanguageLoss):
    """-(2/b) log sigmoid(b margin), by how much more what is wanted is preferred than before."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        name = f"beta of {type(self).__name__}"
        check_number(name, self.beta)
        check(self.beta > 0, f"{name} must be positive, got {self.beta}")

    def _of(self, margin: Tensor) -> Tensor:
        return -2 / self.beta * F.logsigmoid(self.beta * margin)


@dataclass(frozen=True, kw_only=True)
class NPO(_Preference):
    """Negative preference optimization: gradient ascent that lets go of what is forgotten.

    Args:
        beta: b, positive; towards 0 it is gradient ascent.
        reference: `LogProbs.of(model, batches)`, `Frozen(copy.deepcopy(model))` or
            `WithoutAdapter()`.

    Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning, Zhang et
    al. 2024 (arXiv:2404.05868).
    """

    needs: ClassVar[str] = "log-probabilities"
    formula: ClassVar[str] = "-(2/b) log sigmoid(b (l - l'))"
    paper: ClassVar[str] = "Zhang et al. 2024 (arXiv:2404.05868)"

    reference: LogProbs | Frozen | WithoutAdapter | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._of(-_gain(self.reference, model, batch))


@dataclass(frozen=True, kw_only=True)
class DPO(_Preference):
    """Direct preference optimization: the answer in the batch's `alternate` over the known one.

    With a refusal there it is IdkDPO, with another answer, made up by a model, AltPO.

    Args:
        beta: b, positive.
        reference: as for `NPO`. `LogProbs` keeps those of both answers.

    Direct Preference Optimization, Rafailov et al. 2023 (arXiv:2305.18290); IdkDPO: TOFU, Maini et
    al. 2024 (arXiv:2401.06121); AltPO: Alternate Preference Optimization for Unlearning Factual
    Knowledge in LLMs, Mekala et al. 2024 (arXiv:2409.13474).
    """

    needs: ClassVar[str] = "log-probabilities"
    formula: ClassVar[str] = "-(2/b) log sigmoid(b ((l' - l) of the alternate - (l' - l)))"
    paper: ClassVar[str] = "Rafailov et al. 2023 (arXiv:2305.18290)"

    reference: LogProbs | Frozen | WithoutAdapter | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        wanted = _gain(self.reference, model, alternate(batch))
        return self._of(wanted - _gain(self.reference, model, batch))


@dataclass(frozen=True, kw_only=True)
class SimNPO(_Preference):
    """NPO without the original: by the mean over a sample's tokens.

    Args:
        beta: b, positive.
        delta: d, the mean negative log-likelihood, in nats, around which it lets go.
        as_published: n counts a text's first token too, where its label is not -100, though no
            token predicts it.

    Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning, Fan et al.
    2024 (arXiv:2410.07163).
    """

    formula: ClassVar[str] = "-(2/b) log sigmoid(b (l/n - d))"
    paper: ClassVar[str] = "Fan et al. 2024 (arXiv:2410.07163)"

    beta: float = 4.5
    delta: float = 0.0
    as_published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(f"delta of {type(self).__name__}", self.delta)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        found = predictions(model, batch)
        counts = found.counts
        if self.as_published:
            counts = text_tokens(batch).sum(1).to(counts.device)
        return self._of(-found.sums(found.log_probs()) / counts - self.delta)


def _gain(reference: Any, model: nn.Module, batch: Batch) -> Tensor:
    """l' - l, [B]: by how much an answer is likelier than it was under the original."""
    before = reference.log_probs(model, batch)
    now = summed(model, batch)
    return now - before.to(now)
