"""U-LiRA in the digits job: models like the run's own, of other weights and orders of the data.

Each shadow is an original, a retrained and, for every method, an unlearned model, all with the
forget set of the run's seed. So the attack knows what is forgotten, and asks of every sample
whether the model had to forget it or never saw it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gradsurgery.unlearn.jobs.digits.data import DigitsCNN, DigitsData
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.progress import Progress
from gradsurgery.unlearn.metrics.ulira import logit_confidence, u_lira
from gradsurgery.unlearn.report.labels import TRAINED
from gradsurgery.unlearn.training.seeds import derived
from gradsurgery.unlearn.training.trainer import TrainingError

if TYPE_CHECKING:
    from gradsurgery.unlearn.jobs.digits.job import DigitsConfig


def attack(
    config: DigitsConfig,
    directory: RunDirectory,
    progress: Progress,
    data: DigitsData,
    stage: tuple[int, str],
) -> dict[str, float]:
    """`ulira` and `ulira_auc` of a stage's model beside its seed's retrained one.

    Every shadow's confidences are a file of the run directory as soon as they are known, so a run
    continued in the same directory repeats one model at most.
    """
    seed, name = stage
    directory.make_folder("shadows")
    found: dict[str, list[Tensor]] = {"retrain": [], name: []}
    with progress.stage(f"seed {seed}  shadows of {name}", config.shadows, 0) as advance:
        for k in range(config.shadows):
            for each, confidences in found.items():
                confidences.append(_confidences(config, directory, data, (seed, each), k))
            advance(k + 1)
    observed = []
    for each in (name, "retrain"):
        model = DigitsCNN()
        directory.load_model(model, (seed, each))
        observed.append(_on_forget(model, data))
    forgotten = torch.tensor([[True], [False]]).expand(2, len(observed[0]))
    unlearned, retrained = torch.stack(found[name]), torch.stack(found["retrain"])
    return u_lira(unlearned, retrained, torch.stack(observed), forgotten)


def _confidences(
    config: DigitsConfig,
    directory: RunDirectory,
    data: DigitsData,
    stage: tuple[int, str],
    k: int,
) -> Tensor:
    """Of the k-th shadow of a stage, on the forget set, [N] float64."""
    name = f"shadows/seed{stage[0]}-{stage[1]}-{k}.json"
    if not directory.has(name):
        values = _on_forget(_model(config, directory, data, stage, k), data)
        directory.write_json(name, {"confidences": values.tolist()})
    found = directory.read_json(name, {"confidences": [float]})["confidences"]
    return torch.tensor(found, dtype=torch.float64)


def _model(
    config: DigitsConfig,
    directory: RunDirectory,
    data: DigitsData,
    stage: tuple[int, str],
    k: int,
) -> nn.Module:
    from gradsurgery.unlearn.jobs.digits.job import make_trainer

    seed, name = stage
    model = DigitsCNN()
    if name not in TRAINED:
        original = f"shadows/seed{seed}-original-{k}.safetensors"
        if not directory.has(original):
            directory.save_model(_model(config, directory, data, (seed, "original"), k), original)
        directory.load_weights(model, original)
    try:
        make_trainer(config, data, derived(seed, "shadow", k), name, model).run()
    except TrainingError as error:
        raise TrainingError(f"seed {seed}, shadow {k} of {name}: {error}") from None
    return model


@torch.no_grad()
def _on_forget(model: nn.Module, data: DigitsData) -> Tensor:
    return logit_confidence(model.eval()(data.forget["image"]), data.forget["label"])
