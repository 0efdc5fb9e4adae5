"""A run of several processes: who they are, and the first one's files for all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.ranks import Group
from gradsurgery.ranks.group import world
from gradsurgery.ranks.places import place_of, whole_of
from gradsurgery.ranks.shards import kind_of, rest
from gradsurgery.spread import local
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.base import JobConfig
from gradsurgery.unlearn.jobs.directory import RunDirectory, Stage

if TYPE_CHECKING:
    from gradsurgery.unlearn.training.trainer import Trainer

T = TypeVar("T")


@contextmanager
def launched() -> Iterator[Group]:
    """The processes that a launcher started together, as `torchrun` does; or this one alone."""
    there = {"RANK", "WORLD_SIZE"} <= os.environ.keys() and dist.is_available()
    several = there and os.environ["WORLD_SIZE"] != "1"
    begins = several and not dist.is_initialized()
    if begins:
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)
    try:
        yield Group(world())
    finally:
        if begins:
            dist.destroy_process_group()
            # in torch 2.13 a thread of gloo's, that waits for Python to let go of its last tensors,
            # aborts a process that ends before
            time.sleep(0.5)


def check_together(config: JobConfig, ranks: Group) -> None:
    """Raise `InputError` naming what several processes do not share."""
    if not ranks:
        if getattr(config, "fully_shard", False):
            raise InputError(
                "--fully-shard is for several processes, and there is one: start them by torchrun, "
                "or leave it out"
            )
        return
    device = str(getattr(config, "device", "cpu"))
    if ":" in device:
        raise InputError(
            f"--device: {show(device, 80)} is one for {ranks.size} processes: give "
            f"{show(device.partition(':')[0], 80)}, of which each takes its own"
        )


def of_first(ranks: Group, where: str, call: Callable[[], T]) -> T:
    """What a call gives on the first rank, on all; what it raises there, all raise."""
    found: list[Any] = [None]
    with ranks.agreed(where):
        if ranks.rank == 0:
            found[0] = call()
    if ranks:
        with ranks.heard():
            dist.broadcast_object_list(found, group=ranks.handle, group_src=0)
    return found[0]


@contextmanager
def shared_directory(path: Path, ranks: Group) -> Iterator[tuple[RunDirectory, RunDirectory]]:
    """A run directory to work in, as the first rank has it, and as all ranks together use it."""
    own = RunDirectory(path)
    with ExitStack() as stack:
        with ranks.agreed("run directory"):
            if ranks.rank == 0:
                stack.enter_context(own)
        yield own, cast(RunDirectory, SharedDirectory(own, ranks)) if ranks else own


class SharedDirectory:
    """In the place of a `RunDirectory`: all ranks make each call, and the first one's is made."""

    def __init__(self, own: RunDirectory, ranks: Group) -> None:
        self.own, self.ranks = own, ranks

    @property
    def path(self) -> Path:
        return self.own.path

    def __getattr__(self, name: str) -> Any:
        made = getattr(self.own, name)

        def called(*args: Any) -> Any:
            return of_first(self.ranks, name, lambda: made(*args))

        return called

    def finish(self, stage: Stage, model: nn.Module | None, result: dict[str, Any]) -> None:
        """Keep a stage's numbers and weights, whole ones of a sharded model."""
        given = model
        if model is not None and any(kind_of(model)):
            given = cast(nn.Module, _Weights(model, self.ranks))
        of_first(self.ranks, "finish", lambda: self.own.finish(stage, given, result))

    def load_model(self, model: nn.Module, stage: Stage) -> None:
        """The weights of a finished stage."""
        self._load(model, lambda given: self.own.load_model(given, stage))

    def load_weights(self, model: nn.Module, name: str) -> None:
        """The weights in a file."""
        self._load(model, lambda given: self.own.load_weights(given, name))

    def _load(self, model: nn.Module, read: Callable[[nn.Module], object]) -> None:
        """What the first rank reads, on all."""
        if any(kind_of(model)):
            whole = _Weights(model, self.ranks)
            of_first(self.ranks, "weights", lambda: read(cast(nn.Module, whole)))
            whole.deal_out()
            return
        of_first(self.ranks, "weights", lambda: read(model))
        with torch.no_grad():
            for tensor in model.state_dict().values():
                whole = self.ranks.first_(tensor.contiguous())
                if whole is not tensor:
                    tensor.copy_(whole)

    def restore(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Let each rank's trainer continue from what `checkpoint` found."""
        with self.ranks.agreed("restore"):
            self.own.restore(trainer, state)


class _Weights:
    """Those of a sharded model, whole on the CPU of the first rank, as its files have them.

    All ranks make one, and `deal_out`; the first alone is asked for the rest.
    """

    def __init__(self, model: nn.Module, ranks: Group) -> None:
        rest(model)
        self._held, self.ranks = model.state_dict(), ranks
        self._whole: dict[str, Tensor] = {}
        for name, tensor in self._held.items():
            whole = whole_of(tensor)
            if ranks.rank == 0:
                self._whole[name] = whole.cpu()

    def state_dict(self) -> dict[str, Tensor]:
        return self._whole

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        wanted, given = ({k: v.shape for k, v in each.items()} for each in (self._whole, state))
        if wanted != given:
            raise RuntimeError("other tensors")  # as a module says it
        self._whole = state

    def deal_out(self) -> None:
        """The model has what was loaded."""
        for name, tensor in self._held.items():
            known = self._whole.get(name)
            whole = torch.empty(tensor.shape, dtype=tensor.dtype) if known is None else known
            whole, place = self.ranks.first_(whole.contiguous()), place_of(tensor)
            local(tensor).copy_(whole if place is None else place.own(whole))
