"""A language model's head, run only where tokens are to be predicted.

Of a question and its answer only the answer counts, and the logits of a large vocabulary are the
widest tensor of a step. What enters the head is narrowed to the positions asked for, by a hook that
is there for one call: the logits are [B, K, V] then, and the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from gradsurgery.capture.hooks import register

whole: WeakSet[nn.Module] = WeakSet()  # models whose head was seen not to work on some positions


def logits_at(
    model: nn.Module, run: Callable[[], Tensor], places: Tensor, length: int
) -> tuple[Tensor, bool]:
    """Logits [B, K, V] of K positions of each sample, and True; or all that the model computes.

    Args:
        model: of transformers, or an adapter of peft on one. Its head is what
            `get_output_embeddings` returns; of other models nobody knows whether what follows the
            head goes position by position.
        run: calls the model, and returns its logits.
        places: [B, K] int64, each in [0, T): the positions asked for.
        length: T, how many positions the labels have. Of more, as with prompt tuning, the last T
            are meant.
    """
    head = output_head(model)
    if head is None or model in whole:
        return run(), False
    calls: list[bool] = []

    def narrow(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states: Any = next(iter(given), None)  # none where it came by name
        fits = _is_of(states, places.shape[0], length)
        calls.append(fits)
        return (at(states, places, length), *given[1:]) if fits else None

    handle = register(head.register_forward_pre_hook, narrow)
    try:
        logits = run()
    finally:
        handle.remove()
    if any(calls) and (calls != [True] or logits.shape[:2] != places.shape):
        whole.add(model)  # a head called in pieces, or whose outputs are put together again
        return run(), False
    return logits, any(calls)


def at(values: Tensor, places: Tensor, length: int) -> Tensor:
    """Values [B, T or more, d] at places [B, K] of the last T, [B, K, d]."""
    index = (places + (values.shape[1] - length)).to(values.device).unsqueeze(-1)
    return values.gather(1, index.expand(-1, -1, values.shape[2]))


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, or None where that is not known to be all."""
    inner: Any = getattr(model, "_orig_mod", model)  # of torch.compile
    if callable(getattr(inner, "get_base_model", None)):  # of peft
        inner = inner.get_base_model()
    if not type(inner).__module__.startswith("transformers."):
        return None
    named = getattr(model, "get_output_embeddings", None)
    found = named() if callable(named) else None
    return found if isinstance(found, nn.Module) else None


def _is_of(states: Any, size: int, length: int) -> bool:
    return (
        isinstance(states, Tensor)
        and states.dim() == 3
        and states.shape[0] == size
        and states.shape[1] >= length
    )
