"""Buffers of `DistributedDataParallel`, which has those of one rank on all."""

import torch
from torch import Tensor, nn


class SharedBuffers:
    """A model's buffers that are to be alike, as bytes; none where its wrapper keeps none alike.

    Args:
        model: as it was given, in its wrapper.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers: list[Tensor] = []
        if isinstance(model, nn.parallel.DistributedDataParallel) and model.broadcast_buffers:
            ignored = getattr(model, "parameters_to_ignore", ())
            named = model.module.named_buffers()
            self._buffers = [buffer for name, buffer in named if name not in ignored]
        self.bytes: Tensor | None = None
        if self._buffers:
            self.bytes = torch.cat([_as_bytes(buffer) for buffer in self._buffers])

    @property
    def size(self) -> int:
        return 0 if self.bytes is None else len(self.bytes)

    def put(self) -> None:
        """Write `bytes` to the buffers."""
        if self.bytes is None:
            return
        parts = self.bytes.split([buffer.numel() * buffer.itemsize for buffer in self._buffers])
        with torch.no_grad():
            for buffer, part in zip(self._buffers, parts, strict=True):
                value = part.to(buffer.device).view(buffer.dtype).view(buffer.shape)
                if not torch.equal(buffer, value):  # an expanded one cannot be written to
                    buffer.copy_(value)


def _as_bytes(buffer: Tensor) -> Tensor:
    return buffer.detach().reshape(-1).contiguous().view(torch.uint8)
