"""Rows of batches, of samples, tasks or means: one forward and backward pass after another."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from gradsurgery.apart import (
    Attempt,
    Trial,
    added_up,
    few,
    identity,
    in_parts,
    tried,
    written_over,
)
from gradsurgery.batch import (
    DETACHED,
    AnyLoss,
    Loss,
    WeightedLosses,
    batch_size,
    check_floating,
    joined,
    map_batch,
    per_sample_losses,
    sample_count,
    take,
    tokens,
)
from gradsurgery.capture import FactoredJacobian
from gradsurgery.capture.partial_rows import PartialRows
from gradsurgery.capture.passing import collectives, refused
from gradsurgery.capture.tape import recorded
from gradsurgery.errors import InputError
from gradsurgery.jacobian import DenseJacobian
from gradsurgery.ops._inputs import check, to_device
from gradsurgery.stored import first_loss, gradients
from gradsurgery.surgery import Rule

# Tokens of both batches up to which they go together on a CPU: reading the parameters twice then
# costs more than large activations do. Measured on two threads: 512 tokens 12 % faster together,
# 2048 3 % and 6272 the same, at up to 1.5 times the memory. For a GPU two passes are twice the
# launches, which a host may not keep up with, and one holds what a plain step on both does.
FEW_TOKENS = 1024


class Part(NamedTuple):
    """What a pass gave of one batch."""

    rows: int
    losses: Tensor  # [B] or [B, tasks]
    weights: Tensor | None  # [B] float64 on the CPU, of the samples in means; None where all are 1
    summed: bool  # whether its rows are means over samples, and go to the same rows of all passes

    @property
    def shares(self) -> Tensor:
        """The weights."""
        if self.weights is not None:
            return self.weights
        return torch.ones(len(self.losses), dtype=torch.float64, device="cpu")

    @property
    def total(self) -> float:
        return float(len(self.losses)) if self.weights is None else float(self.weights.sum())


class Pass(NamedTuple):
    """Rows of one forward and backward pass, those of its parts one after another."""

    jacobian: FactoredJacobian | DenseJacobian
    parts: dict[str, Part]
    scale: float = 1.0  # of the losses, and so of the rows
    cut: bool = False  # whether it is of a piece of a batch
    partial: PartialRows | None = None  # where other passes give rows of the same batches
    bent: Mapping[str, str] = MappingProxyType({})  # by part: a parameter that keeps those apart


@dataclass(frozen=True)
class Passes:
    """Makes the rows of batches; options as those of `Surgeon`."""

    model: nn.Module
    rule: Rule
    loss: AnyLoss
    named: dict[str, nn.Parameter]  # the columns
    outside: dict[str, nn.Parameter]  # what else the optimizer holds and the losses may depend on
    rows: Literal["captured", "stored"]
    together: bool | None
    chunk_size: int
    micro_batch: int | None
    adds: bool  # whether the rows may be added to those of other batches
    ranks: bool  # or to those of other ranks
    scale: float
    trials: dict[Hashable, Trial]  # those done, by loss and batches
    attempt: Attempt  # of a trial
    linear: set[Hashable]  # kinds of Functions found to be
    # the same rows, where the parameters of passes are there for these alone
    kept: Callable[[FactoredJacobian | DenseJacobian], FactoredJacobian | DenseJacobian] | None

    def of(self, parts: dict[str, Any]) -> Iterator[Pass]:
        """The passes over batches, by name, each made when it is asked for."""
        for made in self._made(parts):
            if self.kept is not None:
                made = made._replace(jacobian=self.kept(made.jacobian))
            yield made
            del made  # whoever asks for the next one may have dropped it

    def _made(self, parts: dict[str, Any]) -> Iterator[Pass]:
        if self.rows == "stored":
            yield from self._stored(parts)
            return
        sizes = {part: sample_count(self.loss, batch) for part, batch in parts.items()}
        largest = max(sizes.values())
        most = largest if self.micro_batch is None else self.micro_batch
        if largest > most:
            for part, batch in parts.items():
                _check_cut(f"micro_batch={most}", part, batch, sizes[part])
                of, met = sizes[part] if most < sizes[part] else None, False
                for at in range(0, sizes[part], most):
                    piece = take(batch, slice(at, at + most))
                    # of one loss alone nothing is seen of sums
                    made = self._pass({part: piece}, piece, of, asks=most > 1 or not met)
                    if made.partial is not None and not met:
                        made, met = self._looked(made, {part: batch}), made.partial.met
                    yield made
                    del made  # whoever asks for the next one may have dropped it
        else:
            together = self._joined(parts)
            if together is not None:
                yield self._looked(self._pass(parts, together), parts)
            else:
                for part, batch in parts.items():
                    yield self._looked(self._pass({part: batch}, batch), {part: batch})
        for part, batch in parts.items():
            if sizes[part] > most:
                self._check_apart("micro_batch", part, batch, most)
            elif self.adds and sizes[part] > 1:
                self._check_apart("add", part, batch, 1)

    def _joined(self, parts: dict[str, Any]) -> Any | None:
        """Both batches as one, where one pass does for them."""
        if set(parts) != {"forget", "retain"} or not self._one_pass(*parts.values()):
            return None
        if any(sample_count(self.loss, part) != batch_size(part) for part in parts.values()):
            return None  # rows of documents have lengths of their own
        together = joined(*parts.values())
        return together if together is not None and self._goes_together(parts) else None

    def _one_pass(self, *batches: Any) -> bool:
        if self.together is not None:
            return self.together
        if self.adds:  # a pass for a mean alone leaves that gradient, and no pairs
            return False
        on_gpu = any(parameter.is_cuda for parameter in self.named.values())
        return on_gpu or sum(map(tokens, batches)) <= FEW_TOKENS

    def _goes_together(self, parts: dict[str, Any]) -> bool:
        """Whether samples of both batches have the losses in one pass that they have in two."""

        def new() -> Trial:
            some = [few(batch, 3) for batch in parts.values()]
            return tried(self.model, self.loss, joined(*some), some, self.attempt)

        differs = self._trial("together", new).coupled
        check(
            differs is None or self.together is None,
            "together: loss of a sample depends on the others of its pass, which are of both "
            f"batches: {differs}; take together=False",
        )
        return differs is None

    def _check_apart(self, what: str, part: str, batch: Any, most: int) -> None:
        """Raise where losses of samples taken in parts of `most` are others than together."""
        differs = self._trial(
            part, lambda: in_parts(self.model, self.loss, batch, most, self.attempt)
        ).coupled
        check(
            differs is None,
            f"{what}: loss of a sample of {part} depends on the others of its pass: {differs}; "
            "take whole batches (by step, micro_batch=None), or return gs.WeightedLosses for a "
            "mean over tokens",
        )

    def _looked(self, made: Pass, batches: dict[str, Any]) -> Pass:
        """The pass, with what hooks and Functions make of samples that are taken together."""
        partial = made.partial
        if partial is None or not partial.met:
            return made
        bent = {}
        for part, batch in batches.items():
            summed = made.parts[part].summed
            bent[part] = partial.bent if summed else ""
            # shards are not gathered for this: a process would hold gradients of all
            if (summed or partial.always) and not bent[part] and self.kept is None:
                bent[part] = self._not_added_up(part, batch, partial.hooked)
        return made._replace(bent=bent)

    def _not_added_up(self, part: str, batch: Any, hooked: bool) -> str:
        """A parameter whose gradients of samples together are not the sum of each one's."""
        if sample_count(self.loss, batch) != batch_size(batch) or batch_size(batch) < 2:
            return ""

        def new() -> Trial:
            return added_up(self.model, self.loss, batch, self.named, self.attempt)

        # a hook may come at any time
        found = new() if hooked else self._trial(f"sums of {part}", new)
        return found.coupled or ""

    def _trial(self, what: str, new: Callable[[], Trial]) -> Trial:
        """What a trial of the loss found: done once, in each mode of the model."""
        modes = hash(tuple(module.training for module in self.model.modules()))
        known = what, modes, identity(self.loss)
        if known not in self.trials:
            self.trials[known] = new()
        return self.trials[known]

    def _pass(
        self, parts: dict[str, Any], whole: Any, of: int | None = None, asks: bool = True
    ) -> Pass:
        """Rows from one pass over `whole`, the parts' samples in order.

        Args:
            of: the samples of the batch that it is a piece of, if it is one.
            asks: whether hooks and Functions are asked what they make of sums.
        """
        sizes = {part: sample_count(self.loss, batch) for part, batch in parts.items()}
        cut = of is not None
        with (
            torch.enable_grad(),
            recorded(self.model, self.named, outside=self.outside) as recorder,
        ):
            if self.adds:  # a buffer of batches may be filled anew before the rows are used
                whole = map_batch(torch.clone, whole)
            losses, weights = self._losses(parts, whole, sizes, cut)
            each = list(sizes.values())
            mine = losses.detach().split(each)
            theirs = [None] * len(each) if weights is None else weights.split(each)
            known = zip(sizes, mine, theirs, strict=True)
            found = {part: self._part(part, losses, weights) for part, losses, weights in known}
            groups, shares = _layout(list(found.values()))
            scale, partial = self.scale, None
            if self.adds or self.ranks or cut:
                means = _means(found.values())
                scaled = self.adds or self.ranks or weights is not None
                if of is not None and means and not scaled:
                    scale *= len(losses) / of  # gradients are as of the whole batch's mean
                if cut or means or len(losses) > 1:  # of one row alone nothing is asked
                    partial = PartialRows(means, scaled, self.adds or cut, self.linear)
                recorder.partial = partial if asks or losses.dim() > 1 else None
            scaled = losses * to_device(shares.to(losses.dtype), losses.device)
            scaled = scaled if scale == 1 else scaled * scale
            jacobian = recorder.jacobian(scaled, groups)
        return Pass(jacobian, found, scale, cut, partial)

    def _losses(
        self, parts: dict[str, Any], whole: Any, sizes: dict[str, int], cut: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Losses, [B] or [B, tasks], and weights [B] of the samples in means, if there are any."""
        size, several = sum(sizes.values()), set(parts) <= {"batch", "second", "memory"}
        before = collectives()
        losses: Any = self.loss(self.model, whole)
        if collectives() != before:
            found = self._trial("between", partial(written_over, self.model, self.loss, whole))
            check(found.coupled is None, refused(f"loss: {found.coupled}"))
        weights = None
        if isinstance(losses, WeightedLosses):
            losses, weights = losses.checked(size)
        if several and not isinstance(losses, Tensor):
            got = type(losses).__name__
            raise InputError(
                f"loss must return a Tensor, [B] or [B, tasks], got {got}: torch.stack(..., 1)"
            )
        if several and losses.dim() == 2:
            check(
                losses.shape[0] == size and losses.shape[1] > 0,
                f"loss must return [{size}] or [{size}, tasks], got {list(losses.shape)}",
            )
            (part,) = parts
            alone = size == 1 and not (cut or self.adds)
            check(
                losses.shape[1] > 1 or self._merges(part) or alone,
                f"loss of {part} is [{size}, 1]: losses.squeeze(1) has a row for each sample; "
                "for one task, whose row is the mean, that and gs.Mean()",
            )
            check_floating(losses)
        else:
            losses = per_sample_losses(losses, size)
        check(losses.requires_grad, DETACHED)
        return losses, weights

    def _merges(self, part: str) -> bool:
        """Whether the rule asks for the mean of a batch only."""
        return part == "forget" or part in self.rule.merges

    def _part(self, part: str, losses: Tensor, weights: Tensor | None) -> Part:
        merged = self._merges(part)
        rows = 1 if merged else losses.shape[-1]
        return Part(rows, losses, weights, merged or losses.dim() == 2)

    def _stored(self, parts: dict[str, Any]) -> Iterator[Pass]:
        """The same rows, explicit."""
        loss = cast(Loss, self.loss)
        for part, batch in parts.items():
            _check_cut("rows='stored'", part, batch, sample_count(self.loss, batch))
            if self.outside:
                first = first_loss(self.model, batch, loss)
                grads = gradients(first, list(self.outside.values()))
                names = [n for n, g in zip(self.outside, grads, strict=True) if g is not None]
                if names:
                    check_outside(self.rule, self.rows, names)
            alone = partial(in_parts, self.model, self.loss, batch, 1, self.attempt)
            what = f"{part}, one sample" if batch_size(batch) == 1 else part
            found = DenseJacobian._of(
                self.model,
                batch,
                loss,
                rows="mean" if self._merges(part) else "samples",
                parameters=list(self.named.values()),
                chunk_size=self.chunk_size,
                trial=partial(self._trial, what, alone),
            )
            losses = cast(Tensor, found.losses).expand(batch_size(batch))
            yield Pass(found, {part: Part(found.m, losses, None, self._merges(part))})
            if self.adds and self._merges(part) and batch_size(batch) > 1:
                self._check_apart("add", part, batch, 1)


def _check_cut(what: str, part: str, batch: Any, samples: int) -> None:
    check(
        samples == batch_size(batch),
        f"{what} takes samples apart, and {part} has {samples} in {batch_size(batch)} rows of "
        "tokens: take gradsurgery.language.unpacked(batch)",
    )


def check_outside(rule: Rule, rows: str, names: list[str]) -> None:
    """Parameters outside the model step along the losses, weighted as the rule weights rows."""
    kind, why = type(rule).__name__, None
    if rows == "stored":
        why = "rows='stored' has the model's alone; use rows='captured'"
    elif rule.weighting is None:
        why = f"{kind} gives the losses no weights; put it into the model"
    elif rule.weighting.granularity != "model":
        why = (
            f"granularity={rule.weighting.granularity!r} gives the losses several weights each; "
            "use granularity='model'"
        )
    check(
        why is None,
        "loss depends on what the optimizer holds and the model does not, "
        f"{', '.join(names)}: {why}",
    )


def _means(parts: Iterable[Part]) -> set[int]:
    """The rows that are means."""
    summed = chain.from_iterable([part.summed] * part.rows for part in parts)
    return {row for row, mean in enumerate(summed) if mean}


def _layout(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """The row of each loss, shaped like the losses, and its share in that row."""
    groups, shares, above = [], [], 0
    for part in parts:
        share = part.shares / (part.total or 1) if part.summed else torch.ones_like(part.shares)
        if part.losses.dim() == 2:
            tasks = part.losses.shape[1]
            share = share[:, None].expand(part.losses.shape) * (part.rows / tasks)
        if part.rows == 1:
            rows = torch.zeros(part.losses.shape, dtype=torch.int64, device="cpu")
        else:  # the last dimension is that of samples, or of tasks
            rows = torch.arange(part.rows, device="cpu").expand(part.losses.shape)
        groups.append(rows + above)
        shares.append(share)
        above += part.rows
    return torch.cat(groups), torch.cat(shares)
