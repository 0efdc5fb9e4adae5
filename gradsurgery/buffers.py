"""A model's buffers, which a forward pass may update or replace, put back as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Buffers:
    """Copies of them."""

    def __init__(self, model: nn.Module) -> None:
        self._owned = [(m, name, b) for m in model.modules() for name, b in m._buffers.items()]
        self._copies = {id(b): (b, b.detach().clone()) for b in model.buffers()}

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
