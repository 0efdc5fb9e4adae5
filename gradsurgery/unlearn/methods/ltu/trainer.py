"""LTU: learn to unlearn, by steps that also help what comes after them.

g_r = grad [L_r(t; S) + L_r(t - a grad L_r(t; S); Q)], g_f alike of membership models' verdicts;
descend g_r + g_f, made not to conflict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.ops import harmonize
from gradsurgery.unlearn.methods.ltu.membership import Features, MembershipModels, features, halves
from gradsurgery.unlearn.methods.ltu.meta import Scalar, meta_gradient
from gradsurgery.unlearn.objectives.base import (
    Batch,
    Objective,
    Outputs,
    batch_size,
    fresh,
    per_sample,
    take,
)
from gradsurgery.unlearn.objectives.classification import Classification, integers
from gradsurgery.unlearn.training.described import PAIRED, Asked, LogUniform, Space
from gradsurgery.unlearn.training.given import check_functions
from gradsurgery.unlearn.training.modes import evaluating
from gradsurgery.unlearn.training.shared import added_up, part_of
from gradsurgery.unlearn.training.trainer import (
    Record,
    Trainer,
    TrainerConfig,
    differentiable,
    finite,
    require,
)

Augment = Callable[[Batch, torch.Generator], Batch]


@dataclass
class LTUConfig(TrainerConfig):
    """Options of LTU. The paper's text leaves many open: those are marked (inferred)."""

    batch_norm: Literal["train", "eval"] = "eval"
    forget_batch: int = 64
    retain_batch: int = 64
    """Retain samples of a step, half of them support and half query."""
    meta: bool = True
    """False: no tuning step, which leaves the plain gradients of the same samples."""
    order: Literal["first", "second"] = "second"
    """second: through the tuning step; first: with the gradient at the tuned parameters."""
    tune_lr: float = 0.01
    """a, the rate of the tuning step, an ordinary gradient step. (inferred)"""
    split: Literal["class", "augmentation"] = "class"
    """How support and query differ: in their classes, or the query is an augmented support.
    (inferred)"""
    feedback: Literal["membership", "random_label"] = "membership"
    """What says whether a sample is forgotten: membership models, or, without any, the loss at
    random wrong labels."""
    models: int = 4
    """K, membership models, at least 2; each step takes half of them as support, drawn anew.
    (inferred)"""
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

    def check(self, name: str) -> None:
        super().check(name)
        require(self.retain_batch >= 2, f"{name}.retain-batch", "at least 2", self.retain_batch)
        for field in ("tune_lr", "forget_weight"):
            value = getattr(self, field)
            option = f"{name}.{field.replace('_', '-')}"
            require(finite(value) and value >= 0, option, "finite and at least 0", value)
        require(self.models >= 2, f"{name}.models", "at least 2", self.models)
        require(self.model_hidden >= 1, f"{name}.model-hidden", "at least 1", self.model_hidden)
        require(self.model_steps >= 0, f"{name}.model-steps", "at least 0", self.model_steps)
        rate = self.model_lr
        require(finite(rate) and rate > 0, f"{name}.model-lr", "positive and finite", rate)
        require(self.refresh >= 0, f"{name}.refresh", "at least 0", self.refresh)


