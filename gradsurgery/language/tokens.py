"""What a causal language model says of the label tokens of each sample of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from gradsurgery.errors import InputError
from gradsurgery.language.head import at, logits_at
from gradsurgery.language.packed import IGNORED, packing
from gradsurgery.ops._inputs import check

Batch = Mapping[str, Any]

OURS = ("labels", "id", "alternate")  # entries of a batch that the model is not given


class Tokens(NamedTuple):
    """Tokens to be predicted, of B samples.

    Attributes:
        labels: [B, P] int64, 0 where the token does not count.
        counted: [B, P] bool.
        largest: of the labels.
        most: how many of a sample's tokens count at most; P where that is not known.
    """

    labels: Tensor
    counted: Tensor
    largest: int
    most: int

    def narrowed(self) -> tuple[Tokens, Tensor]:
        """The first `most` of each sample, those that count before others, and where they stand.

        Tokens [B, K] and places [B, K] int64 of the logits that predict them, in order.
        """
        first = self.counted.long().argsort(dim=1, descending=True, stable=True)[:, : self.most]
        labels, counted = self.labels.gather(1, first), self.counted.gather(1, first)
        return self._replace(labels=labels, counted=counted), first


class Predictions(NamedTuple):
    """Predictions of the tokens of B samples, with those that count marked.

    Attributes:
        logits: [B, P, V], float32 or wider. Logits p predict token p.
        labels: [B, P] int64, 0 where the token does not count.
        counted: [B, P] bool.
    """

    logits: Tensor
    labels: Tensor
    counted: Tensor

    @property
    def counts(self) -> Tensor:
        """How many tokens of each sample count, [B] int64."""
        return self.counted.sum(1)

    def log_probs(self) -> Tensor:
        """Of each token under the model, [B, P], in nats; 0 where it does not count."""
        logits, labels = self.logits.flatten(0, 1), self.labels.flatten()
        losses = F.cross_entropy(logits, labels, reduction="none").view_as(self.labels)
        return torch.where(self.counted, -losses, 0)

    def sums(self, values: Tensor) -> Tensor:
        """[B], over each sample's tokens that count, of values [B, P]."""
        return torch.where(self.counted, values, 0).sum(1)

    def means(self, values: Tensor) -> Tensor:
        """[B], likewise."""
        return self.sums(values) / self.counts


def predictions(model: nn.Module, batch: Batch, skip: int = 0) -> Predictions:
    """What a model predicts for the label tokens of a batch.

    A token counts if its label is not -100 and, where the batch has an `attention_mask` [B, T], if
    it and the token before it are attended to: the first token of a text is predicted by none.

    Args:
        model: called with the entries of the batch by name, but for `labels`, `id` and `alternate`.
            It returns logits [B, T, V], or has them under that name. Of logits longer than the
            labels, as those of prompt tuning, the last T are taken.
        batch: `input_ids` [B, T], `labels` [B, T], not shifted, and what else the model takes.
        skip: how many label tokens of each sample, from its first, do not count.

    Raises:
        InputError: a batch without labels, labels that are not integers [B, T] or are no token of
            the model's, a sample without a label token that counts, logits of another shape. The
            message names the entry or the sample.
    """
    return predicted(model, batch, label_tokens(batch, skip))


def predicted(model: nn.Module, batch: Batch, tokens: Tokens) -> Predictions:
    """What a model predicts for tokens of a batch; its head runs where these are, if it can."""
    few, places = tokens.narrowed()
    size, length = few.labels.shape[0], tokens.labels.shape[1] + 1
    if few.most == length - 1:
        return aligned(model_logits(model, batch), tokens)
    logits, narrowed = logits_at(model, lambda: model_logits(model, batch), places, length)
    if not narrowed:
        logits = at(last(logits, (size, length)), places, length)
    return _beside(logits, few)


