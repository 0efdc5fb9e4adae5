"""How soon a model learns again what it was made to forget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from gradsurgery.errors import InputError, TrainingError
from gradsurgery.language.metrics.scores import mean_losses
from gradsurgery.language.metrics.sums import Sums
from gradsurgery.language.reference import still
from gradsurgery.language.tokens import Batch
from gradsurgery.ops._inputs import check, check_count, check_number, one_of
from gradsurgery.ranks.shards import kind_of, rest
from gradsurgery.spread import local

ROUNDING = 1e-9  # what is back up to rounding is back

Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def relearn_steps(
    model: nn.Module,
    batches: Sequence[Batch],
    original: float,
    *,
    optimizer: Optimizers | None = None,
    lr: float = 1e-5,
    steps: int = 100,
    measure: Literal["probability", "loss"] = "probability",
    margin: float = 0.0,
    every: int = 1,
    seed: int = 0,
) -> int | None:
    """Steps of plain training on the forget set until the model is back where the original was.

    On a copy: the model and torch's generators are as before afterwards, and the same seed gives
    the same number. A model that only hides what it knew needs fewer than one that never knew it:
    compare with the retrained model under the same options.

    Args:
        model: unlearned or retrained. What of it does not train stays frozen.
        batches: the forget set, a step each, taken in an order drawn anew for each pass over them.
        original: what the original has on them: the mean over samples of exp(-L), or of L in nats.
        optimizer: makes one of parameters; None: AdamW with `lr` and no weight decay.
        lr: of that AdamW.
        steps: the most that are taken.
        measure: back is probability >= original - margin, or loss <= original + margin.
        margin: 0 or more, in the measure's unit.
        every: steps between looks at the whole forget set.
        seed: of the order, and of dropout.

    Returns:
        Steps, 0 where nothing was forgotten; None where `steps` do not suffice.

    Raises:
        InputError: an option out of range; no batch; as the losses.
        TrainingError: the loss stopped being finite, in training or in the model that was given.

    Relearn time: Eternal Sunshine of the Spotless Net, Golatkar et al. 2020 (arXiv:1911.04933).
    """
    one_of("measure", measure, ("probability", "loss"))
    for name, value in (("original", original), ("lr", lr), ("margin", margin)):
        check_number(name, value)
    check(margin >= 0, f"margin must be 0 or more, got {margin}")
    check_count("steps", steps)
    check_count("every", every)
    if not isinstance(batches, Sequence) or not batches:
        raise InputError("batches must be a sequence of the forget set's batches, one or more")
    with _student(model) as student:
        trained = [p for p in student.parameters() if p.requires_grad]
        check(len(trained) > 0, "model has no parameter that trains")
        plain = optimizer is None
        made = torch.optim.AdamW(trained, lr=lr, weight_decay=0) if plain else optimizer(trained)

        def back() -> bool:
            value = _measured(student, batches, measure)
            if measure == "loss":
                return value <= original + margin + ROUNDING
            return value >= original - margin - ROUNDING

        cuda = [trained[0].device] if trained[0].is_cuda else []
        with torch.random.fork_rng(devices=cuda):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed reseeds every GPU
            for used in cuda:
                with torch.cuda.device(used):
                    torch.cuda.manual_seed(seed)
            if back():
                return 0
            student.train()
            order: list[int] = []
            generator = torch.Generator().manual_seed(seed)
            for step in range(1, steps + 1):
                order = order or torch.randperm(len(batches), generator=generator).tolist()
                _step(student, made, batches[order.pop()])
                if step % every == 0 and back():
                    return step
    return None


@contextmanager
def _student(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the model; of a sharded one there is none, and it is put back afterwards."""
    if not any(kind_of(model)):
        yield copy.deepcopy(model)
        return
    rest(model)
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    tensors = [local(t) for t in (*model.parameters(), *model.buffers())]
    saved = [tensor.clone() for tensor in tensors]
    try:
        yield model
    finally:
        rest(model)
        for module, training in modes:
            module.training = training
        for parameter, grad in grads:
            parameter.grad = grad
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    with torch.enable_grad():
        loss = mean_losses(model, batch).mean()
        loss.backward()
    _finite(loss.item())
    optimizer.step()


def _measured(model: nn.Module, batches: Sequence[Batch], measure: str) -> float:
    sums = Sums()
    for batch in batches:
        with still(model):
            losses = mean_losses(model, batch).double().cpu()
        values = (-losses).exp() if measure == "probability" else losses
        sums += Sums.of(values.tolist())
    return _finite(sums.mean)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise TrainingError(f"loss on the forget set stopped being finite: {value}")
    return value
