"""What a task is to methods and metrics, and what every task says of batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.batch import map_batch, named_leaves, refilled
from gradsurgery.errors import InputError

Batch = Any  # tensors that share their leading dimension B, in what `gradsurgery.batch` opens
PerSampleLoss = Callable[[nn.Module, Batch], Tensor]  # -> losses [B]


class Outputs(NamedTuple):
    """What a model predicts for a batch of B samples: N predictions, of images, tokens or frames.

    Attributes:
        logits: [N, C], floating point.
        labels: [N], integers in [0, C), what each prediction should be.
        sample: [N], integers in [0, B), which sample of the batch each prediction is of. A sample
            may have one, several or none.
    """

    logits: Tensor
    labels: Tensor
    sample: Tensor


class Named(NamedTuple):
    """A loss by its name.

    Attributes:
        values: (model, batch) -> losses [B].
        objective: what forgetting does to it, "raise" or "lower".
        original: what it holds of the model before it moved, with a state_dict; None: nothing.
    """

    values: Callable[[nn.Module, Batch], Any]
    objective: Literal["raise", "lower"]
    original: Any = None


class Objective(Protocol):
    """All that methods and metrics may ask of a task.

    A task is a subclass, or any object with methods of these names. Only `losses` must be there: a
    method or metric that needs another is refused by name before anything changes. A batch has B
    samples, and none of these changes the batch it is given.
    """

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Per-sample losses [B], not reduced, those that training lowers."""
        ...

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """What the model predicts, with the labels; only the predictions that count."""
        raise _unwritten(self, "outputs")

    def relabel(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same B samples with something else to learn: a wrong label, "I don't know", another
        transcript. It may be longer or shorter. What is drawn comes from the generator, which is on
        the CPU."""
        raise _unwritten(self, "relabel")

    def classes(self, batch: Batch) -> Tensor:
        """The class of each sample, integers [B]."""
        raise _unwritten(self, "classes")

    def inputs(self, batch: Batch) -> Any:
        """What the model is given: where it can be moved, a tensor of real numbers [B, ...]."""
        raise _unwritten(self, "inputs")

    def with_inputs(self, batch: Batch, new: Any) -> Batch:
        """Other inputs with the same labels."""
        raise _unwritten(self, "with_inputs")

    def with_labels(self, batch: Batch, new: Tensor) -> Batch:
        """The same inputs with other labels, [N], in the order of `outputs`."""
        raise _unwritten(self, "with_labels")

    def forget_loss(
        self, name: str, model: nn.Module, samples: Iterable[Batch], **options: Any
    ) -> Named:
        """A loss of what is to be forgotten, with what it needs of the original.

        Args:
            name: one that the task knows.
            model: the original, before it moves.
            samples: the whole forget set, in batches; gone through where the loss needs that.
            options: the loss's own.
        """
        raise _unwritten(self, "forget_loss")

    def retain_loss(self, name: str, model: nn.Module, **options: Any) -> Named:
        """A loss of what is to be kept, likewise; it is always lowered."""
        raise _unwritten(self, "retain_loss")


def _unwritten(objective: Objective, name: str) -> InputError:
    return InputError(f"{type(objective).__name__} has no {name}")


def is_objective(given: Any) -> bool:
    """Whether something is a task, not a loss function."""
    return callable(getattr(given, "losses", None)) and not isinstance(given, type)


def check_has(objective: Objective, asked: Collection[str], who: str) -> None:
    """Raise `InputError` naming the methods `asked` that a task has not."""

    def has(name: str) -> bool:
        found = getattr(objective, name, None)
        # a subclass inherits those that it does not write
        return callable(found) and getattr(found, "__func__", None) is not getattr(Objective, name)

    missing = " and ".join(sorted(name for name in asked if not has(name)))
    if missing:
        raise InputError(f"loss: {who} needs {missing}, which {type(objective).__name__} has not")


def per_sample(values: Tensor, sample: Tensor, size: int) -> Tensor:
    """Mean [B, ...] over each sample's predictions, of values [N, ...]; 0 of a sample without any.

    Where each sample has one prediction, in order, these are the values themselves.

    Args:
        values: one for each prediction.
        sample: as in `Outputs`.
        size: B.
    """
    # bfloat16 counts no further than 256 in ones, and float16 overflows
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    totals = wide.new_zeros(size, *values.shape[1:])
    if values.is_cpu:
        totals = totals.index_add(0, sample, wide)
    else:  # where index_add sums in any order
        totals = totals.index_put((sample,), wide, accumulate=True)
    counts = torch.bincount(sample, minlength=size).clamp(min=1)
    means = totals / counts.to(wide).view(-1, *[1] * (values.dim() - 1))
    return means.to(values.dtype) if values.is_floating_point() else means


NEVER = -1e4  # log of a probability that is zero in any dtype


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher || student), [B], of logits [B, C] divided by the temperature T.

    The factor keeps gradients in size whatever T, as in distillation.
    """
    # a class masked by -inf in both has no share in it; -inf - (-inf) would be NaN
    found = F.log_softmax(student / temperature, 1).clamp_min(NEVER)
    wanted = F.log_softmax(teacher / temperature, 1).clamp_min(NEVER)
    return temperature**2 * F.kl_div(found, wanted, reduction="none", log_target=True).sum(1)


def batch_size(batch: Batch, name: str = "batch") -> int:
    """Leading dimension shared by every tensor of `batch`; what is no tensor does not count.

    Raises:
        InputError: naming the batch, where its tensors have none or different ones or no values.
    """
    sizes = set()
    for _, leaf in named_leaves(batch):
        if isinstance(leaf, Tensor):
            if leaf.dim() == 0:
                raise InputError(f"{name}: tensors must have a leading dimension, got a scalar")
            if leaf.is_meta or leaf.layout != torch.strided or leaf.is_nested:
                kind = "meta" if leaf.is_meta else "nested" if leaf.is_nested else "sparse"
                raise InputError(f"{name}: tensors must be dense and have values, got a {kind} one")
            sizes.add(leaf.shape[0])
        elif type(leaf).__module__ == "numpy":
            raise InputError(f"{name} holds a numpy array: torch.from_numpy makes it a tensor")
    where = name if name == "batch" else f"{name}: batch"
    if not sizes:
        got = type(batch).__name__
        raise InputError(
            f"{where} holds no tensor, got {got}: a Dataset goes into a DataLoader, "
            "whose collate_fn makes tensors"
        )
    if len(sizes) != 1:
        raise InputError(f"{where}: tensors must share one leading dimension, got {sorted(sizes)}")
    return sizes.pop()


def check_divisible(batch: Batch, name: str = "batch") -> None:
    """Raise `InputError` unless all of `batch` is tensors, which alone can be taken apart."""
    for label, leaf in named_leaves(batch):
        if not isinstance(leaf, Tensor) and leaf is not None:
            got = type(leaf).__name__
            raise InputError(
                f"{name} must hold tensors to be taken apart into batches, got {got} at {label}; "
                "a DataLoader's batches go as they are"
            )


def take(batch: Batch, indices: Tensor | slice) -> Batch:
    """The samples `indices` of a batch, whose tensors share their leading dimension."""
    check_divisible(batch)
    return map_batch(lambda tensor: tensor[indices], batch)


def fresh(batch: Batch) -> Batch:
    """A copy, for a network that changes its inputs in place."""
    return map_batch(lambda tensor: tensor.clone(), batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return map_batch(lambda tensor: tensor.to(device), batch)


def joined(first: Batch, second: Batch) -> Batch:
    """The samples of two batches of one form, those of the first before those of the second.

    Tensors are matched by their names, in whatever order a mapping has them.
    """
    before, after = (
        {k: v for k, v in named_leaves(b) if isinstance(v, Tensor)} for b in (first, second)
    )
    if before.keys() != after.keys():
        apart = sorted(before.keys() ^ after.keys())[0]
        raise InputError(f"batches to be joined must have the same tensors: one alone has {apart}")
    return refilled(first, [torch.cat((tensor, after[name])) for name, tensor in before.items()])
