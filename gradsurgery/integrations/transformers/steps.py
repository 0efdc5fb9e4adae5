"""The steps of a trainer: rows of micro-batches, one update, what it saw, what is remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn

from gradsurgery.capture.held import Hold
from gradsurgery.errors import InputError
from gradsurgery.integrations.transformers.losses import Parts
from gradsurgery.language.reference import LogProbs, WithoutAdapter
from gradsurgery.language.tokens import Batch
from gradsurgery.ops._inputs import check
from gradsurgery.ranks.shards import gathering, kind_of
from gradsurgery.ranks.wrappers import opened
from gradsurgery.step import Surgeon


class Steps:
    """A Surgeon in a loop that is not ours, made when the loop begins.

    Args:
        parts: what makes an update of what.
        hold: as of `Surgeon`.
    """

    def __init__(self, parts: Parts, hold: Hold) -> None:
        self.parts = parts
        self.hold: Hold = hold
        self.surgeon: Surgeon | None = None
        self._context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._seen: dict[str, list[float]] = {}  # since they were asked for
        self._stepped = False

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        forget: Callable[[], Iterable[Batch]],
        begun: bool,
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Ask the original, if it is wanted, and be ready for rows.

        Args:
            model: as the loop calls it, where several ranks step in `DistributedDataParallel` or
                sharded by `fully_shard`.
            optimizer: the loop's, wrapped or not.
            forget: all batches of the forget set.
            begun: whether the model has moved already, in a run that is resumed.
            context: what the loop has around a forward pass.
        """
        self._context, known = context, self.parts.log_probs
        module, ranks = opened(model, None)
        if known is not None and not len(known):
            check(
                not begun,
                "the original's log-probabilities are not in the checkpoint, and the model is no "
                "longer the original: resume from one saved by this trainer without "
                "save_only_model, or pass reference=LogProbs.of(original, ...)",
            )
            found = LogProbs()
            with ranks.agreed("log-probabilities of the original") as said:
                with gathering(module):
                    for batch in islice(forget(), ranks.rank, None, ranks.size):
                        with context():
                            found.add(module, batch)
                said.mine = found.state_dict()
            columns = {name: torch.cat([each[name] for each in said.every]) for name in said.mine}
            known.load_state_dict(columns)  # all of them, or none
        if self.parts.adapter and not begun:
            with context():
                _check_fresh(module, next(iter(forget())))
            self.parts = self.parts._replace(adapter=False)  # once: it moves from here on
        self.surgeon = Surgeon(model, optimizer, self.parts.rule, hold=self.hold)

    def begin_anew(self) -> None:
        """Forget what the rule remembers of a run before this one, as the optimizer does."""
        if self._stepped:
            self.parts.rule.load_state_dict({})

    def discard(self) -> None:
        """Drop the rows added so far."""
        if self.surgeon is not None:
            self.surgeon.discard()

    def add(self, forget: Batch, retain: Batch | None) -> None:
        """The rows of a micro-batch, whose retain samples may all be on other ranks."""
        assert self.surgeon is not None
        with self._context():  # each its own: casts that autocast keeps sum gradients in 16 bits
            self.surgeon.add(forget=forget, loss=self.parts.forget)
        if retain is not None or any(kind_of(self.surgeon.model)):  # of shards all ranks add
            with self._context():
                self.surgeon.add(retain=retain, loss=self.parts.retain)

    def backward(self) -> float:
        """Leave the update in `.grad`; the loss, for the log."""
        assert self.surgeon is not None
        info = self.surgeon.backward()
        self._stepped = True
        forget, retain = info.forget_loss, info.retain_loss
        if forget is None or retain is None:  # the scaler's losses overflow: no step is taken
            return 0.0
        found = {
            "forget_loss": forget,
            "retain_loss": retain,
            "cosine_mean": float(info.cosines.mean()),
            "conflict_rate": info.conflict_rate,
            "kept_norm": info.kept_norm,
            "rank": info.rank,
        }
        for name, value in found.items():
            if value is not None:
                self._seen.setdefault(name, []).append(value)
        return retain + (forget if self.parts.forget.objective == "lower" else -forget)

    def metrics(self) -> dict[str, float]:
        """Means of what steps saw since this was asked last."""
        seen, self._seen = self._seen, {}
        return {name: sum(values) / len(values) for name, values in seen.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs: the rule's memory, the original's log-probabilities."""
        known = self.parts.log_probs
        return {
            "rule": self.parts.rule.state_dict(),
            "log_probs": None if known is None else known.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any] | None, device: torch.device) -> None:
        """Go on from a `state_dict()`; None where a checkpoint has none."""
        name, known = type(self.parts.rule).__name__, self.parts.log_probs
        if state is None:
            check(
                not self.parts.rule.remembers,
                f"the checkpoint does not have what {name} remembers: it was saved with "
                "save_only_model, or by another trainer",
            )
            return
        memory = {
            # states of generators and names of parameters are bytes, which stay on the CPU
            key: value.to(device) if value.is_floating_point() else value
            for key, value in state["rule"].items()
        }
        self.parts.rule.load_state_dict(memory)
        if known is not None and state["log_probs"] is not None:
            known.load_state_dict(state["log_probs"])


def _check_fresh(model: nn.Module, batch: Batch) -> None:
    """Raise where a model differs from itself without its adapter, taken for the original."""
    now = LogProbs.of(model, [batch]).log_probs(model, batch)
    below = WithoutAdapter().log_probs(model, batch).to(now)
    away = float((now - below).abs().max())
    if not away <= 1e-3 * float(below.abs().max()):
        raise InputError(
            "reference: without its adapter the model is not the one that unlearning begins with: "
            f"log-probabilities differ by {away:.3g}; pass reference=Frozen(copy.deepcopy(model)), "
            "or WithoutAdapter() if the model below the adapter is meant"
        )
