"""Where the shards of a parameter are, and how whole tensors are dealt out to them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gradsurgery.spread import local


class Place(NamedTuple):
    """How ranks share a parameter: nearly equal pieces of one dimension, the last of them short."""

    dim: int
    pieces: int
    piece: int  # this rank's
    group: Any  # the ranks that have the pieces of one replica
    replicas: Any  # the ranks that have this piece; None where no other has it

    def size(self, shape: Sequence[int]) -> list[int]:
        """Of a piece of a tensor, with what the last ones lack."""
        return [-(-n // self.pieces) if i == self.dim else n for i, n in enumerate(shape)]

    def own(self, whole: Tensor) -> Tensor:
        """This rank's piece of a whole tensor, a view."""
        count = whole.shape[self.dim]
        step = self.size(whole.shape)[self.dim]
        start = min(self.piece * step, count)
        return whole.narrow(self.dim, start, min(step, count - start))

    def dealt(self, wholes: Sequence[Tensor]) -> Tensor:
        """The pieces of some tensors, those of one rank together; flat, in the order of ranks."""
        sizes = [self.size(whole.shape) for whole in wholes]
        each = [torch.Size(size).numel() for size in sizes]
        out = wholes[0].new_zeros(self.pieces, sum(each))
        for piece in range(self.pieces):
            rank = self._replace(piece=piece)
            for room, size, whole in zip(out[piece].split(each), sizes, wholes, strict=True):
                part = rank.own(whole)
                room.view(size).narrow(self.dim, 0, part.shape[self.dim]).copy_(part)
        return out.flatten()

    def taken(self, flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """This rank's pieces of tensors of these shapes, views of what was `dealt` to it."""
        sizes = [self.size(shape) for shape in shapes]
        found = []
        for room, size, shape in zip(
            flat.split([torch.Size(size).numel() for size in sizes]), sizes, shapes, strict=True
        ):
            step, count = size[self.dim], shape[self.dim]
            length = min(step, max(0, count - self.piece * step))
            found.append(room.view(size).narrow(self.dim, 0, length))
        return found


def place_of(parameter: Any) -> Place | None:
    """Of a parameter in shards; None for one that all ranks have whole."""
    for i, placement in enumerate(getattr(parameter, "placements", ())):
        if placement.is_shard():
            mesh = cast(Any, parameter).device_mesh
            others = [k for k in range(mesh.ndim) if k != i]
            return Place(
                placement.dim,
                mesh.size(i),
                mesh.get_local_rank(i),
                mesh.get_group(i),
                mesh.get_group(others[0]) if others else None,
            )
    return None


def as_grad(part: Tensor, parameter: Tensor, owned: bool = False) -> Tensor:
    """What this rank has of a gradient, in memory of its own, as the parameter's `.grad` is.

    `owned`: whether nobody else needs the memory that it is in.
    """
    part = part.to(local(parameter).device, parameter.dtype, copy=not owned)
    if not hasattr(parameter, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    sharded = cast(Any, parameter)
    return DTensor.from_local(
        part.contiguous(),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def grad_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole gradient, the same on all ranks, as the parameter's `.grad` is."""
    if not hasattr(parameter, "placements"):
        return whole.to(parameter.dtype)
    place = place_of(parameter)
    return as_grad(whole if place is None else place.own(whole), parameter)


def whole_of(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, to be asked for by all ranks; any other itself."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "placements") else tensor
