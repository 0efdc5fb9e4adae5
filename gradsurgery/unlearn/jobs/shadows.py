"""U-LiRA in a job: models like the run's own, of other weights and orders of the data.

Each shadow is an original, a retrained and, for every method, an unlearned model, all with the
forget set of the run's seed. So the attack knows what is forgotten, and asks of every sample
whether the model had to forget it or never saw it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsurgery.errors import TrainingError
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.progress import Progress
from gradsurgery.unlearn.jobs.stages import TRAINED
from gradsurgery.unlearn.metrics.ulira import logit_confidence, u_lira
from gradsurgery.unlearn.objectives import classification
from gradsurgery.unlearn.objectives.base import Batch
from gradsurgery.unlearn.training.seeds import derived
from gradsurgery.unlearn.training.trainer import Trainer


@dataclass(frozen=True)
class Shadowed:
    """What a job says of itself: one seed's forget set, and how its models are made."""

    count: int  # shadows of every stage
    forget: Batch
    network: Callable[[], nn.Module]
    trainer: Callable[[int, str, nn.Module], Trainer]  # of a seed, a stage's name and a model


def attack(
    job: Shadowed, directory: RunDirectory, progress: Progress, stage: tuple[int, str]
) -> dict[str, float]:
    """`ulira` and `ulira_auc` of a stage's model beside its seed's retrained one.

    Every shadow's confidences are a file of the run directory as soon as they are known, so a run
    continued in the same directory repeats one model at most.
    """
    seed, name = stage
    directory.make_folder("shadows")
    found: dict[str, list[Tensor]] = {"retrain": [], name: []}
    with progress.stage(f"seed {seed}  shadows of {name}", job.count, 0) as advance:
        for k in range(job.count):
            for each, confidences in found.items():
                confidences.append(_confidences(job, directory, (seed, each), k))
            advance(k + 1)
    observed = []
    for each in (name, "retrain"):
        model = job.network()
        directory.load_model(model, (seed, each))
        observed.append(_on_forget(model, job.forget))
    forgotten = torch.tensor([[True], [False]]).expand(2, len(observed[0]))
    unlearned, retrained = torch.stack(found[name]), torch.stack(found["retrain"])
    return u_lira(unlearned, retrained, torch.stack(observed), forgotten)


def _confidences(job: Shadowed, directory: RunDirectory, stage: tuple[int, str], k: int) -> Tensor:
    """Of the k-th shadow of a stage, on the forget set, [N] float64."""
    name = f"shadows/seed{stage[0]}-{stage[1]}-{k}.json"
    if not directory.has(name):
        values = _on_forget(_model(job, directory, stage, k), job.forget)
        directory.write_json(name, {"confidences": values.tolist()})
    found = directory.read_json(name, {"confidences": [float]})["confidences"]
    return torch.tensor(found, dtype=torch.float64)


def _model(job: Shadowed, directory: RunDirectory, stage: tuple[int, str], k: int) -> nn.Module:
    seed, name = stage
    model = job.network()
    if name not in TRAINED:
        original = f"shadows/seed{seed}-original-{k}.safetensors"
        if not directory.has(original):
            directory.save_model(_model(job, directory, (seed, "original"), k), original)
        directory.load_weights(model, original)
    try:
        job.trainer(derived(seed, "shadow", k), name, model).run()
    except TrainingError as error:
        raise TrainingError(f"seed {seed}, shadow {k} of {name}: {error}") from None
    return model


@torch.no_grad()
def _on_forget(model: nn.Module, forget: Batch) -> Tensor:
    found = classification.logits(model.eval(), forget)
    return logit_confidence(found, classification.labels(forget))
