"""What jobs with a classifier share: splits of labeled samples, what is measured, probes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.unlearn.jobs.base import (
    COSTS,
    DISTANCE,
    GAP,
    C,
    HeldOut,
    Job,
    Measured,
    Metric,
    Split,
)
from gradsurgery.unlearn.jobs.remembered import Remembered
from gradsurgery.unlearn.methods.finetune import FinetuneConfig
from gradsurgery.unlearn.metrics import attacks, distance
from gradsurgery.unlearn.metrics.accuracy import share_right, uis
from gradsurgery.unlearn.metrics.informed import informed_attack
from gradsurgery.unlearn.metrics.probe import features, last_linear, linear_probe
from gradsurgery.unlearn.metrics.relearn import relearn_steps
from gradsurgery.unlearn.metrics.ulira import logit_confidence
from gradsurgery.unlearn.objectives import classification
from gradsurgery.unlearn.objectives.base import Batch, joined, take
from gradsurgery.unlearn.objectives.classification import Classification
from gradsurgery.unlearn.training.data import whole
from gradsurgery.unlearn.training.modes import evaluating
from gradsurgery.unlearn.training.trainer import Probe

PROBED = 256  # retain samples measured during a run; at its end all of them are
PIXELS = 2**21  # measured at once, at most: a network's activations are many times as large
MOST = 256  # samples measured at once: of more a small network's activations leave the caches
KNOWN = 2048  # retain samples that a probe of features is fitted on, at most
# how the forget set is learned again, to see how well it was forgotten
RELEARN = FinetuneConfig(steps=60, lr=3e-3, retain_batch=128)
UIS_KIND = {"mislabeled": "class", "class": "class", "random": "random", "memorized": "random"}
ACCURACY, MEMBERSHIP = "Accuracy", "Membership"
PROBE = "Accuracy of a linear probe of features"
NUMBERS = (
    "Accuracies are shares in [0, 1]. attack: how often a regression on a sample's loss says "
    "rightly whether it was forgotten or never seen; 0.5 is guessing, but wrong labels or a class "
    "never seen stand out in Retrain as well. The informed attack knows Retrain's outputs too, and "
    "so how hard a sample is to a model that never saw it. A linear probe is a regression on what "
    "the last linear layer is given, fitted on the retain set: above Retrain's, features know what "
    "outputs do not say."
)


@dataclass(frozen=True)
class LabeledSplit(Split):
    """Every set is {"image": [N, C, H, W] in [0, 1], "label": [N]}.

    `forget` carries the labels the original model was trained on, wrong ones where `mislabeled`,
    and `true_labels` the right ones.
    """

    true_labels: Tensor  # [n_forget]
    mislabeled: bool
    forget_class: int | None  # where a whole class is forgotten

    def held_out(self, name: HeldOut) -> tuple[Batch, Batch | None]:
        """A held-out set as (what should stay right, samples of the forgotten class if any)."""
        found = self.validation if name == "validation" else self.test
        if self.forget_class is None:
            return found, None
        forgotten = found["label"] == self.forget_class
        return take(found, ~forgotten), take(found, forgotten)


class ClassifierJob(Job[C, LabeledSplit]):
    """A job whose model tells classes apart."""

    @cached_property
    def remembered(self) -> Remembered[Tensor]:
        return Remembered(outputs)

    metrics = (
        Metric("forget", "forget set", ACCURACY, short="forget", compared=True),
        Metric("repaired", "forget set, true labels", ACCURACY, short="true labels", compared=True),
        Metric("retain", "retain set", ACCURACY, short="retain", compared=True),
        Metric("test", "test", ACCURACY, short="test", compared=True),
        Metric(
            "test_forgotten", "test, forgotten class", ACCURACY, short="forgotten", compared=True
        ),
        GAP,
        Metric("tow", "tug of war", DISTANCE),
        Metric("uis", "UIS", DISTANCE),
        Metric("kl_forget", "KL of outputs, forget set", DISTANCE),
        Metric("kl_test", "KL of outputs, test", DISTANCE),
        Metric("js_forget", "Jensen-Shannon, forget set", DISTANCE),
        Metric("js_test", "Jensen-Shannon, test", DISTANCE),
        Metric("activation_forget", "L2 of outputs, forget set", DISTANCE),
        Metric("activation_test", "L2 of outputs, test", DISTANCE),
        *(
            Metric(f"{key}_{side}{end}", f"{title}, {named}{tail}", DISTANCE)
            for key, title in (("klom", "KLoM"), ("klom_normal", "KLoM of normal fits"))
            for side, named in (("forget", "forget set"), ("retain", "retain set"), ("test",) * 2)
            for end, tail in (("", ", mean"), ("_p95", ", 95 % of samples"))
        ),
        Metric("mia", "membership attack", MEMBERSHIP, short="attack", compared=True),
        Metric("mia_confidence", "confidence attack", MEMBERSHIP),
        Metric("mia_entropy", "entropy attack", MEMBERSHIP),
        Metric("mia_modified_entropy", "modified entropy attack", MEMBERSHIP),
        Metric("mia_correctness", "correctness attack", MEMBERSHIP),
        Metric("mia_auc", "AUC of the loss", MEMBERSHIP),
        Metric("mia_tpr", "TPR at 1 % FPR", MEMBERSHIP),
        Metric("informed", "informed attack", MEMBERSHIP),
        Metric("informed_auc", "AUC of the informed attack", MEMBERSHIP),
        Metric("ulira", "U-LiRA", MEMBERSHIP),
        Metric("ulira_auc", "AUC of U-LiRA", MEMBERSHIP),
        Metric("probe_forget", "forget set", PROBE),
        Metric("probe_forgotten", "test, forgotten class", PROBE),
        Metric("relearn", f"steps to relearn, at most {RELEARN.steps}", "Relearning", digits=0),
        *COSTS,
    )

    @property
    def objective(self) -> Classification:
        return Classification()  # a new one: it counts the classes of the model it looks at

    def share(self, retain: Batch, fraction: float, seed: int) -> Batch:
        return share(retain, fraction, seed)

    def evaluate(
        self,
        model: nn.Module,
        split: LabeledSplit,
        held_out: HeldOut = "test",
        retrain: nn.Module | None = None,
    ) -> Measured:
        """Every metric of one model.

        forget: accuracy on the forget set with the labels it was trained on, in [0, 1]. repaired:
        the same samples with their true labels, where those differ. retain: on all of the retain
        set. test: held-out accuracy, without the forgotten class if there is one, whose own
        accuracy is test_forgotten; a held-out set without one of the two has no such number. mia
        and its like: attacks on forget against held-out outputs, if there are enough of either.
        kl, js, activation: distances of the outputs to those of `retrain`, and informed an attack
        that knows these. probe: `probed`.
        """
        unseen = split.validation if held_out == "validation" else split.test
        sides = {"forget": split.forget, "test": unseen}
        known = {name: classification.labels(side) for name, side in sides.items()}
        found = {name: self.remembered(model, side) for name, side in sides.items()}
        measured = {"forget": share_right(found["forget"], known["forget"])}
        if split.mislabeled:
            measured["repaired"] = share_right(found["forget"], split.true_labels)
        kept = outputs(model, split.retain)
        measured["retain"] = share_right(kept, classification.labels(split.retain))
        gone = known["test"] == (-1 if split.forget_class is None else split.forget_class)
        for name, which in (("test", ~gone), ("test_forgotten", gone)):
            if bool(which.any()):
                measured[name] = share_right(found["test"][which], known["test"][which])
        if min(map(len, known.values())) >= attacks.ATTACK_SPLITS:
            measured |= attacks.attack_all(
                found["forget"], known["forget"], found["test"], known["test"]
            )
        if retrain is not None:
            wanted = {name: self.remembered(retrain, side) for name, side in sides.items()}
            for name in sides:
                pair = found[name], wanted[name]
                measured[f"kl_{name}"] = distance.kl(*pair)
                measured[f"js_{name}"] = distance.js(*pair)
                measured[f"activation_{name}"] = distance.activation_distance(*pair)
            if min(map(len, known.values())) >= attacks.ATTACK_SPLITS:
                both = {name: (found[name], wanted[name], known[name]) for name in sides}
                measured |= informed_attack(both["forget"], both["test"])
        if held_out == "test":  # a search for options has no use for it, and many models
            measured |= probed(model, split)
        return measured

    def scores(
        self, task: str, measured: Measured, original: Measured, retrain: Measured | None
    ) -> Measured:
        kind, right = UIS_KIND[self.kind(task)], original.get("test", 0)
        found = {}
        if right > 0:  # it is a share of that: of an original that is never right there is none
            found["uis"] = uis(right, measured["test"], measured["forget"], kind=kind)
        if retrain is not None:
            found["tow"] = distance.tow(measured, retrain)
        return found

    def relearned(self, model: nn.Module, split: LabeledSplit, original: nn.Module) -> int:
        known = classification.labels(split.forget)
        bar = share_right(outputs(original, split.forget), known)
        steps = relearn_steps(model, self.objective, split.forget, bar, RELEARN)
        return RELEARN.steps if steps is None else steps

    def losses(self, model: nn.Module, split: LabeledSplit) -> dict[str, list[float]]:
        return {
            name: classification.label_losses(
                self.remembered(model, side), classification.labels(side)
            ).tolist()
            for name, side in (("forget", split.forget), ("test", split.test))
        }

    def confidences(self, model: nn.Module, split: LabeledSplit) -> dict[str, Tensor]:
        return {
            name: logit_confidence(outputs(model, side), classification.labels(side))
            for name, side in (
                ("forget", split.forget),
                ("retain", split.retain),
                ("test", split.test),
            )
        }

    def probe(self, split: LabeledSplit) -> Probe:
        """Forget, some retain and validation samples."""
        validation, _ = split.held_out("validation")
        # all of the retain set would double the time of a run; its order is random: the first will
        # do
        retain = take(split.retain, slice(0, PROBED))

        def measure(model: nn.Module) -> Measured:
            found = {}
            for name, samples in {"forget": split.forget, "retain": retain}.items():
                logits, labels = outputs(model, samples), classification.labels(samples)
                found[f"{name}_accuracy"] = share_right(logits, labels)
                found[f"{name}_loss"] = F.cross_entropy(logits, labels).item()
                if name == "forget" and split.mislabeled:
                    found["repaired_accuracy"] = share_right(logits, split.true_labels)
            known = classification.labels(validation)
            found["validation_accuracy"] = share_right(outputs(model, validation), known)
            return found

        return measure


@torch.no_grad()
def outputs(model: nn.Module, samples: Batch) -> Tensor:
    """Logits [N, C] on the CPU of a model in evaluation mode, a part of the samples at a time."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches = whole(samples, at_once(samples), device)
    with evaluating(model):
        parts = [classification.logits(model, part).cpu() for part in batches]
    return torch.cat(parts)


