"""Rows of batches, of samples, tasks or means: one forward and backward pass after another."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from gradsurgery.batch import (
    DETACHED,
    Loss,
    WeightedLosses,
    batch_size,
    joined,
    map_batch,
    per_sample_losses,
    tokens,
)
from gradsurgery.capture import FactoredJacobian, tape
from gradsurgery.errors import InputError
from gradsurgery.jacobian import DenseJacobian, first_loss, gradients
from gradsurgery.ops._inputs import check
from gradsurgery.surgery import Rule

# Tokens of both batches up to which they go together: reading the parameters twice then costs more
# than large activations do. Measured on two threads: 512 tokens 12 % faster together, 2048 3 % and
# 6272 the same, at up to 1.5 times the memory.
FEW_TOKENS = 1024


class Part(NamedTuple):
    """What a pass gave of one batch."""

    count: int  # rows
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


@dataclass(frozen=True)
class Passes:
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
    adds: bool  # whether the rows may be added to those of other batches
    scale: float

    def of(self, parts: dict[str, Any]) -> Iterator[Pass]:
        """The passes over batches, by name, each made when it is asked for."""
        if self.rows == "stored":
            yield from self._stored(parts)
            return
        sizes = {part: batch_size(batch) for part, batch in parts.items()}
        most = self.micro_batch
        if most is not None and max(sizes.values()) > most:
            for part, batch in parts.items():
                for at in range(0, sizes[part], most):
                    piece = map_batch(lambda leaf, at=at: leaf[at : at + most], batch)
                    yield self._pass({part: piece}, piece, most < sizes[part])
            return
        together = None
        if set(parts) == {"forget", "retain"} and self._one_pass(*parts.values()):
            together = joined(*parts.values())
        if together is not None:
            yield self._pass(parts, together, False)
            return
        for part, batch in parts.items():
            yield self._pass({part: batch}, batch, False)

    def _one_pass(self, *batches: Any) -> bool:
        if self.together is not None:
            return self.together
        return sum(map(tokens, batches)) <= FEW_TOKENS

    def _pass(self, parts: dict[str, Any], whole: Any, cut: bool) -> Pass:
        """Rows from one pass over `whole`, the parts' samples in order.

        `cut`: whether it is a piece of a batch.
        """
        sizes = {part: batch_size(batch) for part, batch in parts.items()}
        parameters = list(self.named.values())
        with (
            torch.enable_grad(),
            tape(self.model, parameters=parameters, outside=self.outside) as recorder,
        ):
            # of a sample alone nothing is seen of sums, but other pieces have several
            recorder.summed = self.adds or (cut and self.micro_batch != 1)
            losses, weights = self._losses(parts, whole, sizes)
            each = list(sizes.values())
            mine = losses.detach().split(each)
            theirs = [None] * len(each) if weights is None else weights.split(each)
            found = {
                part: self._part(part, *known)
                for part, *known in zip(sizes, mine, theirs, strict=True)
            }
            groups, shares = _layout(list(found.values()))
            scaled = losses * shares.to(losses)
            scaled = scaled if self.scale == 1 else scaled * self.scale
            jacobian = recorder.jacobian(scaled, groups)
        return Pass(jacobian, found, self.scale, cut)

    def _losses(
        self, parts: dict[str, Any], whole: Any, sizes: dict[str, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Losses, [B] or [B, tasks], and weights [B] of the samples in means, if there are any."""
        size, several = sum(sizes.values()), set(parts) <= {"batch", "memory"}
        losses: Any = self.loss(self.model, whole)
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
        else:
            losses = per_sample_losses(losses, size)
        check(losses.requires_grad, DETACHED)
        return losses, weights

    def _part(self, part: str, losses: Tensor, weights: Tensor | None) -> Part:
        merged = part == "forget" or part in self.rule.merges
        count = 1 if merged else losses.shape[-1]
        return Part(count, losses, weights, merged or losses.dim() == 2)

    def _stored(self, parts: dict[str, Any]) -> Iterator[Pass]:
        """The same rows, explicit."""
        options = {"parameters": list(self.named.values()), "chunk_size": self.chunk_size}
        for part, batch in parts.items():
            if self.outside:
                loss = first_loss(self.model, batch, self.loss)
                grads = gradients(loss, list(self.outside.values()))
                names = [n for n, g in zip(self.outside, grads, strict=True) if g is not None]
                if names:
                    check_outside(self.rule, self.rows, names)
            merged = part == "forget" or part in self.rule.merges
            kind = "mean" if merged else "samples"
            found = DenseJacobian.from_model(self.model, batch, self.loss, rows=kind, **options)
            losses = cast(Tensor, found.losses).expand(batch_size(batch))
            yield Pass(found, {part: Part(found.m, losses, None, merged)})


def check_outside(rule: Rule, rows: str, names: list[str]) -> None:
    """Parameters outside the model step along the losses, weighted as the rule weights rows."""
    kind, why = type(rule).__name__, None
    if rows == "stored":
        why = "rows='stored' has the model's alone; use rows='captured'"
    elif not rule.weighted:
        why = f"{kind} gives the losses no weights; put it into the model"
    elif rule.granularity != "model":
        why = (
            f"granularity={rule.granularity!r} gives the losses several weights each; "
            "use granularity='model'"
        )
    check(
        why is None,
        "loss depends on what the optimizer holds and the model does not, "
        f"{', '.join(names)}: {why}",
    )


def _layout(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """The row of each loss, shaped like the losses, and its share in that row."""
    groups, shares, above = [], [], 0
    for part in parts:
        share = part.shares / (part.total or 1) if part.summed else torch.ones_like(part.shares)
        if part.losses.dim() == 2:
            tasks = part.losses.shape[1]
            share = share[:, None].expand(part.losses.shape) * (part.count / tasks)
        if part.count == 1:
            rows = torch.zeros(part.losses.shape, dtype=torch.int64, device="cpu")
        else:  # the last dimension is that of samples, or of tasks
            rows = torch.arange(part.count, device="cpu").expand(part.losses.shape)
        groups.append(rows + above)
        shares.append(share)
        above += part.count
    return torch.cat(groups), torch.cat(shares)
