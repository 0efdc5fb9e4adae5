"""Classification, and its batches: inputs and labels, a pair or named "image" and "label"."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.objectives.base import (
    Batch,
    Objective,
    Outputs,
    PerSampleLoss,
    batch_size,
    is_objective,
)

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
    if isinstance(known, Tensor) and known.shape == (size,) and _counts(known):
        return known.long()
    got, advice = type(known).__name__, ""
    if isinstance(known, Tensor):
        got = f"{str(known.dtype).removeprefix('torch.')} {list(known.shape)}"
        if known.shape == (size, 1):
            advice = "; squeeze(1) makes them so"
        elif known.dim() == 2:
            advice = "; argmax(1) makes them of one-hot labels"
    raise InputError(f"{name} must be integers [{size}], one for each {of}, got {got}{advice}")


def _counts(tensor: Tensor) -> bool:
    """Whether its dtype is an integer one."""
    kind = tensor.dtype
    return not (kind.is_floating_point or kind.is_complex or kind == torch.bool)


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


class Classification(Objective):
    """One label for each sample, the index of a class.

    Args:
        loss: a function (model, batch) -> losses [B].
        n_classes: of the model. Without it they are counted in its logits, and `relabel` must wait
            for some; a trainer sees to that.
    """

    def __init__(self, loss: PerSampleLoss = cross_entropy, n_classes: int | None = None) -> None:
        self.loss, self.n_classes = loss, n_classes

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.loss is not cross_entropy:
            return self.loss(model, batch)
        return label_losses(self._logits(model, batch), labels(batch))

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Labels are int64 of any integer dtype. Others, of a loss of one's own, stay as they are:
        what looks at them refuses them."""
        found, known = self._logits(model, batch), _parts(batch)[1]
        if isinstance(known, Tensor) and _counts(known):
            known = known.long()
        return Outputs(found, known, torch.arange(len(found), device=found.device))

    def relabel(self, batch: Batch, generator: torch.Generator) -> Batch:
        if self.n_classes is None:
            raise InputError(
                "n_classes must be given, or a model's outputs asked for before: wrong labels are "
                "drawn among its classes"
            )
        return relabeled(batch, wrong_labels(labels(batch), self.n_classes, generator))

    def classes(self, batch: Batch) -> Tensor:
        return labels(batch)

    def inputs(self, batch: Batch) -> Any:
        return inputs(batch)

    def with_inputs(self, batch: Batch, new: Any) -> Batch:
        return with_inputs(batch, new)

    def with_labels(self, batch: Batch, new: Tensor) -> Batch:
        return relabeled(batch, new)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        found = logits(model, batch)
        self.n_classes = found.shape[1]
        return found


def as_objective(loss: PerSampleLoss | Objective) -> Objective:
    """A task as it is; of a loss function the classifier's task with that loss."""
    given: Any = loss
    return given if is_objective(given) else Classification(given)
