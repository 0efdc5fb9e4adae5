"""Parameters that tensor parallelism split: the rows of this rank's shards.

The graph is that of DTensors, whose nodes have the shapes of whole tensors: it is walked as any
other, and what formulas keep are DTensors. A block is a product of two sides, or exists. Moved to
where the parameter's shard needs them, their own parts are those of the rows of that shard.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gradsurgery.capture.carriers import COUPLED, Answer, carries, keep
from gradsurgery.capture.graph import is_of_mesh
from gradsurgery.capture.leaves import Derived
from gradsurgery.capture.uses import EmbeddingUse, MatrixUse, RowsUse, Use
from gradsurgery.errors import InputError
from gradsurgery.spread import is_split

# in what follows types are silenced where a parameter is a DTensor, which its type does not say
_stand_ins = WeakTensorKeyDictionary()


@carries("_ToTorchTensorBackward _FromTorchTensorBackward RedistributeBackward")
def moved(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    """Samples stay where they are, in a dimension that is not split."""
    if not is_of_mesh(node):  # somebody's own of the same name
        return [None] * len(ins)
    answers = [None if s is None else keep(outs[0], shapes[0], s) for s in ins]
    return [
        COUPLED if s is not None and a is None else a for s, a in zip(ins, answers, strict=True)
    ]


def stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """This rank's shard as a parameter, the same each time; itself if it is not split."""
    if not is_split(parameter):
        return parameter
    shard = _local(parameter.detach())
    known = _stand_ins.get(parameter)
    if known is None or known.data_ptr() != shard.data_ptr() or known.shape != shard.shape:
        known = _stand_ins[parameter] = nn.Parameter(shard)
    return known


def settled(grad: Tensor, parameter: nn.Parameter) -> Tensor:
    """A gradient placed as its parameter is, in memory of its own."""
    return _placed(grad, parameter, parameter.placements[0]).clone()  # type: ignore[attr-defined]


def refuse_derived(
    names: Sequence[str],
    parameters: Sequence[nn.Parameter],
    derived: Sequence[Derived],
    hooked: bool,
) -> None:
    """Raise where other tensors are computed from a parameter that is split, or there are hooks."""
    made = {id(p) for each in derived for p in each.parameters}
    for name, parameter in zip(names, parameters, strict=True):
        if is_split(parameter) and (hooked or id(parameter) in made):
            why = "another tensor is computed from it"
            if hooked:
                why = "the forward pass registered hooks"
            raise InputError(
                f"parameter {name} is split by tensor parallelism, and {why}: rows of shards are "
                "of parameters that activations meet as they are"
            )


def shards_of(name: str, parameter: nn.Parameter, uses: Sequence[Use]) -> list[Use]:
    """The uses of this rank's shard; to be called by all ranks, in the same order."""
    if not is_split(parameter):
        return list(uses)
    (place,) = parameter.placements  # type: ignore[attr-defined]
    shape = _local(parameter.detach()).shape
    if not (place.is_shard() or place.is_replicate()):
        raise InputError(f"parameter {name} is placed as {place}: shards and replicas are served")
    dim = place.dim if place.is_shard() else None
    found = []
    for use in uses:
        if use.n == 0:
            found.append(_none(parameter, shape, use))
        elif isinstance(use, RowsUse):
            blocks = use.blocks.reshape(use.n, *parameter.shape)
            found.append(
                RowsUse(_at(blocks, parameter, None if dim is None else dim + 1), use.rows)
            )
        elif isinstance(use, MatrixUse) and use.left.dim() == 3 and parameter.dim() == 2:
            left = _at(use.left, parameter, 2 if dim == 0 else None)
            right = _at(use.right, parameter, 2 if dim == 1 else None)
            found.append(MatrixUse(left, right, use.rows, use.inputs))
        elif isinstance(use, EmbeddingUse) and parameter.dim() == 2:
            found.append(_embedding(use, parameter, dim))
        else:
            raise InputError(
                f"parameter {name} is split by tensor parallelism, and not that of a linear layer, "
                "an embedding or a norm: rows of its shards are not served"
            )
    # a rank may have no part of a small parameter
    return found if shape.numel() else [_none(parameter, shape, use) for use in uses[:1]]


def _embedding(use: EmbeddingUse, parameter: nn.Parameter, dim: int | None) -> EmbeddingUse:
    indices = _at(use.indices, parameter, None)
    grads = _at(use.grads, parameter, 2 if dim == 1 else None)
    if dim != 0:
        return EmbeddingUse(indices, grads, use.rows, use.plane[0], use.padding)
    first, height = _lines(parameter)
    inside = (indices >= first) & (indices < first + height)
    padding = None if use.padding is None else use.padding - first
    padding = padding if padding is not None and 0 <= padding < height else None
    return EmbeddingUse(torch.where(inside, indices - first, -1), grads, use.rows, height, padding)


def _lines(parameter: nn.Parameter) -> tuple[int, int]:
    """The first line of this rank's, and how many there are."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    return offset[0], shape[0]


def _none(parameter: nn.Parameter, shape: Sequence[int], use: Use) -> RowsUse:
    """No block: the losses depend on the parameter all the same."""
    zeros = _local(parameter.detach()).new_zeros(0, *shape)
    return RowsUse(zeros, use.select(slice(0)).rows)


def _at(tensor: Tensor, parameter: nn.Parameter, dim: int | None) -> Tensor:
    """This rank's part along `dim`; all of it for None."""
    from torch.distributed.tensor import Replicate, Shard

    return _local(_placed(tensor, parameter, Replicate() if dim is None else Shard(dim)))


def _placed(tensor: Tensor, parameter: nn.Parameter, place: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    if not isinstance(tensor, DTensor):  # the same on all ranks
        tensor = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return tensor.redistribute(mesh, [place])


def _local(tensor: Any) -> Tensor:
    return tensor.to_local()
