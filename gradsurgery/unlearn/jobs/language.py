"""What jobs with a language model share: pairs of a loss and a rule, what is measured, probes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.language.metrics import Sums, TokenScores, evaluate, relearn_steps, token_scores
from gradsurgery.ranks.shards import kind_of
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.base import (
    COSTS,
    GAP,
    HeldOut,
    Job,
    JobConfig,
    Measured,
    Method,
    Metric,
    Split,
    Variant,
)
from gradsurgery.unlearn.methods import METHODS
from gradsurgery.unlearn.methods.surgery import SurgeryTrainer
from gradsurgery.unlearn.objectives.base import Batch, batch_size, take
from gradsurgery.unlearn.objectives.causal_lm import CausalLM, trimmed
from gradsurgery.unlearn.training.config import update
from gradsurgery.unlearn.training.data import whole
from gradsurgery.unlearn.training.forgetting import values
from gradsurgery.unlearn.training.trainer import Probe

LARGEST = 1e30  # a run's files hold no larger number
PROBED = 128  # retain samples looked at during a run; at its end many more are

KNOWN, FORGOTTEN, MEMBERSHIP = "Known by heart", "Forgetting", "Membership"
MEASURED = (
    Metric("forget/probability", "forget set, probability", KNOWN, short="forget", compared=True),
    Metric("retain/probability", "retain set, probability", KNOWN, short="retain", compared=True),
    Metric("forget/rouge_l_recall", "forget set, ROUGE-L", KNOWN, short="ROUGE", compared=True),
    Metric("retain/rouge_l_recall", "retain set, ROUGE-L", KNOWN, compared=True),
    Metric("forget/memorization", "forget set, tokens right", KNOWN),
    Metric("retain/memorization", "retain set, tokens right", KNOWN),
    Metric("forget/extraction", "forget set, extraction strength", KNOWN, compared=True),
    Metric("retain/extraction", "retain set, extraction strength", KNOWN),
    Metric("real_authors/probability", "real authors, probability", KNOWN, compared=True),
    Metric("real_authors/rouge_l_recall", "real authors, ROUGE-L", KNOWN),
    Metric("world_facts/probability", "world facts, probability", KNOWN, compared=True),
    Metric("world_facts/rouge_l_recall", "world facts, ROUGE-L", KNOWN),
    Metric("forget/truth_ratio", "forget set, truth ratio", FORGOTTEN, compared=True),
    Metric("retain/truth_ratio", "retain set, truth ratio", FORGOTTEN),
    Metric("forget_quality", "forget quality (p of KS)", FORGOTTEN, short="quality"),
    Metric("model_utility", "model utility", FORGOTTEN, short="utility"),
    Metric("generated_perplexity", "perplexity of what it writes", FORGOTTEN, digits=1),
    GAP,
    Metric("attack/min_k", "AUC of min-k", MEMBERSHIP, short="attack", compared=True),
    Metric("attack/loss", "AUC of the loss", MEMBERSHIP),
    Metric("attack/min_k_plus_plus", "AUC of min-k++", MEMBERSHIP),
    Metric("attack/zlib", "AUC of loss over zlib", MEMBERSHIP),
    Metric("attack/reference", "AUC of loss less Retrain's", MEMBERSHIP),
    Metric("attack/gradient", "AUC of the gradient's norm", MEMBERSHIP),
    Metric("priv_leak", "PrivLeak, %", MEMBERSHIP, digits=1),
)
ALONE = (
    "Probabilities are those of whole answers, exp of minus the mean loss of a token; they, "
    "ROUGE-L, shares of tokens and AUCs are in [0, 1]. An attack's AUC of 0.5 is guessing, 1 finds "
    "every forgotten sample."
)
NUMBERS = (
    f"{ALONE} Forget quality is the chance that truth ratios like these come from Retrain's "
    "distribution."
)


class Named(NamedTuple):
    """A loss or a rule as it is asked for: NAME or NAME:OPTION=VALUE,OPTION=VALUE."""

    name: str
    options: tuple[str, ...]

    @classmethod
    def of(cls, given: str, option: str) -> Named:
        name, _, rest = given.partition(":")
        found = cls(name, tuple(rest.split(",")) if rest else ())
        values(found.options, f"--{option}")
        return found


@dataclass
class LanguageConfig(JobConfig):
    """Options of every job with a language model."""

    loss: tuple[str, ...] = ("npo",)
    """Forget losses, each with every rule: names of gradsurgery.language.FORGET, with options as in
    npo:beta=0.3."""
    rule: tuple[str, ...] = ("orthograd", "gru")
    """Rules, names of gradsurgery.RULES, with options as in orthograd:alpha=0.2."""
    method: tuple[Method, ...] = ("graddiff",)
    """Further methods, on the plain loss, or all that go with a language model."""

    @property
    def methods(self) -> list[str]:
        return [name for name in super().methods if _goes(name) or name in self.method]

    @property
    def variants(self) -> list[Variant]:
        pairs = [
            Variant("surgery", share, f"{loss} with {rule}", self._pair(loss, rule))
            for share in self.fractions
            for loss in self.loss
            for rule in self.rule
        ]
        return [*pairs, *super().variants]

    def _pair(self, loss: str, rule: str) -> dict[str, Any]:
        moved, by = Named.of(loss, "loss"), Named.of(rule, "rule")
        return {
            "forget_loss": moved.name,
            "forget_loss_options": list(moved.options),
            "rule": by.name,
            "rule_options": list(by.options),
        }

    def check(self) -> None:
        super().check()
        for option, given in (("loss", self.loss), ("rule", self.rule)):
            if len(set(given)) < len(given):
                raise InputError(f"--{option} names one of them twice: {show(' '.join(given), 80)}")


def _goes(name: str) -> bool:
    """Whether "all" means a method: one that a language model serves. Pairs have their names, and
    few such models can be drawn anew to be the bad teacher."""
    served = {"losses", "outputs", "relabel"}
    return name not in ("surgery", "bad_teacher") and METHODS[name].asks <= served


@dataclass(frozen=True)
class Looking:
    """How a model is looked at."""

    at_once: int = 64
    """Samples in a forward pass that measures."""
    new_tokens: int = 32
    """Of an answer that the model writes, at most; 0: it writes none."""
    relearn_steps: int = 60
    """Steps to relearn that are taken, at most; 0: none are, and nothing is said of them."""
    relearn_batch: int = 16
    relearn_lr: float = 3e-4


@dataclass(frozen=True)
class TextSplit(Split):
    """Every set a batch of texts as `CausalLM` takes it, all padded to one length.

    `samples` are what metrics look at, by the names of `language.metrics.evaluate`: "forget",
    "retain" (a part of it), "validation" and "test" (never trained on), if there are any, and what
    else there is.
    """

    samples: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    tokenizer: Any = None
    looking: Looking = Looking()


class LanguageJob(Job[Any, TextSplit]):
    """A job whose model writes."""

    metrics = (*MEASURED, Metric("relearn", "steps to relearn", "Relearning", digits=0), *COSTS)

    @property
    def objective(self) -> CausalLM:
        return CausalLM()

    def check(self, config: Any) -> None:
        super().check(config)
        split = self.split(config, config.first_seed)
        few: dict[str, Any] = {}
        for name in ("forget", "retain", "validation"):
            samples = getattr(split, name)
            few[name] = None if samples is None else take(samples, slice(0, 2))
        model = self.model(config)
        self.check_model(config, model)
        # a wrong layer, say, is found before anything is trained
        for variant in config.variants:
            name = variant.method
            options = getattr(update(config, {name: {**variant.changes, "stop": "never"}}), name)
            options.check(name)
            try:
                # alone on each rank, as the models here are looked at, if it has a whole one
                alone = None if any(kind_of(model)) else False
                trainer = METHODS[name](
                    model, self.objective, **few, config=options, process_group=alone
                )
                if isinstance(trainer, SurgeryTrainer):
                    trainer.check_losses()
            except InputError as error:
                option = "loss" if name == "surgery" else f"method {name}"
                raise InputError(f"--{option}: {error}") from None

    def check_model(self, config: Any, model: nn.Module) -> None:
        """Raise `InputError` where the model and the data do not go together."""

    def share(self, retain: Batch, fraction: float, seed: int) -> Batch:
        count = batch_size(retain)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return take(retain, order[: max(1, round(fraction * count))].sort().values)

    def evaluate(
        self,
        model: nn.Module,
        split: TextSplit,
        held_out: HeldOut = "test",
        retrain: nn.Module | None = None,
    ) -> Measured:
        sets = {k: v for k, v in split.samples.items() if k not in ("validation", "test")}
        found = evaluate(
            model,
            **sets,  # type: ignore[arg-type]
            holdout=split.samples.get(held_out),
            retrained=retrain,
            tokenizer=split.tokenizer,
            batch_size=split.looking.at_once,
            max_new_tokens=split.looking.new_tokens,
            gradients=True,
        )
        return {k: v for k, v in found.items() if math.isfinite(v) and abs(v) <= LARGEST}

    def scores(
        self, task: str, measured: Measured, original: Measured, retrain: Measured | None
    ) -> Measured:
        return {}

    def relearned(self, model: nn.Module, split: TextSplit, original: nn.Module) -> int | None:
        look = split.looking
        if not look.relearn_steps:
            return None
        batches = list(_parts(model, split.forget, look.relearn_batch))
        bar = Sums.of([math.exp(-s.loss) for s in token_scores(original, batches).values()]).mean
        steps = relearn_steps(
            model, batches, bar, lr=look.relearn_lr, steps=look.relearn_steps, margin=0.05
        )
        return look.relearn_steps if steps is None else steps

    def losses(self, model: nn.Module, split: TextSplit) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"forget": [], "test": []}
        for name, side in (("forget", split.forget), ("test", split.test)):
            if side is not None:
                scores = _scores(model, side, split.looking.at_once)
                found[name] = [score.loss for score in scores.values()]
        return found

    def confidences(self, model: nn.Module, split: TextSplit) -> dict[str, Tensor]:
        """log p - log(1 - p) of a sample's probability p = exp(-L)."""
        losses = [score.loss for score in _scores(model, split.forget, Looking.at_once).values()]
        loss = torch.tensor(losses, dtype=torch.float64)
        return {"forget": -loss - torch.log(-torch.expm1(-loss.clamp(min=1e-12)))}

    def probe(self, split: TextSplit) -> Probe:
        """Forget, some retain and, if there are any, validation samples: losses, and shares of
        tokens that are right, under the names that pictures of runs have."""
        retain = take(split.retain, slice(0, PROBED))
        sides = {"forget": split.forget, "retain": retain, "validation": split.validation}
        sides = {name: side for name, side in sides.items() if side is not None}

        def measure(model: nn.Module) -> Measured:
            found = {}
            for name, samples in sides.items():
                scores = _scores(model, samples, split.looking.at_once).values()
                found[f"{name}_accuracy"] = Sums.of([s.memorization for s in scores]).mean
                found[f"{name}_loss"] = Sums.of([s.loss for s in scores]).mean
            return {k: v for k, v in found.items() if k != "validation_loss"}

        return measure


def _scores(model: nn.Module, samples: Batch, at_once: int) -> dict[int, TokenScores]:
    return token_scores(model, _parts(model, samples, at_once))


def _parts(model: nn.Module, samples: Batch, size: int) -> Iterator[Batch]:
    """A set in batches on the model's device."""
    return map(trimmed, whole(samples, size, next(model.parameters()).device))
