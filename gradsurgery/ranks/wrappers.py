"""Which ranks step together, by how a model is wrapped or by a process group."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from gradsurgery.capture.hooks import register
from gradsurgery.errors import InputError
from gradsurgery.ranks.group import Group
from gradsurgery.ranks.shards import group_of


def opened(model: nn.Module, process_group: Any) -> tuple[nn.Module, Group]:
    """The module that losses are computed with, and who steps together.

    Args:
        model: a module each rank has a replica of, or one in `DistributedDataParallel`, whose
            module inside is returned: its reducer has no part in a step; or one that `fully_shard`
            or `replicate` was called on, whose ranks are those of its mesh.
        process_group: a ProcessGroup or a DeviceMesh of one dimension; False for this rank alone;
            None for that of the wrapper, or alone where torch.distributed runs no other rank.

    Raises:
        InputError: another kind of process group; one beside a wrapper that has its own; several
            ranks and neither.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    kind = type(process_group).__name__
    if isinstance(model, nn.parallel.DistributedDataParallel):
        own = model.process_group
        if process_group is not None and _handle(process_group) is not own:
            raise InputError(
                "process_group: DistributedDataParallel has its own; leave it out, or pass the "
                "module inside, model.module"
            )
        check_wrapper(model)
        return model.module, Group(own if dist.get_world_size(own) > 1 else None)
    if process_group is not False:
        own = group_of(model)
        if own is not None:
            if process_group is not None and _handle(process_group) is not own:
                raise InputError(
                    "process_group: fully_shard and replicate have their own, that of their mesh; "
                    "leave it out"
                )
            return model, Group(own, alone=True)
    if process_group is None:
        if several:
            raise InputError(
                f"torch.distributed runs {dist.get_world_size()} ranks: pass process_group="
                "torch.distributed.group.WORLD where they step together on the samples of all; "
                "or process_group=False for this rank alone, whose replica may part from the others"
            )
        return model, Group()
    if process_group is False:
        return model, Group()
    handle = _handle(process_group)
    if handle is None:
        raise InputError(
            "process_group must be a ProcessGroup, a DeviceMesh, False for this rank alone, or "
            f"None, got {kind}"
        )
    return model, Group(handle if dist.get_world_size(handle) > 1 else None)


def _handle(process_group: Any) -> Any:
    """A process group; None for what is none."""
    if not dist.is_available():
        return None
    if isinstance(process_group, dist.ProcessGroup):
        return process_group
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise InputError(
                f"process_group: a DeviceMesh of {process_group.ndim} dimensions; pass one of "
                "them, as mesh['data'], or mesh['data', 'shard']._flatten()"
            )
        return process_group.get_group()
    return None


def check_apart(module: nn.Module) -> None:
    """Raise where a forward pass is of the samples of all ranks, and so no row is one sample's."""
    for name, part in module.named_modules():
        if isinstance(part, nn.SyncBatchNorm) and part.training:
            raise InputError(
                f"model: {name or 'it'} is a SyncBatchNorm in training mode, whose output for a "
                "sample depends on those of all ranks: call eval() on it, or use GroupNorm"
            )


@contextmanager
def called_inside(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """In the body, a call of the wrapper in place of the module inside is refused.

    Its own forward pass talks to the ranks, as often as one of them calls it.
    """
    if model is module:
        yield
        return

    def refuse(*_: Any) -> None:
        raise InputError(
            f"loss calls the {type(model).__name__}, and not the model that it is given, the "
            "module inside"
        )

    handle = register(model.register_forward_pre_hook, refuse)
    try:
        yield
    finally:
        handle.remove()


def check_wrapper(model: nn.Module) -> None:
    """Raise where `DistributedDataParallel` was told to do what a step leaves out."""
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return
    if getattr(model, "mixed_precision", None) is not None:
        raise InputError(
            "model: DistributedDataParallel(mixed_precision=...) casts parameters by hooks of its "
            "own forward pass, which a step leaves out: use torch.autocast in the loss"
        )
    hook = model._get_ddp_logging_data().get("comm_hook", "")
    if hook:
        raise InputError(
            f"model: DistributedDataParallel has a communication hook, {hook}, and its reducer has "
            "no part in a step, whose gradients are summed exactly: make it without"
        )
    if model._join_config.enable:
        raise InputError(
            "model: DistributedDataParallel was given to a Join context, which a step has no part "
            "in: pass model.module and process_group=model.process_group, and call step without "
            "batches on a rank that has no samples"
        )
