"""Passes of a model on the meta device, of which shapes are known and no values."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gradsurgery.errors import InputError

PLAIN = F.scaled_dot_product_attention
ANSWERS = {torch.all: True, Tensor.all: True, torch.any: False, Tensor.any: False}


@contextmanager
def on_meta(there: bool) -> Iterator[None]:
    """Around passes: where a model is `there`, what they need of values is refused by name."""
    if not there:
        yield
        return
    try:
        # a checkpoint computes again within a backward pass, where modes are off
        with _Answers(), patch.object(F, "scaled_dot_product_attention", _attention):
            yield
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        raise InputError(
            f"model is on the meta device, where there are no values, and loss needs some: {error}"
        ) from error


class _Answers(TorchFunctionMode):
    """Whether all values of a tensor are so is answered by yes, whether any is by no.

    As where nothing is masked, and nothing has failed.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is Tensor.__bool__ and hasattr(args[0], "answer"):
            return args[0].answer
        out = func(*args, **(kwargs or {}))
        if func in ANSWERS and isinstance(out, Tensor) and out.is_meta:
            # which travels with the tensor to whoever asks it; no type says that it is there
            out.answer = ANSWERS[func]  # type: ignore[attr-defined]
        return out


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Its scores are never whole, as where there are values; meta would have them."""
    if query.dim() != 4 or not query.is_meta:
        return PLAIN(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (side.repeat_interleave(times, -3) for side in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_empty(attn_mask.shape)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
