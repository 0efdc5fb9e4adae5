"""U-LiRA and KLoM in a job: models like the run's own, of other weights and orders of the data.

Each shadow is an original, a retrained and, for every method, an unlearned model, all with the
forget set of the run's seed. So the attack knows what is forgotten, and asks of every sample
whether the model had to forget it or never saw it. KLoM asks how far either kind's margins lie
apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gradsurgery.errors import TrainingError
from gradsurgery.unlearn.jobs.base import Split
from gradsurgery.unlearn.jobs.directory import Stage
from gradsurgery.unlearn.jobs.stages import AGAIN, TRAINED
from gradsurgery.unlearn.metrics.klom import kloms
from gradsurgery.unlearn.metrics.ulira import u_lira
from gradsurgery.unlearn.training.seeds import derived

if TYPE_CHECKING:
    from gradsurgery.unlearn.jobs.pipeline import Run


def compare(run: Run, split: Split, stage: Stage) -> dict[str, float]:
    """KLoM of a stage's model and its shadows, and U-LiRA of an unlearned one, beside their seed's
    retrained ones.

    Every shadow's confidences are a file of the run directory as soon as they are known, so a run
    continued in the same directory repeats one model at most.
    """
    seed, name = stage
    run.directory.make_folder("shadows")
    sides = (name, "retrain")
    shadows: dict[str, list[dict[str, Tensor]]] = {each: [] for each in sides}
    count = run.config.shadows
    with run.progress.stage(f"seed {seed}  shadows of {name}", count, 0) as advance:
        for k in range(count):
            for each, known in shadows.items():
                known.append(_confidences(run, split, (seed, each), k))
            advance(k + 1)
    own = {each: run.job.confidences(run.stored((seed, each)), split) for each in sides}

    def stacked(each: str, side: str) -> Tensor:
        return torch.stack([known[side] for known in shadows[each]])

    found = {}
    if name not in TRAINED:
        observed = torch.stack([own[each]["forget"] for each in sides])
        forgotten = torch.tensor([[True], [False]]).expand(observed.shape)
        shadowed = stacked(name, "forget"), stacked("retrain", "forget")
        found |= u_lira(*shadowed, observed, forgotten)
    told = {metric.key for metric in run.job.metrics}
    for side in own[name]:
        # the run's own models are of another seed, and so of the same kind as their shadows
        unlearned, retrained = (
            torch.cat([stacked(each, side), own[each][side][None]]) for each in sides
        )
        for key, value in kloms(unlearned, retrained).items():
            whole, tail, _ = key.partition("_p95")
            found[f"{whole}_{side}{tail}"] = value
    return {key: value for key, value in found.items() if key in told}


def _confidences(run: Run, split: Split, stage: Stage, k: int) -> dict[str, Tensor]:
    """Of the k-th shadow of a stage, by the set, [N] float64 each."""
    name = f"shadows/seed{stage[0]}-{stage[1]}-{k}.json"
    if not run.directory.has(name):
        values = run.job.confidences(_model(run, split, stage, k), split)
        lists = {side: each.tolist() for side, each in values.items()}
        run.directory.write_json(name, {"confidences": lists})
    found = run.directory.read_json(name, {"confidences": {str: [float]}})["confidences"]
    return {side: torch.tensor(each, dtype=torch.float64) for side, each in found.items()}


def _model(run: Run, split: Split, stage: Stage, k: int) -> nn.Module:
    """The k-th shadow of a stage; originals are kept, for every method starts from them."""
    seed, name = stage
    if name == "retrain" and k == 0 and AGAIN in run.job.trained(run.config):
        return run.stored((seed, AGAIN))  # it is the same model
    model = run.fresh(derived(seed, "shadow", k), name)
    original = f"shadows/seed{seed}-original-{k}.safetensors"
    if name not in TRAINED and not run.directory.has(original):
        _model(run, split, (seed, "original"), k)
    if name != "retrain" and run.directory.has(original):
        run.directory.load_weights(model, original)
        if name == "original":
            return model
    try:
        run.trainer(split, derived(seed, "shadow", k), name, model).run()
    except TrainingError as error:
        raise TrainingError(f"seed {seed}, shadow {k} of {name}: {error}") from None
    if name == "original":
        run.directory.save_model(model, original)
    return model
