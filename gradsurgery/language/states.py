"""Losses of a layer's hidden states: RMU, for what is forgotten and what is retained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradsurgery.capture.hooks import register
from gradsurgery.errors import InputError
from gradsurgery.language.base import LanguageLoss
from gradsurgery.language.reference import Frozen, WithoutAdapter
from gradsurgery.language.tokens import Batch, by_sample, called, last, text_tokens
from gradsurgery.ops._inputs import check


@dataclass(frozen=True, kw_only=True)
class _StateLoss(LanguageLoss):
    """Squared distance of a layer's output h_t from another, the mean over the label tokens.

    Args:
        layer: name of the module whose output h is looked at, [B, T, d] or first of a tuple: all of
            the name or, behind a wrapper's prefix as peft's, its end.
        as_published: the public code's mean over the d dimensions, in place of the paper's sum.
    """

    layer: str = "model.layers.7"
    as_published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        got = type(self.layer).__name__
        check(
            isinstance(self.layer, str), f"layer of {type(self).__name__} must be text, got {got}"
        )

    def _distance(self, states: Tensor, wanted: Tensor, tokens: Tensor) -> Tensor:
        """[B] from [B, T, d], what can be expanded to it, and tokens that count, [B, T]."""
        each = (states - wanted).square()
        each = each.mean(-1) if self.as_published else each.sum(-1)
        tokens = tokens.to(each.device)
        return torch.where(tokens, each, 0).sum(1) / tokens.sum(1)


@dataclass(frozen=True, kw_only=True)
class RMU(_StateLoss):
    """Hidden states of what is forgotten, drawn to one random direction.

    Args:
        layer: as for `RMURetain`.
        as_published: as for `RMURetain`.
        scale: c, 0 or more, the length of what they are drawn to.
        seed: of the unit vector u, whose entries are drawn uniformly from [0, 1) before it is
            normalized: the same for the same seed and width.

    The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning, Li et al. 2024
    (arXiv:2403.03218).
    """

    formula: ClassVar[str] = "(1/n) sum_t |h_t - c u|^2"
    paper: ClassVar[str] = "Li et al. 2024 (arXiv:2403.03218)"

    scale: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "scale")
        self._at_least(0, "seed", whole=True)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens = text_tokens(batch)
        states = hidden_states(model, batch, self.layer, tokens.shape)
        generator = torch.Generator().manual_seed(self.seed)
        u = torch.rand(states.shape[-1], dtype=torch.float64, generator=generator, device="cpu")
        return self._distance(states, (self.scale * u / u.norm()).to(states), tokens)


@dataclass(frozen=True, kw_only=True)
class RMURetain(_StateLoss):
    """Hidden states of what is retained, held where the original has them.

    Args:
        layer: name of the module whose output h is looked at, [B, T, d] or first of a tuple: all of
            the name or, behind a wrapper's prefix as peft's, its end.
        reference: `Frozen(copy.deepcopy(model))` or `WithoutAdapter()`.
        as_published: the public code's mean over the d dimensions, in place of the paper's sum.

    The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning, Li et al. 2024
    (arXiv:2403.03218).
    """

    needs: ClassVar[str] = "model"
    formula: ClassVar[str] = "(1/n) sum_t |h_t - h'_t|^2"
    paper: ClassVar[str] = "Li et al. 2024 (arXiv:2403.03218)"

    reference: Frozen | WithoutAdapter | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens = text_tokens(batch)
        # it is there: checked when the loss was made
        with self.reference.running(model) as original:  # type: ignore[union-attr]
            wanted = hidden_states(original, batch, self.layer, tokens.shape)
        states = hidden_states(model, batch, self.layer, tokens.shape)
        return self._distance(states, wanted.to(states), tokens)


def hidden_states(model: nn.Module, batch: Batch, layer: str, shape: Sequence[int]) -> Tensor:
    """Output [B, T, d] of a layer in one forward pass, float32 or wider.

    Raises:
        InputError: no module of that name, or several; one that is not called once; an output that
            is no tensor [B, T or more, d].
    """
    found: list[Any] = []

    def keep(module: nn.Module, given: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = register(_module(model, layer).register_forward_hook, keep)
    try:
        called(model, batch)
    finally:
        handle.remove()
    check(len(found) == 1, f"layer {layer!r} must be called once a pass, got {len(found)} calls")
    states = found[0]
    got = type(states).__name__
    check(isinstance(states, Tensor), f"layer {layer!r} must return a tensor, got {got}")
    what = f"output of layer {layer!r}"
    states = last(by_sample(batch, states, what), shape, what)
    return states.float() if states.dtype.itemsize < 4 else states


def _module(model: nn.Module, layer: str) -> nn.Module:
    named = dict(model.named_modules())
    if layer in named:
        return named[layer]
    found = [name for name in named if name.endswith(f".{layer}")]
    if len(found) != 1:
        kind = type(model).__name__
        raise InputError(f"layer {layer!r}: {kind} has {len(found)} modules of this name")
    return named[found[0]]
