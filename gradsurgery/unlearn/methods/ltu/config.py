"""The options of LTU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradsurgery.unlearn.methods.ltu.membership import Features
from gradsurgery.unlearn.training.trainer import TrainerConfig, finite, require


@dataclass
class LTUConfig(TrainerConfig):
    """Options of LTU: what the authors' figure shows is marked (seen), the rest (inferred)."""

    batch_norm: Literal["train", "eval"] = "eval"
    forget_batch: int = 64
    retain_batch: int = 64
    """Retain samples of a step, dealt out to the query sets, and to the support where that is of
    retain samples."""
    meta: bool = True
    """False: no tuning step, which leaves the plain gradients of the same samples."""
    support: Literal["forget", "retain"] = "forget"
    """What remembering is tuned on: forget samples, so that a step of forgetting is tried, and the
    query sets say what it would cost (seen); or retain samples of other classes than theirs, as it
    was inferred from the text alone."""
    tune_loss: Literal["random_label", "membership"] = "random_label"
    """What forgetting on that support is: the loss at random wrong labels, or membership models'
    verdicts. (inferred)"""
    queries: int = 3
    """N, query sets, of which there are several (seen); how many is inferred."""
    query_weight: float = 3.0
    """Factor of the mean of the losses on the query sets, which are added to that on the support
    (seen). How large it is is inferred: searches among 1, 3 and 10 chose 3 most often, on seven
    tasks 1 once."""
    order: Literal["first", "second"] = "second"
    """second: through the tuning step; first: with the gradient at the tuned parameters."""
    tune_lr: float = 0.01
    """a, the rate of the tuning step, an ordinary gradient step. (inferred)"""
    split: Literal["class", "augmentation"] = "class"
    """How retain sets differ: in their classes, or each is the same batch, the first as it is and
    others augmented. (inferred)"""
    feedback: Literal["membership", "random_label"] = "membership"
    """What says whether a sample is forgotten: membership models, or, without any, the loss at
    random wrong labels."""
    models: int = 4
    """K, membership models, of which the support and each query set of forgetting is made (seen):
    at least queries + 1; who is where is drawn at each step. (inferred)"""
    model_features: Features = "outputs"
    """What a membership model sees of a sample: outputs, the sorted softmax, the loss and the
    label; loss, that alone, which leaves fewer ways to deceive it. (inferred)"""
    model_hidden: int = 32
    """Units of a membership model's hidden layer. (inferred)"""
    model_steps: int = 200
    """Steps of Adam in which the membership models are trained. (inferred)"""
    model_lr: float = 0.01
    refresh: int = 0
    """Train the membership models anew on the present outputs after so many steps; 0: never.
    (inferred)"""
    audit_labels: Literal["true", "forget"] = "true"
    """Labels of the held-out samples that stand for non-members: their own, or labels drawn from
    the forget set's, for a forget set of one class or of wrong labels, which unseen samples with
    labels of their own do not resemble. (inferred)"""
    harmonize: Literal["forget", "retain", "both", "none"] = "forget"
    """Which gradient gives way where the two conflict. (inferred)"""
    granularity: Literal["model", "tensor"] = "model"
    """Where conflicts are looked for: in the whole gradients or tensor by tensor. (inferred)"""
    forget_weight: float = 1.0
    """Factor of the forgetting gradient. (inferred)"""

    @property
    def retain_sets(self) -> int:
        """Into how many a retain batch is dealt out."""
        return self.queries + (self.support == "retain")

    def check(self, name: str) -> None:
        super().check(name)
        require(self.queries >= 1, f"{name}.queries", "at least 1", self.queries)
        sets, batch = self.retain_sets, self.retain_batch
        require(batch >= sets, f"{name}.retain-batch", f"at least {sets}, one for each set", batch)
        for field in ("tune_lr", "forget_weight", "query_weight"):
            value = getattr(self, field)
            option = f"{name}.{field.replace('_', '-')}"
            require(finite(value) and value >= 0, option, "finite and at least 0", value)
        least = self.queries + 1
        if self.feedback == "membership":
            wanted = f"at least {least}, for a support and {self.queries} query sets"
            require(self.models >= least, f"{name}.models", wanted, self.models)
        elif self.support == "forget":
            option, wanted = f"{name}.tune-loss", "random_label where feedback is"
            require(self.tune_loss == "random_label", option, wanted, self.tune_loss)
        require(self.model_hidden >= 1, f"{name}.model-hidden", "at least 1", self.model_hidden)
        require(self.model_steps >= 0, f"{name}.model-steps", "at least 0", self.model_steps)
        rate = self.model_lr
        require(finite(rate) and rate > 0, f"{name}.model-lr", "positive and finite", rate)
        require(self.refresh >= 0, f"{name}.refresh", "at least 0", self.refresh)
