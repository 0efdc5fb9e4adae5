"""A classifier's batches: inputs and labels, as a pair or as {"image", "label"}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.data import Batch

KEYS = ("image", "label")
NONE = torch.iinfo(torch.int64).min


def _parts(batch: Batch) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping) and all(key in batch for key in KEYS):
        return batch[KEYS[0]], batch[KEYS[1]]
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[0], batch[1]
    got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    if isinstance(batch, (list, tuple)):
        got = f"{len(batch)} items"
    raise InputError(
        f"batch must be (inputs, labels) or have {KEYS}, got {got}; a collate_fn can make it so"
    )


def inputs(batch: Batch) -> Any:
    return _parts(batch)[0]


def labels(batch: Batch) -> Tensor:
    """[B] int64."""
    return _parts(batch)[1]


def relabeled(batch: Batch, new: Tensor) -> Batch:
    """The same inputs with other labels, [B] int64."""
    given = _parts(batch)[0]
    return {**batch, KEYS[1]: new} if isinstance(batch, Mapping) else (given, new)


def with_inputs(batch: Batch, new: Any) -> Batch:
    """Other inputs with the same labels."""
    known = _parts(batch)[1]
    return {**batch, KEYS[0]: new} if isinstance(batch, Mapping) else (new, known)


def wrong_labels(known: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Labels [B] other than those given, drawn uniformly by a generator on the CPU."""
    if classes < 2:
        raise InputError(f"no wrong label can be drawn of {classes} class")
    if len(known) and not 0 <= int(known.min()) <= int(known.max()) < classes:
        raise _out_of_range(known, classes)
    shift = torch.randint(1, classes, known.shape, generator=generator).to(known.device)
    return (known + shift) % classes


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """[B, C]."""
    found = model(inputs(batch))
    found = getattr(found, "logits", found)
    if not isinstance(found, Tensor) or found.dim() != 2:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"model must return logits [B, classes], got {got}")
    return found


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Per-sample losses [B]."""
    return label_losses(logits(model, batch), labels(batch))


def label_losses(found: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy [B] of logits [B, C] and labels [B]."""
    # a GPU would stop the process with an assertion that names nothing
    if not wanted.is_cpu and bool(((wanted < 0) | (wanted >= found.shape[1])).any()):
        raise _out_of_range(wanted, found.shape[1])
    try:
        # no label is ignored: by default -100 would be, with a loss of zero
        return F.cross_entropy(found, wanted.long(), reduction="none", ignore_index=NONE)
    except IndexError:
        raise _out_of_range(wanted, found.shape[1]) from None


def _out_of_range(known: Tensor, classes: int) -> InputError:
    least, most = int(known.min()), int(known.max())
    return InputError(
        f"labels must be in [0, {classes}), the model's classes, got {least} to {most}"
    )
