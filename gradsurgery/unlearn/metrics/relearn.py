"""Relearn time: the training steps on the forget set that bring back what was forgotten.

A model that only hides what it knew relearns it in fewer steps than Retrain needs to learn it.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.methods.finetune import Finetune, FinetuneConfig
from gradsurgery.unlearn.metrics.accuracy import outputs, right
from gradsurgery.unlearn.objectives.base import Batch, Objective, PerSampleLoss
from gradsurgery.unlearn.objectives.classification import as_objective
from gradsurgery.unlearn.training.data import Data, count, whole
from gradsurgery.unlearn.training.modes import evaluating
from gradsurgery.unlearn.training.seeds import seeded

Measure = Literal["accuracy", "loss"]
ROUNDING = 1e-9  # 0.8 - 0.1 is above 0.7 in floating point, and 7 of 10 right must do


@torch.no_grad()
def forget_measure(
    model: nn.Module,
    loss: PerSampleLoss | Objective,
    forget: Data,
    measure: Measure = "accuracy",
) -> float:
    """Accuracy in [0, 1], or mean loss, of a model in evaluation mode on the forget set.

    Accuracy is over predictions, of which a sample may have several; the loss is over samples.

    Args:
        model: its mode is as before afterwards.
        loss: a classifier's loss function or an `Objective`, as in `Trainer`.
        forget: as in `Trainer`.
        measure: which of the two. Accuracy needs the objective's outputs.
    """
    task = as_objective(loss)
    device = next(model.parameters()).device
    total, n = 0.0, 0

    def judged(model: nn.Module, batch: Batch) -> torch.Tensor:
        found = outputs(model, task, batch)
        return right(found.logits, found.labels)

    each = judged if measure == "accuracy" else task.losses
    with evaluating(model):
        for batch in whole(forget, 256, device):
            values = each(model, batch)
            total, n = total + values.double().sum().item(), n + len(values)
    return total / n if n else math.nan


def relearn_steps(
    model: nn.Module,
    loss: PerSampleLoss | Objective,
    forget: Data,
    original: float,
    config: FinetuneConfig,
    *,
    measure: Measure = "accuracy",
    margin: float = 0.05,
    every: int = 1,
    seed: int = 0,
) -> int | None:
    """Optimizer steps on the forget set until the model is back within a margin of the original.

    The `Finetune` trainer with the forget set in place of the retain set, on a copy of the model:
    the model itself and the global random state stay as they are, and the same seed gives the same
    number. Compare with Retrain under the same config.

    Args:
        model: unlearned or retrained.
        loss: as in `Trainer`, and as it was trained with.
        forget: as in `Trainer`.
        original: `forget_measure` of the original model.
        config: of the training; `config.steps` is the most that are taken, and a schedule other
            than constant depends on it.
        measure: back is accuracy >= original - margin, or loss <= original + margin.
        margin: share of the samples, or of the loss's unit (nats), at least 0.
        every: steps between measurements on the whole forget set; the answer is a multiple of it,
            or `config.steps`.
        seed: of the order of the data and of random layers.

    Returns:
        Steps, 0 where nothing was forgotten; None where `config.steps` do not suffice (JSON has
        no infinity).

    Relearn time is from Eternal Sunshine of the Spotless Net, Golatkar et al. 2020
    (arXiv:1911.04933), in epochs to a fixed loss. Steps, accuracy and an absolute margin are
    inferred.
    """
    if measure not in ("accuracy", "loss"):
        raise InputError(f"measure must be accuracy or loss, got {measure}")
    if not math.isfinite(original):
        raise InputError(f"original must be finite, got {original}")
    if not (math.isfinite(margin) and margin >= 0):
        raise InputError(f"margin must be finite and at least 0, got {margin}")
    if every < 1:
        raise InputError(f"every must be at least 1, got {every}")
    if config.stop != "never":
        raise InputError(f"config.stop must be never, got {config.stop}")
    if forget is None:
        raise InputError("forget: there is nothing to relearn, got None")
    count(forget, "forget")

    def probe(model: nn.Module) -> dict[str, float]:
        return {"relearned": forget_measure(model, loss, forget, measure)}

    sign = 1 if measure == "accuracy" else -1
    student = copy.deepcopy(model)
    with seeded(seed, next(student.parameters()).device):
        try:
            trainer = Finetune(
                student,
                loss,
                forget=None,
                retain=forget,
                config=config,
                probe=probe,
                probe_every=every,
                seed=seed,
                process_group=False,  # each rank alone, to the same number
            )
        except InputError as error:  # the trainer takes the set for its retain set
            raise InputError(str(error).replace("retain:", "forget:")) from None
        for record in trainer.fit():
            found = record.get("relearned", -sign * math.inf)
            if sign * found >= sign * original - margin - ROUNDING:
                return record["step"]
    return None
