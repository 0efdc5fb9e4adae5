"""U-LiRA in a job: models like the run's own, of other weights and orders of the data.

Each shadow is an original, a retrained and, for every method, an unlearned model, all with the
forget set of the run's seed. So the attack knows what is forgotten, and asks of every sample
whether the model had to forget it or never saw it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gradsurgery.errors import TrainingError
from gradsurgery.unlearn.jobs.base import Split
from gradsurgery.unlearn.jobs.directory import Stage
from gradsurgery.unlearn.jobs.stages import AGAIN, TRAINED
from gradsurgery.unlearn.metrics.ulira import u_lira
from gradsurgery.unlearn.training.seeds import derived

if TYPE_CHECKING:
    from gradsurgery.unlearn.jobs.pipeline import Run


def attack(run: Run, split: Split, stage: Stage) -> dict[str, float]:
    """`ulira` and `ulira_auc` of a stage's model beside its seed's retrained one.

    Every shadow's confidences are a file of the run directory as soon as they are known, so a run
    continued in the same directory repeats one model at most.
    """
    seed, name = stage
    run.directory.make_folder("shadows")
    found: dict[str, list[Tensor]] = {"retrain": [], name: []}
    count = run.config.shadows
    with run.progress.stage(f"seed {seed}  shadows of {name}", count, 0) as advance:
        for k in range(count):
            for each, confidences in found.items():
                confidences.append(_confidences(run, split, (seed, each), k))
            advance(k + 1)
    observed = [
        run.job.confidences(run.stored((seed, each)), split.forget) for each in (name, "retrain")
    ]
    forgotten = torch.tensor([[True], [False]]).expand(2, len(observed[0]))
    unlearned, retrained = torch.stack(found[name]), torch.stack(found["retrain"])
    return u_lira(unlearned, retrained, torch.stack(observed), forgotten)


def _confidences(run: Run, split: Split, stage: Stage, k: int) -> Tensor:
    """Of the k-th shadow of a stage, on the forget set, [N] float64."""
    name = f"shadows/seed{stage[0]}-{stage[1]}-{k}.json"
    if not run.directory.has(name):
        values = run.job.confidences(_model(run, split, stage, k), split.forget)
        run.directory.write_json(name, {"confidences": values.tolist()})
    found = run.directory.read_json(name, {"confidences": [float]})["confidences"]
    return torch.tensor(found, dtype=torch.float64)


def _model(run: Run, split: Split, stage: Stage, k: int) -> nn.Module:
    seed, name = stage
    if name == "retrain" and k == 0 and AGAIN in run.job.trained(run.config):
        return run.stored((seed, AGAIN))  # it is the same model
    model = run.fresh(derived(seed, "shadow", k), name)
    if name not in TRAINED:
        original = f"shadows/seed{seed}-original-{k}.safetensors"
        if not run.directory.has(original):
            run.directory.save_model(_model(run, split, (seed, "original"), k), original)
        run.directory.load_weights(model, original)
    try:
        run.trainer(split, derived(seed, "shadow", k), name, model).run()
    except TrainingError as error:
        raise TrainingError(f"seed {seed}, shadow {k} of {name}: {error}") from None
    return model
