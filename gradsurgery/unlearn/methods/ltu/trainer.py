"""LTU: learn to unlearn, by steps that also help what comes after them.

g_r = grad [L(t; S) + w mean_i L_r(t - a grad L(t; S); Q_i)], where L forgets and L_r remembers; g_f
alike of membership models' verdicts; descend g_r + g_f, made not to conflict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.ops import harmonize
from gradsurgery.unlearn.methods.ltu.config import LTUConfig
from gradsurgery.unlearn.methods.ltu.membership import MembershipModels, features, halves
from gradsurgery.unlearn.methods.ltu.meta import Scalar, meta_gradient
from gradsurgery.unlearn.methods.ltu.sets import dealt, shifted
from gradsurgery.unlearn.objectives.base import (
    Batch,
    Outputs,
    batch_size,
    fresh,
    per_sample,
    take,
)
from gradsurgery.unlearn.objectives.classification import integers
from gradsurgery.unlearn.training.described import PAIRED, Asked, LogUniform, Space
from gradsurgery.unlearn.training.given import check_functions
from gradsurgery.unlearn.training.modes import evaluating
from gradsurgery.unlearn.training.shared import added_up, part_of
from gradsurgery.unlearn.training.trainer import (
    Record,
    Trainer,
    differentiable,
)

Augment = Callable[[Batch, torch.Generator], Batch]


class LTUTrainer(Trainer[LTUConfig]):
    """Meta-tune, meta-test, meta-update, with remembering and forgetting feedback.

    One scheme is run twice: a step is tried on a support, the losses of N query sets are taken
    after it, and the gradient of all of it at the parameters before it is the feedback. (seen)
    Remembering tries a step that forgets, on forget samples, and asks N sets of retain samples of
    unlike distributions for their loss. (seen) Forgetting lowers the cross-entropy of membership
    models' answer to "a member?" with "no": some are the support, others the query sets. (seen)
    Both are harmonized to one direction, the update. (seen; that their sum is it where they do not
    conflict, and one gives way where they do, is inferred) The forget loss itself is never climbed.

    The membership models learn from an audit set, the forget samples as members and `validation`
    as non-members: whatever is later judged on those validation samples has been seen.

    Args:
        augment: makes the other retain sets of the first where `split` is "augmentation"; by
            default images [B, C, H, W] move by up to an eighth of their size.

    Learning to Unlearn for Robust Machine Unlearning, Huang et al. 2024 (arXiv:2407.10494), and the
    figure of its pipeline by the first author, where (seen) stands. The loss of the step tried, how
    the N sets differ, N, K and all rates, the audit set, the membership models and their
    refreshing, and which gradient gives way are inferred.
    """

    name = "ltu"
    title = "LTU"
    about = "tuning steps tested ahead, membership models' verdicts, harmonized"
    paper = "Huang et al. 2024 (arXiv:2407.10494)"
    color = "#d55e00"
    asks = frozenset({"losses", "outputs", "classes", "relabel"})  # with the default options
    space: ClassVar[Space] = {
        **PAIRED,
        "steps": (80, 160),
        "lr": LogUniform(3e-4, 3e-3),
        "tune_lr": LogUniform(3e-4, 5e-2),
        "forget_weight": (0.3, 1.0, 3.0),
        "tune_loss": ("random_label", "membership"),
        "query_weight": (1.0, 3.0, 10.0),
        "model_steps": (50, 200),
        "model_features": ("outputs", "loss"),
    }
    # non-members look like unseen ones only with labels like the forget set's, where those are
    # wrong or of one class
    space_by_task: ClassVar[Mapping[str, Space]] = {
        "random": {"audit_labels": ("true",)},
        "memorized": {"audit_labels": ("true",)},
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
        config = self.config
        found |= {"outputs"} if config.feedback == "membership" else {"relabel"}
        if config.support == "forget" and config.tune_loss == "random_label":
            found |= {"relabel"}
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
        r, support_loss, retain_after = self._feedback(*self._remembering(forget))
        f, forget_loss, forget_after = self._feedback(*self._forgetting(forget))
        values = torch.stack([forget_loss, forget_after, support_loss, retain_after]).tolist()
        kinds = ("forget", "forget", self.config.support, "retain")
        for kind, value in zip(kinds, values, strict=True):
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
            "support_loss_batch": values[2],
            "retain_loss_tuned": values[3],
            "cosine": cosine,
            "conflict_rate": float(cosine < 0),
        }

    def _several(self) -> Batch:
        """The next retain batch that can be dealt out: the remainder of an epoch may be small."""
        least = 2 if self.config.split == "augmentation" else max(2, self.config.retain_sets)
        size = 0
        for _ in range(self.batches["retain"].per_epoch + 1):
            batch = self.draw("retain")
            size = batch_size(batch)
            if size >= least:
                return batch
        raise InputError(f"retain: LTU deals out a batch of {least} samples or more, got {size}")

    # -- the two kinds of feedback

    def _feedback(
        self, tune: list[Scalar], test: list[Scalar]
    ) -> tuple[list[Tensor | None], Tensor, Tensor]:
        rate = self.config.tune_lr if self.config.meta else 0.0
        return meta_gradient(
            self.model,
            tune,
            test,
            rate,
            weight=self.config.query_weight,
            order=self.config.order,
            of_all=partial(added_up, self.parameters, self.ranks),
        )

    def _filled(self, grads: list[Tensor | None], factor: float = 1.0) -> list[Tensor]:
        """Gradients of one dtype, the widest of the parameters', zero where there is none."""
        dtype = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        return [
            torch.zeros_like(p, dtype=dtype) if grad is None else factor * grad.to(dtype)
            for p, grad in zip(self.parameters, grads, strict=True)
        ]

    def _objectives(
        self, batch: Batch, values: Callable[[nn.Module, Batch], Tensor], sets: int = 1
    ) -> list[Scalar]:
        """The mean of values(model, batch) [B] as a sum over parts that fit a forward pass.

        Of several ranks each has the parts of its own samples. Of each of several sets, its part in
        the mean over all.
        """
        size, mine = batch_size(batch), part_of(batch, self.ranks)
        own = 0 if mine is None else batch_size(mine)
        length = self.config.micro_batch or size
        parts = [take(mine, slice(at, at + length)) for at in range(0, own, length)]

        def share(part: Batch) -> Scalar:
            return lambda model: differentiable(values(model, part)).sum() / (size * sets)

        return [share(part) for part in parts]

    def _of_sets(self, sets: Sequence[Batch]) -> list[Scalar]:
        """The mean over sets of the mean loss on each."""
        each = (self._objectives(batch, self._label_losses, len(sets)) for batch in sets)
        return [part for parts in each for part in parts]

    def _label_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.losses(fresh(batch), model)  # a step looks at a batch several times

    def _remembering(self, forget: Batch) -> tuple[list[Scalar], list[Scalar]]:
        """Support and queries: what is lost where a step that forgets is tried."""
        sets = self._split(self._several())
        if self.config.support == "retain":
            return self._of_sets(sets[:1]), self._of_sets(sets[1:])
        if self.config.tune_loss == "membership":
            every = torch.arange(self.config.models, device=self.device)
            support = self._objectives(forget, self._verdicts([every]))
        else:
            support = self._of_sets([self.relabel(forget)])
        return support, self._of_sets(sets)

    def _forgetting(self, forget: Batch) -> tuple[list[Scalar], list[Scalar]]:
        """Support and queries: membership models, or wrong labels, drawn for this step."""
        sides = self.config.queries + 1
        if self.auditors is None:
            drawn = [self.relabel(forget) for _ in range(sides)]
            return self._of_sets(drawn[:1]), self._of_sets(drawn[1:])
        order = torch.randperm(self.config.models, generator=self.generator).to(self.device)
        first, *others = order.tensor_split(sides)
        support, queries = (
            self._objectives(forget, self._verdicts(each)) for each in ([first], others)
        )
        return support, queries

    def _verdicts(self, sets: Sequence[Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
        """Of samples, [B], the mean over sets of the mean over a set's membership models."""
        auditors = cast(MembershipModels, self.auditors)
        which = torch.cat(list(sets))
        sizes = torch.tensor([len(k) for k in sets])
        shares = (1 / (sizes.double() * len(sets))).repeat_interleave(sizes)

        def values(model: nn.Module, part: Batch) -> Tensor:
            seen = self._seen(self.outputs(part, model), batch_size(part))
            each = F.softplus(auditors(seen, which))  # cross-entropy with "no"
            return shares.to(each) @ each

        return values

    def _split(self, batch: Batch) -> list[Batch]:
        """Sets of retain samples, of unlike distributions."""
        sets = self.config.retain_sets
        if self.config.split == "augmentation":
            return [batch, *(self._augmented(batch) for _ in range(sets - 1))]
        known = integers(self.objective.classes(batch), batch_size(batch), "classes")
        return [take(batch, chosen) for chosen in dealt(known, sets, self.generator)]

    def _augmented(self, batch: Batch) -> Batch:
        if self.augment is None:
            return shifted(batch, self.generator, self.objective)
        return self.augment(batch, self.generator)

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
