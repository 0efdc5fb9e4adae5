"""Models that write token by token: batches of padded texts, whose labels are what is predicted."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery import language
from gradsurgery.language import Frozen, LanguageLoss, LogProbs, WithoutAdapter
from gradsurgery.language.reference import alternate
from gradsurgery.language.tokens import IGNORED, predictions
from gradsurgery.ops._inputs import check
from gradsurgery.ranks.shards import kind_of
from gradsurgery.unlearn.objectives.base import Batch, Named, Objective, Outputs


class CausalLM(Objective):
    """A causal language model, as `gradsurgery.language` knows it.

    A batch is a mapping of `input_ids`, `attention_mask`, `labels` [B, T], `id` [B] and, where
    there are other answers to learn, `alternate`. Positions that no sample of a batch needs are cut
    off, so that sets padded to one length cost no more.

    A decoder beside an encoder is one too: `decoder_input_ids` [B, T], the whole text from its
    first token on, stand in the place of `input_ids` and the mask, beside what the encoder is
    given, such as `input_features`. Labels are as ever: not shifted, -100 where none counts.
    """

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Negative log-likelihood, the mean over each sample's label tokens, [B], in nats."""
        return language.lm_losses(model, trimmed(batch))

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """One prediction for each label token that counts."""
        found = predictions(model, trimmed(batch))
        sample, _ = found.counted.nonzero(as_tuple=True)
        return Outputs(found.logits[found.counted], found.labels[found.counted], sample)

    def relabel(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch's `alternate`: refusals, for instance; nothing is drawn."""
        return alternate(batch)

    def forget_loss(
        self, name: str, model: nn.Module, samples: Iterable[Batch], **options: Any
    ) -> Named:
        kind = language.FORGET.get(name)
        needs = "" if kind is None else kind.needs
        if needs == "log-probabilities":
            options["reference"] = LogProbs.of(model, map(trimmed, samples))
        elif needs:
            options["reference"] = _original(model)
        return _named(language.forget_loss(name, **options))

    def retain_loss(self, name: str, model: nn.Module, **options: Any) -> Named:
        kind = language.RETAIN.get(name)
        if kind is not None and kind.needs:
            options["reference"] = _original(model)
        return _named(language.retain_loss(name, **options))


def trimmed(batch: Batch) -> Batch:
    """A batch without the positions behind the last that any of its samples needs.

    What stands before a text stays: without `position_ids` a model may count from there. Of a
    decoder's text nothing is needed behind the last label, and what the encoder is given stays.
    """
    if "decoder_input_ids" in batch:
        return _trimmed_decoder(batch)
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return batch
    size, length = mask.shape
    needed = mask.any(0).nonzero()
    end = int(needed[-1]) + 1 if len(needed) else length

    def cut(entry: Any) -> Any:
        if isinstance(entry, Mapping):  # an alternate, which has a length of its own
            return trimmed(entry)
        same = isinstance(entry, Tensor) and tuple(entry.shape[:2]) in ((size, length), (1, length))
        return entry[:, :end] if same else entry

    return {name: cut(entry) for name, entry in batch.items()}


def _trimmed_decoder(batch: Batch) -> Batch:
    needed = (batch["labels"] != IGNORED).any(0).nonzero()
    end = int(needed[-1]) + 1 if len(needed) else batch["labels"].shape[1]
    cut = {name: batch[name][:, :end] for name in ("decoder_input_ids", "labels")}
    if "alternate" in batch:  # which has a length of its own
        cut["alternate"] = _trimmed_decoder(batch["alternate"])
    return {**batch, **cut}


def _named(loss: LanguageLoss) -> Named:
    reference = getattr(loss, "reference", None)
    held = reference.original if isinstance(reference, Frozen) else reference
    original = held if isinstance(held, (LogProbs, nn.Module)) else None
    return Named(lambda model, batch: loss(model, trimmed(batch)), loss.objective, original)


def _original(model: nn.Module) -> Frozen | WithoutAdapter:
    if hasattr(model, "disable_adapter"):
        return WithoutAdapter()
    check(
        not any(kind_of(model)),
        "loss: it needs the original model, and one in fully_shard is not copied: take an adapter, "
        "below which is the original, or a loss that needs log-probabilities alone",
    )
    return Frozen(copy.deepcopy(model))
