"""What a method uses: batches of its sets, what it asks of the task, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from gradsurgery.batch import DETACHED, per_sample_losses
from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.ranks import Group
from gradsurgery.ranks.shards import Shards
from gradsurgery.unlearn.objectives.base import Batch, Objective, Outputs, batch_size, fresh, take
from gradsurgery.unlearn.objectives.classification import Classification
from gradsurgery.unlearn.training.given import checked_outputs
from gradsurgery.unlearn.training.modes import evaluating
from gradsurgery.unlearn.training.options import TrainerConfig
from gradsurgery.unlearn.training.sets import Sets
from gradsurgery.unlearn.training.shared import part_of, summed

C = TypeVar("C", bound=TrainerConfig)
R = TypeVar("R")


class Asking(Generic[C]):
    """The part of a `Trainer` that its method calls in a step."""

    model: nn.Module
    objective: Objective
    config: C
    sets: Sets
    device: torch.device
    generator: torch.Generator  # of the method's draws
    parameters: list[nn.Parameter]  # those that train
    ranks: Group  # who share the batches
    shards: Shards | None  # that they have of the model

    def draw(self, kind: str) -> Batch:
        """The next batch of a set, on the model's device."""
        return self.sets.draw(kind, self.device)

    def whole(self, kind: str, size: int = 256) -> Iterator[Batch]:
        """One pass over a set, in batches of at most `size`, in order."""
        return self.sets.whole(kind, size, self.device)

    def losses(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """Per-sample losses [B], in the precision asked for."""
        found = self._answer(self.objective.losses, batch, model)
        return per_sample_losses(found, batch_size(batch))

    def outputs(self, batch: Batch, model: nn.Module | None = None) -> Outputs:
        """The model's predictions [N, C] with their labels, in the precision asked for."""
        # several models may look at one batch
        found = self._answer(self.objective.outputs, fresh(batch), model)
        found = checked_outputs(self.objective, found, batch_size(batch))
        narrow = found.logits.dtype == torch.bfloat16
        return found._replace(logits=found.logits.float()) if narrow else found

    def logits(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """Those of `outputs`, [N, C]."""
        return self.outputs(batch, model).logits

    def relabel(self, batch: Batch) -> Batch:
        """The same samples with something else to learn, drawn now."""
        objective = self.objective
        if isinstance(objective, Classification) and objective.n_classes is None:
            cuda = [self.device] if self.device.type == "cuda" else []
            with torch.no_grad(), evaluating(self.model), torch.random.fork_rng(cuda):
                self.outputs(batch)  # to count the classes
        self._check_labels()
        found, size = objective.relabel(batch, self.generator), batch_size(batch)
        if batch_size(found) != size:
            task, got = type(objective).__name__, batch_size(found)
            raise InputError(f"{task}.relabel must keep a batch's {size} samples, got {got}")
        return found

    def _answer(
        self, question: Callable[[nn.Module, Batch], R], batch: Batch, model: nn.Module | None
    ) -> R:
        try:
            with self.precision():
                return question(self.model if model is None else model, batch)
        finally:
            self._check_labels()

    def _check_labels(self) -> None:
        """Raise `InputError` naming a set of which a label is none of a classifier's classes."""
        known = self.objective.n_classes if isinstance(self.objective, Classification) else None
        if known is not None:
            self.sets.check_labels(known)

    def precision(self) -> AbstractContextManager:
        mixed = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()

    def accumulate(
        self, batch: Batch, values: Callable[[Batch], Tensor], weight: float = 1.0
    ) -> Tensor:
        """Add the gradient of weight times the mean of values(batch) [B] to `.grad`; the values.

        A batch larger than `config.micro_batch` goes in parts, with the same result. So does one
        that several ranks share: the gradient and the values are those of the whole, on each.
        """
        scale = weight / batch_size(batch)
        if not self.ranks:
            seen = self._backward(batch, values, scale)
        else:
            with summed(self.moved(), self.model, self.ranks, self.shards) as said:
                mine = part_of(batch, self.ranks)
                said.mine = None if mine is None else self._backward(mine, values, scale).cpu()
            seen = torch.cat([each for each in said.every if each is not None])
        if not bool(seen.isfinite().all()):  # before they reach the weights
            raise NonFiniteError(f"{self.sets.latest()}: a loss of the batch is not finite")
        return seen

    def _backward(self, batch: Batch, values: Callable[[Batch], Tensor], scale: float) -> Tensor:
        size = batch_size(batch)
        part = self.config.micro_batch or size
        found = []
        for at in range(0, size, part):
            piece = take(batch, slice(at, at + part)) if part < size else batch
            each = differentiable(values(piece))
            (scale * each.sum()).backward()
            found.append(each.detach())
        return torch.cat(found)

    def moved(self) -> list[nn.Parameter]:
        """The parameters that a backward pass may give gradients: those that train, and what else
        an optimizer holds."""
        return self.parameters

    def frozen_copy(self) -> nn.Module:
        """The model as it is now, in evaluation mode, never to be trained."""
        return self.copied().eval().requires_grad_(False)

    def copied(self) -> nn.Module:
        try:
            return copy.deepcopy(self.model)
        except (RuntimeError, TypeError) as error:  # as of activations that a module has kept
            reason = str(error).split(". ")[0].splitlines()[0]
            raise InputError(
                f"model cannot be copied, which {type(self).__name__} needs: {reason}"
            ) from error


def differentiable(losses: Tensor) -> Tensor:
    """`losses`, if a backward pass from them would reach something."""
    if not losses.requires_grad:
        raise InputError(DETACHED)
    return losses