def log_probs(
    logits: Tensor, labels: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities [B] of each sample's label tokens, in nats, and their number [B].

    sum_t log softmax(logits_t)[label_t+1], over the labels that count

    Args:
        logits: [B, T, V] or longer than the labels, of any floating dtype; float32 at least is
            computed in.
        labels: [B, T] integers, not shifted, -100 where a token does not count.
        attention_mask: [B, T], as in `predictions`.

    Raises:
        InputError: as `predictions`.
    """
    tokens = label_tokens({"labels": labels, "attention_mask": attention_mask})
    found = aligned(_wide(logits), tokens)
    return found.sums(found.log_probs()), found.counts


def label_tokens(batch: Batch, skip: int = 0) -> Tokens:
    """The tokens to be predicted, [B, T - 1], and which count; as in `predictions`."""
    labels, own = _own(batch)
    counted = own[:, 1:]
    if (attended := _attended(batch, labels)) is not None:
        counted = counted & attended[:, :-1]
    if skip:
        counted = counted & (own.cumsum(1)[:, 1:] > skip)
    after = f" after the first {skip}" if skip else ""
    largest, most = _checked(labels, counted, batch, after)
    return Tokens(torch.where(counted, labels[:, 1:], 0), counted, largest, most)


def text_tokens(batch: Batch) -> Tensor:
    """Where the tokens stand whose labels count, and that are attended to, [B, T] bool.

    The first token of a text is among them.
    """
    labels, own = _own(batch)
    _checked(labels, own, batch)
    return own


def known_labels(batch: Batch) -> Tensor:
    """The labels of a batch, [B, T] int64; of a packed one a document is a sample."""
    if not isinstance(batch, Mapping):
        raise InputError(f"batch must be a mapping with labels, got {type(batch).__name__}")
    labels = batch.get("labels")
    if labels is None:
        raise InputError(f"batch has no labels, only {sorted(map(str, batch))}")
    got = type(labels).__name__
    if isinstance(labels, Tensor):
        got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        plain = not (labels.is_floating_point() or labels.is_complex())
        if plain and labels.dtype != torch.bool and labels.dim() == 2 and labels.numel():
            packed = packing(batch)
            return labels.long() if packed is None else packed.unpack(labels.long(), IGNORED)
    raise InputError(f"labels must be integers [B, T], got {got}")


def _own(batch: Batch) -> tuple[Tensor, Tensor]:
    """Labels [B, T], and which of them are of tokens."""
    labels = known_labels(batch)
    attended = _attended(batch, labels)
    own = labels != IGNORED
    return labels, own if attended is None else own & attended


def _attended(batch: Batch, labels: Tensor) -> Tensor | None:
    """Where the attention mask of a batch says that there are tokens, [B, T] bool.

    None without a mask, or with one of another shape, which is the model's own matter.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return None
    return mask.to(labels.device) != 0


def _checked(labels: Tensor, counted: Tensor, batch: Batch, which: str = "") -> tuple[int, int]:
    """The largest label, and how many count of a sample at most: one wait, before the model.

    Raises:
        InputError: naming a sample of which no token counts.
    """
    if is_functorch_wrapped_tensor(labels) or labels.is_meta:  # no value decides
        return 0, counted.shape[1]
    counts = counted.sum(1)
    known = torch.where(labels == IGNORED, 0, labels)
    looked = [counts.min(), counts.argmin(), counts.max(), known.min(), known.max()]
    fewest, sample, most, low, high = torch.stack(looked).tolist()
    if fewest == 0:
        who = named(batch, sample)
        raise InputError(f"labels of {who} are all masked: no token of it counts{which}")
    check(low >= 0, f"labels must be tokens or {IGNORED}, got {low}")
    return high, most


def named(batch: Batch, sample: int) -> str:
    """A sample of a batch for a message, by its place and, where it has one, its id."""
    ids = batch.get("id")
    if isinstance(ids, Tensor) and ids.dim() == 1 and sample < len(ids):
        return f"sample {sample} (id {ids[sample].item()})"
    return f"sample {sample}"


def aligned(logits: Tensor, tokens: Tokens) -> Predictions:
    """Logits [B, T or more, V] beside the tokens [B, T - 1] that they predict."""
    size, length = tokens.labels.shape
    # the last of all predicts what comes after the text
    return _beside(last(logits, (size, length + 1))[:, :-1], tokens)


def _beside(logits: Tensor, tokens: Tokens) -> Predictions:
    """Logits [B, P, V] and the tokens [B, P] that they predict."""
    words = logits.shape[2]
    got = tokens.largest
    check(got < words, f"labels must be in [0, {words}), the model's tokens, got {got}")
    device = logits.device
    return Predictions(logits, tokens.labels.to(device), tokens.counted.to(device))


def last(values: Tensor, shape: Sequence[int], what: str = "logits") -> Tensor:
    """The last T positions of what a model has for each, [B, T or more, ...]; `shape` is [B, T]."""
    size, length = shape
    if values.dim() != 3 or values.shape[0] != size or values.shape[1] < length:
        raise InputError(
            f"{what} must be [{size}, {length} or more, ...], to match labels "
            f"[{size}, {length}], got {list(values.shape)}"
        )
    return values[:, -length:]


def model_logits(model: nn.Module, batch: Batch) -> Tensor:
    """All that a model returns for a batch, [B, T or more, V], float32 or wider."""
    found = called(model, batch)
    if isinstance(found, Mapping):
        found = found.get("logits", found)
    return by_sample(batch, _wide(getattr(found, "logits", found)))


def by_sample(batch: Batch, values: Tensor, what: str = "logits") -> Tensor:
    """What a model has for each token of a batch, a sample a row; of a packed one, a document."""
    packed = packing(batch)
    return values if packed is None else packed.unpack(last(values, packed.places.shape, what))


def called(model: nn.Module, batch: Batch) -> Any:
    """What a model returns for the entries of a batch that are its own."""
    given = {name: entry for name, entry in batch.items() if name not in OURS}
    if packing(batch) is not None and _takes(model, "use_cache"):
        # beside a cache, transformers' attention does not look where documents begin
        given.setdefault("use_cache", False)
    return model(**given)


def _takes(model: nn.Module, name: str) -> bool:
    options = inspect.signature(model.forward).parameters.values()
    return any(o.name == name or o.kind is inspect.Parameter.VAR_KEYWORD for o in options)


def _wide(logits: Any) -> Tensor:
    if not (isinstance(logits, Tensor) and logits.is_floating_point()):
        got = str(logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"model must return logits, real numbers [B, T, V], got {got}")
    return logits.float() if logits.dtype.itemsize < 4 else logits
