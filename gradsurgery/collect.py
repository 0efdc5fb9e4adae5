"""The rows of a step's batches, of samples, tasks or means: recorded or explicit, pass by pass."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from gradsurgery.apart import Trial, few, identity, in_parts, tried
from gradsurgery.batch import (
    DETACHED,
    Loss,
    batch_size,
    check_floating,
    joined,
    map_batch,
    per_sample_losses,
    tokens,
)
from gradsurgery.capture import FactoredJacobian, tape
from gradsurgery.errors import InputError
from gradsurgery.jacobian import DenseJacobian, SummedRows, concat
from gradsurgery.ops._inputs import check
from gradsurgery.stored import first_loss, gradients
from gradsurgery.surgery import Rule

# Tokens of both batches up to which they go together: reading the parameters twice then costs more
# than large activations do. Measured on two threads: 512 tokens 12 % faster together, 2048 3 % and
# 6272 the same, at up to 1.5 times the memory.
FEW_TOKENS = 1024


class Collected(NamedTuple):
    """Rows of several batches, in order."""

    jacobian: FactoredJacobian | SummedRows | DenseJacobian
    counts: dict[str, int]  # the rows of each batch
    losses: dict[str, Tensor]  # of each batch, [B] or [B, tasks]
    reached: list[bool]  # which of the columns' parameters the losses depend on
    # the same rows, of parameters that are not the model's; None where no loss depends on any
    outside: FactoredJacobian | SummedRows | None = None


class _Pass(NamedTuple):
    """What one forward and backward pass gave."""

    jacobian: FactoredJacobian
    counts: dict[str, int]
    losses: dict[str, Tensor]


@dataclass(frozen=True)
class Collector:
    """Makes the rows of batches; options as those of `Surgeon`."""

    model: nn.Module
    rule: Rule
    loss: Loss
    named: dict[str, nn.Parameter]  # the columns
    outside: dict[str, nn.Parameter]  # what else the optimizer holds and the losses may depend on
    rows: Literal["captured", "stored"]
    together: bool | None
    chunk_size: int
    micro_batch: int | None
    trials: dict[Hashable, Trial]  # those done, by loss and batches

    def collect(self, parts: dict[str, Any]) -> Collected:
        """The rows of the batches `parts`, by name."""
        if self.rows == "stored":
            return self._stored(parts)
        sizes = {part: batch_size(batch) for part, batch in parts.items()}
        if self.micro_batch is not None and max(sizes.values()) > self.micro_batch:
            return self._in_parts(parts, sizes)
        together = None
        if set(parts) == {"forget", "retain"} and self._one_pass(*parts.values()):
            together = joined(*parts.values())
            if together is not None and not self._goes_together(parts):
                together = None
        if together is None:
            found = [self._pass({part: batch}, batch, sizes) for part, batch in parts.items()]
        else:
            found = [self._pass(parts, together, sizes)]
        jacobians = [each.jacobian for each in found]
        whole = concat(jacobians) if len(jacobians) > 1 else jacobians[0]
        jacobian, outside = self._apart(whole)
        counts = {part: n for each in found for part, n in each.counts.items()}
        losses = {part: values for each in found for part, values in each.losses.items()}
        return Collected(jacobian, counts, losses, jacobian.reached, outside)

    def _in_parts(self, parts: dict[str, Any], sizes: dict[str, int]) -> Collected:
        """With no more than `micro_batch` samples in a pass."""
        jacobians, rows = [], []
        counts, losses = dict.fromkeys(parts, 0), {}
        most = cast(int, self.micro_batch)
        for part, batch in parts.items():
            above = sum(counts.values())
            values = []
            for at in range(0, sizes[part], most):
                piece = map_batch(lambda leaf, at=at: leaf[at : at + most], batch)
                jacobian, known, seen = self._pass({part: piece}, piece, sizes)
                summed = self._merges(part) or seen[part].dim() == 2  # over samples
                if summed and sizes[part] > most and jacobian.bent:
                    raise InputError(
                        f"micro_batch: {', '.join(jacobian.bent)}: a hook or a Function is not "
                        f"linear in its gradient, and a row of {part} is a sum over parts; take "
                        "whole batches"
                    )
                first = above if summed else above + counts[part]
                counts[part] = known[part] if summed else counts[part] + known[part]
                rows += range(first, first + known[part])
                jacobians.append(jacobian)
                values.append(seen[part])
            losses[part] = torch.cat(values)
        for part, batch in parts.items():
            if sizes[part] > most:
                again = lambda batch=batch: in_parts(self.model, self.loss, batch, most)  # noqa: E731
                differs = self._trial(part, again).coupled
                check(
                    differs is None,
                    f"micro_batch: loss of a sample of {part} depends on the others of its pass: "
                    f"{differs}; take whole batches (micro_batch=None), or sum over tokens and "
                    "divide by a constant",
                )
        own, others = self._apart(concat(jacobians))
        outside = None if others is None else SummedRows(others, rows)
        return Collected(SummedRows(own, rows), counts, losses, own.reached, outside)

    def _one_pass(self, *batches: Any) -> bool:
        if self.together is not None:
            return self.together
        return sum(map(tokens, batches)) <= FEW_TOKENS

    def _goes_together(self, parts: dict[str, Any]) -> bool:
        """Whether samples of both batches have the losses in one pass that they have in two."""
        some = [few(batch, 3) for batch in parts.values()]
        differs = self._trial(
            "together", lambda: tried(self.model, self.loss, joined(*some), some)
        ).coupled
        check(
            differs is None or self.together is None,
            "together: loss of a sample depends on the others of its pass, which are of both "
            f"batches: {differs}; take together=False",
        )
        return differs is None

    def _trial(self, what: str, new: Callable[[], Trial]) -> Trial:
        """What a trial of the loss found: done once, in each mode of the model."""
        known = what, self.model.training, identity(self.loss)
        if known not in self.trials:
            self.trials[known] = new()
        return self.trials[known]

    def _pass(self, parts: dict[str, Any], whole: Any, totals: dict[str, int]) -> _Pass:
        """Rows from one pass over `whole`, the parts' samples in order.

        `totals` has the samples of each part's whole batch, which a mean is over.
        """
        sizes = {part: batch_size(batch) for part, batch in parts.items()}
        parameters = list(self.named.values())
        with (
            torch.enable_grad(),
            tape(self.model, parameters=parameters, outside=self.outside) as recorder,
        ):
            # of a sample alone nothing is seen of sums, but other parts have several
            alone = self.micro_batch != 1
            recorder.summed = any(alone < sizes[part] < totals[part] for part in parts)
            losses = self.loss(self.model, whole)
            several = set(parts) <= {"batch", "memory"}
            if several and isinstance(losses, Tensor) and losses.dim() == 2:
                ((part, size),) = sizes.items()
                tasks, merged = losses.shape[1], self._merges(part)
                check(
                    losses.shape[0] == size and tasks > 0,
                    f"loss must return [{size}] or [{size}, tasks], got {list(losses.shape)}",
                )
                check(
                    tasks > 1 or merged or totals[part] == 1,
                    f"loss of {part} is [{size}, 1]: losses.squeeze(1) has a row for each sample; "
                    "for one task, whose row is the mean, that and gs.Mean()",
                )
                check_floating(losses)
                counts = {part: 1 if merged else tasks}
                groups = torch.arange(tasks, device="cpu").expand(size, tasks)
                groups = torch.zeros_like(groups) if merged else groups
                share = 1 / (totals[part] * (tasks if merged else 1))
                shares = torch.full((size, 1), share, dtype=torch.float64, device="cpu")
            elif several and not isinstance(losses, Tensor):
                got = type(losses).__name__
                raise InputError(
                    f"loss must return a Tensor, [B] or [B, tasks], got {got}: torch.stack(..., 1)"
                )
            else:
                losses = per_sample_losses(losses, sum(sizes.values()))
                counts, groups, shares = self._layout(sizes, totals)
            check(losses.requires_grad, DETACHED)
            jacobian = recorder.jacobian(losses * shares.to(losses), groups)
        detached = losses.detach().split(list(sizes.values()))
        return _Pass(jacobian, counts, dict(zip(parts, detached, strict=True)))

    def _layout(
        self, sizes: dict[str, int], totals: dict[str, int]
    ) -> tuple[dict[str, int], Tensor, Tensor]:
        """How many rows each part has, the row of each sample, and its share in that row."""
        counts, groups, shares = {}, [], []
        for part, size in sizes.items():
            merged = self._merges(part)
            each = torch.arange(size, device="cpu")
            groups.append((torch.zeros_like(each) if merged else each) + sum(counts.values()))
            share = 1 / totals[part] if merged else 1.0
            shares.append(torch.full((size,), share, dtype=torch.float64, device="cpu"))
            counts[part] = 1 if merged else size
        return counts, torch.cat(groups), torch.cat(shares)

    def _merges(self, part: str) -> bool:
        """Whether the rule asks for the mean of a batch only."""
        return part == "forget" or part in self.rule.merges

    def _apart(
        self, jacobian: FactoredJacobian
    ) -> tuple[FactoredJacobian, FactoredJacobian | None]:
        """The model's columns, and those outside that the losses depend on."""
        if not self.outside:
            return jacobian, None
        reached, own = jacobian.reached, len(self.named)
        more = [k for k in range(own, len(reached)) if reached[k]]
        if more:
            self._check_outside([jacobian.names[k] for k in more])
        return jacobian.columns(range(own)), jacobian.columns(more) if more else None

    def _check_outside(self, names: list[str]) -> None:
        """Parameters outside the model step along the losses, weighted as the rule weights rows."""
        rule, named = type(self.rule).__name__, ", ".join(names)
        why = None
        if self.rows == "stored":
            why = "rows='stored' has the model's alone; use rows='captured'"
        elif not self.rule.weighted:
            why = f"{rule} gives the losses no weights; put it into the model"
        elif self.rule.granularity != "model":
            why = (
                f"granularity={self.rule.granularity!r} gives the losses several weights each; "
                "use granularity='model'"
            )
        check(
            why is None,
            f"loss depends on what the optimizer holds and the model does not, {named}: {why}",
        )

    def _stored(self, parts: dict[str, Any]) -> Collected:
        """The same rows, explicit."""
        found = {}
        for part, batch in parts.items():
            if self.outside:
                loss = first_loss(self.model, batch, self.loss)
                grads = gradients(loss, list(self.outside.values()))
                names = [n for n, g in zip(self.outside, grads, strict=True) if g is not None]
                if names:
                    self._check_outside(names)
            alone = lambda batch=batch: in_parts(self.model, self.loss, batch, 1)  # noqa: E731
            what = f"{part}, one sample" if batch_size(batch) == 1 else part
            found[part] = DenseJacobian._of(
                self.model,
                batch,
                self.loss,
                rows="mean" if self._merges(part) else "samples",
                parameters=list(self.named.values()),
                chunk_size=self.chunk_size,
                trial=lambda what=what, alone=alone: self._trial(what, alone),
            )
        jacobian = concat(found.values())
        return Collected(
            jacobian,
            {part: each.m for part, each in found.items()},
            {part: cast(Tensor, each.losses) for part, each in found.items()},
            cast(list[bool], jacobian.reached),
        )
