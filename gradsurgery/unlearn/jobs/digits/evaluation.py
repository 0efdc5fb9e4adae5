"""What the digits job measures: one model, and over the seeds, all of them against Retrain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from gradsurgery.unlearn.jobs.digits.data import DigitsData
from gradsurgery.unlearn.jobs.stages import TRAINED, parts
from gradsurgery.unlearn.metrics import attacks, distance
from gradsurgery.unlearn.metrics.accuracy import accuracy, share_right, uis
from gradsurgery.unlearn.metrics.statistics import gap, spread
from gradsurgery.unlearn.objectives.base import take

# of these the mean gap to Retrain is the mean; every other number is only reported
COMPARED = ("forget", "repaired", "retain", "test", "test_forgotten", "mia")
PROBED = 256  # retain samples measured during a run; at its end all of them are
COSTS = ("steps", "seconds", "retain_samples", "memory")
UIS_KIND = {"mislabeled": "class", "class": "class", "random": "random"}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: DigitsData,
    held_out: Literal["validation", "test"] = "test",
    retrain: nn.Module | None = None,
) -> dict[str, float]:
    """Every metric of one model by the name it has in summary.json.

    forget: accuracy on the forget set with the labels it was trained on, in [0, 1]. repaired: the
    same samples with their true labels (mislabeled only). retain: on all of the retain set. test:
    held-out accuracy, without the forgotten class if there is one, whose own accuracy is
    test_forgotten. mia and its like: attacks on forget against held-out outputs, if there are
    enough of either. kl, js, activation: distances of the outputs to those of `retrain`.
    """
    model.eval()
    unseen = data.validation if held_out == "validation" else data.test
    kept, forgotten = data.split(held_out)
    found = {"forget": accuracy(model, data.forget)}
    if data.task == "mislabeled":
        found["repaired"] = accuracy(model, data.forget, data.true_labels)
    found["retain"] = accuracy(model, data.retain)
    found["test"] = accuracy(model, kept)
    if forgotten is not None:
        found["test_forgotten"] = accuracy(model, forgotten)
    sides = {"forget": data.forget, "test": unseen}
    outputs = {name: model(side["image"]) for name, side in sides.items()}
    if len(data.forget["label"]) >= attacks.ATTACK_SPLITS:
        found |= attacks.attack_all(
            outputs["forget"], data.forget["label"], outputs["test"], unseen["label"]
        )
    if retrain is not None:
        retrain.eval()
        for name, side in sides.items():
            wanted = retrain(side["image"])
            found[f"kl_{name}"] = distance.kl(outputs[name], wanted)
            found[f"js_{name}"] = distance.js(outputs[name], wanted)
            found[f"activation_{name}"] = distance.activation_distance(outputs[name], wanted)
    return found


def gaps(measured: dict[str, float], retrain: dict[str, float]) -> dict[str, float]:
    """Distance to Retrain of every metric that counts, and their mean under "mean"."""
    return gap({key: measured[key] for key in COMPARED if key in measured}, retrain)


def make_probe(data: DigitsData) -> Callable[[nn.Module], dict[str, float]]:
    """What is measured during a run: forget, some retain and validation data, never test data."""
    validation, _ = data.split("validation")
    # all of the retain set would double the time of a run; its order is random: the first will do
    retain = take(data.retain, torch.arange(min(PROBED, len(data.retain["label"]))))

    @torch.no_grad()
    def probe(model: nn.Module) -> dict[str, float]:
        found = {}
        for name, samples in {"forget": data.forget, "retain": retain}.items():
            logits, labels = model(samples["image"]), samples["label"]
            found[f"{name}_accuracy"] = share_right(logits, labels)
            found[f"{name}_loss"] = F.cross_entropy(logits, labels).item()
            if name == "forget" and data.task == "mislabeled":
                found["repaired_accuracy"] = share_right(logits, data.true_labels)
        found["validation_accuracy"] = accuracy(model, validation)
        return found

    return probe


def summarize(
    task: str, results: list[dict[str, Any]], forget_sets: dict[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Mean, spread and values over seeds of every metric, gap to Retrain, UIS and cost, by stage.

    step: seconds of one OrthoGrad step and of one plain training step on the same samples.
    """
    by_stage = {(result["seed"], result["method"]): result for result in results}
    seeds = [int(seed) for seed in forget_sets]
    columns: dict[str, Any] = {}
    for name in names:
        rows: dict[str, list[float]] = {}
        for seed in seeds:
            result = by_stage[seed, name]
            measured = result["metrics"]
            original, retrain = (by_stage[seed, other]["metrics"] for other in TRAINED)
            score = uis(original["test"], measured["test"], measured["forget"], kind=UIS_KIND[task])
            costs = {key: result[key] for key in COSTS if key in result}
            costs["seconds_ratio"] = result["seconds"] / by_stage[seed, "retrain"]["seconds"]
            values = {**measured, "uis": score, **costs}
            if name != "retrain":
                distances = gaps(measured, retrain)
                values |= {f"gap_{metric}": value for metric, value in distances.items()}
                values["tow"] = distance.tow(measured, retrain)
            for key, value in values.items():
                rows.setdefault(key, []).append(value)
        columns[name] = {key: spread(values) for key, values in rows.items()}
    stages = [result for result in results if result["method"] == _timed(names)]
    timed = [result["step_seconds"] for result in stages if "step_seconds" in result]
    step = {}
    if timed and len(timed) == len(stages):  # older versions did not time them
        step = {kind: spread([t[kind] for t in timed]) for kind in timed[0]}
    return {
        "job": "digits",
        "task": task,
        "seeds": seeds,
        "forget_sets": forget_sets,
        "columns": columns,
        **({"step": {"seconds": step}} if step else {}),
    }


def _timed(names: Sequence[str]) -> str:
    """The stage whose steps were timed: OrthoGrad's with the most retain samples."""
    return next((name for name in names if parts(name).method == "orthograd"), "")
