"""What several processes or devices hold together is refused, by name: no rows are summed there."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError

# where the classes live that spread a module, a parameter or an optimizer over ranks or devices;
# torch.distributed also has wrappers that do not, as for activation checkpoints
MODULES = (
    "torch.nn.parallel.",
    "torch.distributed.fsdp.",
    "torch.distributed._composable.",
    "torch.distributed._shard.",
    "torch.distributed.tensor.",
    "torch.distributed.pipelining.",
    "deepspeed.",
    "megatron.core.",
    "fairscale.nn.",
    "colossalai.",
)
OPTIMIZERS = (
    "torch.distributed.",
    "deepspeed.",
    "megatron.",
    "fairscale.",
    "colossalai.",
    "horovod.",
)
# what these classes are called by those who use them
KNOWN = {"FSDPModule": "fully_shard (FSDP2)", "ReplicateModule": "replicate", "DDP": "replicate"}
ALONE = "a model that one process holds on its own"
INSTEAD = {
    "DistributedDataParallel": "the module inside, model.module; Surgeon and gs.tape take the "
    "wrapper around the whole model",
    "FullyShardedDataParallel": "fully_shard (FSDP2), which Surgeon takes, or " + ALONE,
    "DataParallel": "DistributedDataParallel, which Surgeon takes, with a process for each device",
    "ZeroRedundancyOptimizer": "the optimizer that it is made of; fully_shard shards its state too",
    "PostLocalSGDOptimizer": "the optimizer that it is made of",
    "DTensor": "Surgeon, where parallelize_module split the model over all ranks, or " + ALONE,
    "Pipe": "the model that was split, whole on each rank",
}
_served: ContextVar[nn.Module | None] = ContextVar("served", default=None)


@contextmanager
def served(model: nn.Module) -> Iterator[None]:
    """Inside, what split this model's parameters over ranks is no reason to refuse it."""
    token = _served.set(model)
    try:
        yield
    finally:
        _served.reset(token)


def is_served(model: nn.Module) -> bool:
    """Whether this is inside of `served` for it."""
    return _served.get() is model


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, without its history; all of one that is not spread."""
    tensor = tensor.detach()
    # here and below: that a tensor may be a DTensor, its type does not say
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def beside(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What all ranks have, as it can be computed with together with a parameter."""
    if not is_split(parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def is_split(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which ranks have shards or replicas."""
    return hasattr(tensor, "placements")


def mesh_of(model: nn.Module) -> Any:
    """The mesh of one dimension over which `parallelize_module` split parameters; None else."""
    meshes = {parameter.device_mesh for parameter in model.parameters() if is_split(parameter)}  # type: ignore[attr-defined]
    whole = not any(_kind(type(module), MODULES) for module in model.modules())
    mesh = meshes.pop() if meshes and whole else None
    return mesh if mesh is not None and not meshes and mesh.ndim == 1 else None


def check_one_rank(model: nn.Module) -> dict[str, nn.Parameter]:
    """Raise where the model, a part of it or a parameter is spread over ranks or devices.

    Returns:
        Its parameters, by name.
    """
    fine = set(KNOWN.values()) if _served.get() is model else set()
    # in every step: names are looked for where there is something to name
    kinds = {_kind(kind, MODULES) for kind in {type(module) for module in model.modules()}}
    if kinds - fine - {None}:
        for name, module in model.named_modules():
            kind = _kind(type(module), MODULES)
            if kind is not None and kind not in fine:
                raise _refused(f"model: {name} is" if name else "model is", kind)
    if _served.get() is model:
        fine.add("DTensor")
    named = dict(model.named_parameters())
    check_whole(named, fine)
    return named


def check_whole(parameters: dict[str, nn.Parameter], fine: Collection[str] = ()) -> None:
    """Raise where a parameter is spread, but by one of the kinds that are `fine`."""
    for name, parameter in parameters.items():
        kind = _kind_of_parameter(parameter)
        if kind is not None and kind not in fine:
            raise _refused(f"model: parameter {name} is", kind)


def check_one_rank_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise where the optimizer is one that several ranks step together."""
    kind = _kind(type(optimizer), OPTIMIZERS)
    if kind is not None:
        raise _refused("optimizer is", kind)


@lru_cache(maxsize=1024)  # a model has many modules and parameters, of few types
def _kind(kind: type, places: tuple[str, ...]) -> str | None:
    found = [base for base in kind.__mro__ if f"{base.__module__}.".startswith(places)]
    if not found:
        return None
    known = [KNOWN[base.__name__] for base in found if base.__name__ in KNOWN]
    return known[0] if known else found[0].__name__


def _kind_of_parameter(parameter: nn.Parameter) -> str | None:
    if getattr(parameter, "_is_flat_param", False):
        return "FullyShardedDataParallel"
    if hasattr(parameter, "ds_id"):
        return "DeepSpeed's ZeRO"
    if getattr(parameter, "tensor_model_parallel", False):
        return "Megatron's tensor parallelism"
    return _kind(type(parameter), MODULES)


def _refused(what: str, kind: str) -> InputError:
    return InputError(
        f"{what} spread over several processes or devices by {kind}, and rows are not summed over "
        f"these: use {INSTEAD.get(kind, ALONE)}"
    )
