"""A classifier's batches: inputs and labels, as a pair or under the names "image" and "label"."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.objectives.base import Batch, batch_size

KEYS = ("image", "label")
NONE = torch.iinfo(torch.int64).min


def _parts(batch: Batch) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        if all(key in batch for key in KEYS):
            return batch[KEYS[0]], batch[KEYS[1]]
        got = str(sorted(map(str, batch)))
    elif all(hasattr(batch, key) for key in KEYS):
        return getattr(batch, KEYS[0]), getattr(batch, KEYS[1])
    elif isinstance(batch, (list, tuple)):
        if len(batch) == 2:
            return batch[0], batch[1]
        got = f"{len(batch)} items"
    else:
        got = type(batch).__name__
    raise InputError(
        f"batch must be (inputs, labels) or have {KEYS}, got {got}; a collate_fn can make it so"
    )


def _with_part(batch: Batch, which: int, new: Any) -> Batch:
    """A batch of the same type with other inputs (0) or labels (1)."""
    if isinstance(batch, (list, tuple)) and not hasattr(batch, KEYS[which]):
        parts = [new if k == which else part for k, part in enumerate(batch)]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, tuple):
        return batch._replace(**{KEYS[which]: new})  # type: ignore[attr-defined]
    if isinstance(batch, Mapping):
        changed: Any = copy.copy(batch) if hasattr(batch, "__setitem__") else dict(batch)
        changed[KEYS[which]] = new
    else:
        changed = copy.copy(batch)
        object.__setattr__(changed, KEYS[which], new)  # of a frozen dataclass too
    return changed


def inputs(batch: Batch) -> Any:
    return _parts(batch)[0]


def labels(batch: Batch) -> Tensor:
    """[B] int64, of labels of any integer dtype."""
    return integers(_parts(batch)[1], batch_size(batch))


def integers(known: Any, size: int, name: str = "labels", of: str = "sample") -> Tensor:
    """`known` as int64 [size]; `InputError` naming them where they are not integers, one for each
    sample."""
    if isinstance(known, Tensor) and known.shape == (size,):
        kind = known.dtype
        if not (kind.is_floating_point or kind.is_complex or kind == torch.bool):
            return known.long()
    got, advice = type(known).__name__, ""
    if isinstance(known, Tensor):
        got = f"{str(known.dtype).removeprefix('torch.')} {list(known.shape)}"
        if known.shape == (size, 1):
            advice = "; squeeze(1) makes them so"
        elif known.dim() == 2:
            advice = "; argmax(1) makes one-hot labels so"
    raise InputError(f"{name} must be integers [{size}], one for each {of}, got {got}{advice}")


def relabeled(batch: Batch, new: Tensor) -> Batch:
    """The same inputs with other labels, [B] int64."""
    return _with_part(batch, 1, new)


def with_inputs(batch: Batch, new: Any) -> Batch:
    """Other inputs with the same labels."""
    return _with_part(batch, 0, new)


def wrong_labels(known: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Labels [B] other than those given, drawn uniformly by a generator on the CPU."""
    if classes < 2:
        raise InputError(f"no wrong label can be drawn of {classes} class")
    known = integers(known, len(known))
    if len(known):
        check_range(int(known.min()), int(known.max()), classes)
    shift = torch.randint(1, classes, known.shape, generator=generator).to(known.device)
    return (known + shift) % classes


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """[B, C], of a model that returns them or has them under the name "logits"."""
    found = model(inputs(batch))
    if isinstance(found, Mapping):
        found = found.get("logits", found)
    found = getattr(found, "logits", found)
    size, got = batch_size(batch), type(found).__name__
    if isinstance(found, Tensor):
        if found.dim() == 2 and len(found) == size and found.is_floating_point():
            return found
        got = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
    raise InputError(f"model must return logits, real numbers [{size}, classes], got {got}")


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Per-sample losses [B]; labels are integers [B], in [0, classes)."""
    return label_losses(logits(model, batch), labels(batch))


def label_losses(found: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy [B] of logits [B, C] and labels [B]."""
    wanted = integers(wanted, len(found), of="row of logits").to(found.device)
    # a GPU would stop the process with an assertion that names nothing
    if not wanted.is_cpu and bool(((wanted < 0) | (wanted >= found.shape[1])).any()):
        check_range(int(wanted.min()), int(wanted.max()), found.shape[1])
    try:
        # no label is ignored: by default -100 would be, with a loss of zero
        return F.cross_entropy(found, wanted, reduction="none", ignore_index=NONE)
    except IndexError:
        check_range(int(wanted.min()), int(wanted.max()), found.shape[1])
        raise


def check_range(least: int, most: int, classes: int, name: str = "labels") -> None:
    """Raise `InputError` unless labels from `least` to `most` are among the model's classes."""
    if not 0 <= least <= most < classes:
        raise InputError(
            f"{name} must be in [0, {classes}), the model's classes, got {least} to {most}"
        )
