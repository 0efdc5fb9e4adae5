"""A model's buffers, which a forward pass may update or replace, put back as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Buffers:
    """Copies of them."""

    def __init__(self, model: nn.Module) -> None:
        named = [(p, m, n, b) for p, m in model.named_modules() for n, b in m._buffers.items()]
        self._prefixes = [prefix for prefix, *_ in named]
        self._owned = [(module, name, buffer) for _, module, name, buffer in named]
        self._copies = {id(b): (b, b.detach().clone()) for b in model.buffers()}

    def changed(self) -> list[str]:
        """Names of those that have another value, or were replaced."""
        return [
            f"{prefix}.{name}" if prefix else name
            for (module, name, buffer), prefix in zip(self._owned, self._prefixes, strict=True)
            if module._buffers.get(name) is not buffer
            or (buffer is not None and not torch.equal(*self._copies[id(buffer)]))
        ]

    def put_back(self) -> None:
        with torch.no_grad():
            for module, name, buffer in self._owned:
                module._buffers[name] = buffer
            for buffer, saved in self._copies.values():
                if not torch.equal(
                    buffer, saved
                ):  # an expanded one cannot be written to, or by a step
                    buffer.copy_(saved)


@contextmanager
def buffers_undone(model: nn.Module) -> Iterator[None]:
    """They are afterwards as before, whether the body raises or not."""
    buffers = Buffers(model)
    try:
        yield
    finally:
        buffers.put_back()