class LTUTrainer(Trainer[LTUConfig]):
    """Meta-tune, meta-test, meta-update, with remembering and forgetting feedback.

    Remembering lowers the loss on retain samples, forgetting the cross-entropy of membership
    models' answer to "a member?" with "no". Each is tuned on a support and tested on a query: other
    samples there, other models here. The forget loss itself is never climbed, so a sample that
    looks unseen no longer pushes.

    The membership models learn from an audit set, the forget samples as members and `validation`
    as non-members: whatever is later judged on those validation samples has been seen.

    Args:
        augment: makes the query of the support where `split` is "augmentation"; by default images
            [B, C, H, W] move by up to an eighth of their size.

    Learning to Unlearn for Robust Machine Unlearning, Huang et al. 2024 (arXiv:2407.10494). How
    support and query are made, the audit set, the membership models and their refreshing, and
    which gradient gives way are inferred.
    """

    name = "ltu"
    title = "LTU"
    about = "tuning steps tested ahead, membership models' verdicts, harmonized"
    paper = "Huang et al. 2024 (arXiv:2407.10494)"
    color = "#d55e00"
    asks = frozenset({"losses", "outputs", "classes"})  # with the default options
    space: ClassVar[Space] = {
        **PAIRED,
        "steps": (80, 160),
        "lr": LogUniform(3e-4, 3e-3),
        "tune_lr": LogUniform(3e-4, 5e-2),
        "forget_weight": (0.3, 1.0, 3.0),
        "model_steps": (50, 200),
        "model_features": ("outputs", "loss"),
    }
    # non-members look like unseen ones only with labels like the forget set's, where those are
    # wrong or of one class
    space_by_task: ClassVar[Mapping[str, Space]] = {
        "random": {"audit_labels": ("true",)},
        "class": {"audit_labels": ("forget",)},
        "mislabeled": {"audit_labels": ("forget",)},
    }
    Config = LTUConfig
    sharded = False
    draws = ("forget", "retain")
    passes_over = ("retain",)
    keeps = ("auditors",)

    def __init__(self, *args: Any, augment: Augment | None = None, **options: Any) -> None:
        check_functions(augment=augment)
        self.augment = augment
        super().__init__(*args, **options)

    def asked(self) -> frozenset[Asked]:
        found: set[Asked] = {"losses"}
        found |= {"outputs"} if self.config.feedback == "membership" else {"relabel"}
        if self.config.split == "class":
            found |= {"classes"}
        elif self.augment is None:
            found |= {"inputs", "with_inputs"}
        return frozenset(found)

    def labeled_sets(self) -> tuple[str, ...]:
        held_out = ("validation",) if self.config.feedback == "membership" else ()
        kept = ("retain",) if self.config.split == "class" else ()
        return ("forget", *kept, *held_out)

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        super().check_extra_state(state)
        if (self.auditors is None) != (state["auditors"] is None):
            raise InputError("state: extra: of it and this trainer only one has membership models")

    def prepare(self) -> None:
        self.auditors: MembershipModels | None = None
        if self.config.meta and self.config.order == "second":
            _refuse_weight_norm(self.model)
        if self.config.feedback == "random_label":
            return
        if self.data["validation"] is None:
            raise InputError(
                "validation: LTU's membership models need samples never trained on, got None; "
                "feedback='random_label' does without"
            )
        self._train_auditors()

    def gradients(self) -> Record:
        with self.ranks.agreed("gradients", wait=False):
            return self._gradients()

    def _gradients(self) -> Record:
        refresh = self.config.refresh
        if self.auditors is not None and refresh and self.step and self.step % refresh == 0:
            self._train_auditors()
        forget = self.draw("forget")
        support, query = self._split(self._several())
        r, retain_loss, retain_after = self._feedback(
            self._objectives(support, self._retain_losses),
            self._objectives(query, self._retain_losses),
        )
        f, forget_loss, forget_after = self._feedback(*self._forgetting(forget))
        values = torch.stack([forget_loss, forget_after, retain_loss, retain_after]).tolist()
        for kind, value in zip(("forget", "forget", "retain", "retain"), values, strict=True):
            if not math.isfinite(value):  # before they reach the weights
                raise NonFiniteError(f"{kind}: a loss of the batch is not finite")
        reached = [a is not None or b is not None for a, b in zip(f, r, strict=True)]
        f, r = self._filled(f, self.config.forget_weight), self._filled(r)
        if self.config.granularity == "model":  # as one vector: no tensor stands alone
            f, r = ([parameters_to_vector(side)] for side in (f, r))
        cosine = _cosine(f, r)
        if self.config.harmonize != "none":
            mode, per = self.config.harmonize, self.config.granularity
            f, r = harmonize(f, r, mode=mode, per=per)
        update = torch.cat([(a + b).flatten() for a, b in zip(f, r, strict=True)])
        parts = update.split([parameter.numel() for parameter in self.parameters])
        for parameter, grad, used in zip(self.parameters, parts, reached, strict=True):
            parameter.grad = grad.view_as(parameter).to(parameter.dtype) if used else None
        return {
            "forget_loss_batch": values[0],
            "forget_loss_tuned": values[1],
            "retain_loss_batch": values[2],
            "retain_loss_tuned": values[3],
            "cosine": cosine,
            "conflict_rate": float(cosine < 0),
        }

    def _several(self) -> Batch:
        """The next retain batch that can be split: the remainder of an epoch may be one sample."""
        for _ in range(self.batches["retain"].per_epoch + 1):
            batch = self.draw("retain")
            if batch_size(batch) > 1:
                return batch
        raise InputError("retain: LTU splits a batch into support and query, got 1 sample")

    # -- the two kinds of feedback

    def _feedback(
        self, tune: list[Scalar], test: list[Scalar]
    ) -> tuple[list[Tensor | None], Tensor, Tensor]:
        rate = self.config.tune_lr if self.config.meta else 0.0
        order, shared = self.config.order, partial(added_up, self.parameters, self.ranks)
        return meta_gradient(self.model, tune, test, rate, order=order, of_all=shared)

    def _filled(self, grads: list[Tensor | None], factor: float = 1.0) -> list[Tensor]:
        """Gradients of one dtype, the widest of the parameters', zero where there is none."""
        dtype = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        return [
            torch.zeros_like(p, dtype=dtype) if grad is None else factor * grad.to(dtype)
            for p, grad in zip(self.parameters, grads, strict=True)
        ]

    def _objectives(
        self, batch: Batch, values: Callable[[nn.Module, Batch], Tensor]
    ) -> list[Scalar]:
        """The mean of values(model, batch) [B] as a sum over parts that fit a forward pass.

        Of several ranks each has the parts of its own samples.
        """
        size, mine = batch_size(batch), part_of(batch, self.ranks)
        own = 0 if mine is None else batch_size(mine)
        length = self.config.micro_batch or size
        parts = [take(mine, slice(at, at + length)) for at in range(0, own, length)]

        def share(part: Batch) -> Scalar:
            return lambda model: differentiable(values(model, part)).sum() / size

        return [share(part) for part in parts]

    def _retain_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.losses(fresh(batch), model)  # a step looks at a batch several times

    def _forgetting(self, batch: Batch) -> tuple[list[Scalar], list[Scalar]]:
        """Support and query: membership models, or wrong labels, drawn for this step."""
        auditors = self.auditors
        if auditors is None:
            parts = [self.relabel(batch) for _ in range(2)]
            support, query = (self._objectives(part, self._retain_losses) for part in parts)
            return support, query

        def verdicts(which: Tensor) -> Callable[[nn.Module, Batch], Tensor]:
            def values(model: nn.Module, part: Batch) -> Tensor:
                seen = self._seen(self.outputs(part, model), batch_size(part))
                return F.softplus(auditors(seen, which)).mean(0)  # cross-entropy with "no"

            return values

        order = torch.randperm(self.config.models, generator=self.generator).to(self.device)
        sides = order.tensor_split(2)
        support, query = (self._objectives(batch, verdicts(side)) for side in sides)
        return support, query

    def _split(self, batch: Batch) -> tuple[Batch, Batch]:
        """Support and query of retain samples."""
        if self.config.split == "augmentation":
            if self.augment is None:
                return batch, shifted(batch, self.generator, self.objective)
            return batch, self.augment(batch, self.generator)
        size = batch_size(batch)
        known = integers(self.objective.classes(batch), size, "classes")
        classes, counts = known.unique(return_counts=True)
        order = torch.randperm(len(classes), generator=self.generator).to(self.device)
        # as many classes as make about half of the samples
        before = counts[order].cumsum(0)
        cut = int((before[:-1] - size / 2).abs().argmin()) + 1 if len(classes) > 1 else 0
        chosen = torch.isin(known, classes[order[:cut]])
        if len(classes) == 1:
            chosen[: size // 2] = True
        return take(batch, chosen), take(batch, ~chosen)

    # -- membership models

    def _seen(self, found: Outputs, size: int) -> Tensor:
        """Features [B, ...] of B = `size` samples, of several predictions their mean."""
        seen = features(found.logits, found.labels, self.config.model_features)
        return per_sample(seen, found.sample, size)

    def _predicted(self, kind: str) -> Outputs:
        """What the model predicts for a whole set, whose samples are numbered through."""
        found, before = [], 0
        for part in self.whole(kind):
            outputs = self.outputs(part)
            found.append(outputs._replace(sample=outputs.sample + before))
            before += batch_size(part)
        logits, labels, sample = map(torch.cat, zip(*found, strict=True))
        if not bool(logits.isfinite().all()):
            raise NonFiniteError(f"{kind}: an output of the model is not finite")
        return Outputs(logits, labels, sample)

    @torch.no_grad()
    def _train_auditors(self) -> None:
        with evaluating(self.model):
            forget, unseen = (self._predicted(kind) for kind in ("forget", "validation"))
        if self.config.audit_labels == "forget" and len(forget.labels):
            labels = forget.labels.cpu()
            drawn = torch.randint(len(labels), unseen.labels.shape, generator=self.generator)
            given = labels[drawn].to(self.device)
            unlike = given != unseen.labels  # a sample's own label would tell nothing
            unseen = Outputs(unseen.logits[unlike], given[unlike], unseen.sample[unlike])
        sides, sizes = [], []
        for found in (forget, unseen):
            left, sample = found.sample.unique(return_inverse=True)  # of some none may be left
            sides.append(found._replace(sample=sample))
            sizes.append(len(left))
        if min(sizes) < 2:
            raise InputError(
                "validation: membership models need 2 forget samples and 2 held-out ones, "
                f"got {sizes[0]} and {sizes[1]}"
            )
        seen = [self._seen(found, size) for found, size in zip(sides, sizes, strict=True)]
        seen = torch.cat(seen).double()
        member = torch.tensor([1, 0]).repeat_interleave(torch.tensor(sizes))
        models = self.config.models
        shown = halves(member, models, self.generator).to(self.device)
        self.auditors = MembershipModels(
            seen.shape[1], models, self.config.model_hidden, self.generator
        ).to(self.device)
        self.audit = self.auditors.learn(
            seen, member.to(self.device), shown, self.config.model_steps, self.config.model_lr
        )


def shifted(batch: Batch, generator: torch.Generator, objective: Objective | None = None) -> Batch:
    """Images [B, C, H, W] moved by up to an eighth of their height and width, zeros moving in."""
    task = objective or Classification()
    images = task.inputs(batch)
    if not isinstance(images, Tensor) or images.dim() != 4:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"split='augmentation' moves images [B, C, H, W], got {got}: give augment")
    height, width = images.shape[2:]
    reach = max(height // 8, 1), max(width // 8, 1)
    padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]))
    tops, lefts = (
        torch.randint(2 * most + 1, (len(images),), generator=generator).tolist() for most in reach
    )
    moved = [
        image[:, top : top + height, left : left + width]
        for image, top, left in zip(padded, tops, lefts, strict=True)
    ]
    return task.with_inputs(batch, torch.stack(moved))


def _refuse_weight_norm(model: nn.Module) -> None:
    """torch's second derivative of weight norm is wrong."""
    for name, module in model.named_modules():
        chained = getattr(module, "parametrizations", {})
        kinds = [type(each) for chain in chained.values() for each in chain]
        kinds += [type(hook) for hook in module._forward_pre_hooks.values()]
        if any(kind.__name__ in ("_WeightNorm", "WeightNorm") for kind in kinds):
            raise InputError(
                f"{name or 'model'} has weight norm, whose second derivative torch gets wrong; "
                'use order="first" or remove it'
            )


def _cosine(a: list[Tensor], b: list[Tensor]) -> float:
    products = [torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)]
    lengths = [torch.stack([x.norm() for x in side]).norm() for side in (a, b)]
    value = (torch.stack(products).sum() / lengths[0] / lengths[1]).item()
    return value if value == value else 0.0  # of a zero gradient