def probed(model: nn.Module, split: LabeledSplit) -> Measured:
    """Accuracies of a linear probe of features; none where a model ends in no linear layer.

    probe_forget: on the forget set, with the labels it was trained on. probe_forgotten: on test
    samples of the forgotten class. The probe knows the retain set, up to 2048 samples of it, and of
    a class that is not in there the validation samples, without which it could not say it.
    """
    layer = last_linear(model, split.retain)
    kept = share(split.retain, min(1.0, KNOWN / len(split.retain["label"])), 0)
    if split.forget_class is not None:
        kept = joined(kept, split.held_out("validation")[1])
    labels = classification.labels(kept)
    if layer is None or len(labels.unique()) < 2:
        return {}
    says = linear_probe(features(model, kept, layer, at_once(kept)), labels)
    asked = {"probe_forget": split.forget, "probe_forgotten": split.held_out("test")[1]}
    found = {}
    for name, side in asked.items():
        wanted = None if side is None else classification.labels(side)
        if wanted is not None and len(wanted):
            said = says(features(model, side, layer, at_once(side)))
            found[name] = (said == wanted).double().mean().item()
    return found


def at_once(samples: Batch) -> int:
    """How many samples go through a model together."""
    pixels = classification.inputs(samples)[:1].numel()
    return max(1, min(MOST, PIXELS // max(1, pixels)))


def share(samples: Batch, fraction: float, seed: int) -> Batch:
    """A share in (0, 1] of labeled samples, the same of every class, drawn by `seed`.

    No class loses its last sample. A smaller share is part of a larger one, and the order stays.
    """
    labels = samples["label"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        drawn = order[labels[order] == label]
        kept[drawn[: max(1, round(fraction * len(drawn)))]] = True
    return take(samples, kept)


def divide(
    samples: Batch,
    train: Tensor,
    held_out: dict[str, Tensor],
    forgotten: Tensor,
    wrong: Tensor | None = None,
    forget_class: int | None = None,
) -> LabeledSplit:
    """Samples by their numbers, as the sets of a split.

    Args:
        samples: all there are.
        train: numbers of the training samples, [N].
        held_out: numbers of the "validation" and the "test" samples.
        forgotten: which training samples are forgotten, [N] bool.
        wrong: the labels they were trained with, [n_forget]; none: their own.
        forget_class: the class they are all of.
    """
    forget = take(samples, train[forgotten])
    return LabeledSplit(
        forget=forget if wrong is None else {**forget, "label": wrong},
        retain=take(samples, train[~forgotten]),
        validation=take(samples, held_out["validation"]),
        test=take(samples, held_out["test"]),
        ids=train[forgotten].tolist(),
        about={"class": forget_class},
        true_labels=forget["label"],
        mislabeled=wrong is not None,
        forget_class=forget_class,
    )


def counted(sizes: Iterable[int]) -> str:
    """How many samples the seeds' forget sets have: "100", or "97 to 104"."""
    found = sorted(set(sizes))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"
