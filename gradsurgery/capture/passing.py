"""What a model passes between ranks by itself is refused, by name: rows are of one rank's graph.

As in tensor or sequence parallelism by hand, where a parameter's gradient is made on several ranks.
"""

import inspect
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradsurgery.capture.graph import is_of_mesh, ordered, roots
from gradsurgery.errors import InputError

# where Functions live that pass tensors between ranks, and what autograd calls such operations
PLACES = (
    "torch.distributed.nn.",
    "torch.distributed._functional_collectives",
    "torch.distributed.tensor.",
    "megatron.",
    "deepspeed.",
    "fairscale.",
    "colossalai.",
)
OPERATIONS = "GeneratedBackwardFor__c10d_functional_"
# torch's own that look as if they did: what they pass is none of the graph
OTHERS = ("torch.distributed.", "torch.nn.parallel.", "torch.utils.")
COLLECTIVES = {
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_tensor", "all_to_all"),
    *("all_to_all_single", "broadcast", "gather", "reduce", "reduce_scatter", "scatter"),
    *("reduce_scatter_tensor", "_all_gather_base", "_reduce_scatter_base", "batch_isend_irecv"),
    *("send", "recv", "isend", "irecv"),
}
DEPTH = 4  # calls within calls of a Function's code that are looked into


def several() -> bool:
    """Whether torch.distributed runs several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def collectives() -> tuple[int, ...]:
    """How many calls each group of this process has seen; () where one process runs."""
    groups: Any = dist.distributed_c10d._world.pg_map if several() else ()
    found = []
    for group in list(groups):
        with suppress(RuntimeError):  # of a backend that does not count
            found.append(group._get_sequence_number_for_group())
    return tuple(found)


class Looking(TorchDispatchMode):
    """Notes, in `name`, a collective that writes over a tensor that gradients flow through.

    Autograd does not see it: nothing of it is in the graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and args:
            written = (each for each in tree_leaves(args[0]) if isinstance(each, Tensor))
            if any(tensor.requires_grad for tensor in written):
                self.name = func._opname.strip("_")
        return func(*args, **(kwargs or {}))


def refuse_passing(losses: Tensor, meshes: bool = False) -> None:
    """Raise where the graph of the losses leads through other ranks.

    `meshes`: as DTensors do, is allowed.
    """
    if not losses.requires_grad or not several():
        return
    for node in ordered(roots(losses)[0]):
        name = _passes(node)
        if name is not None and not (meshes and is_of_mesh(node)):
            raise InputError(refused(f"losses: {name}"))


def refused(what: str) -> str:
    """What is said of that which passes tensors between ranks, and what to do instead."""
    return (
        f"{what} passes tensors between ranks, and rows are of what one rank computes: use a model "
        "whose forward pass needs no other rank, as a replica or one in DistributedDataParallel, "
        "and a loss of this rank's own samples"
    )


def _passes(node: Any) -> str | None:
    """The name of what passes tensors between ranks; None for what does not."""
    name = node.name()
    if name.startswith(OPERATIONS) and "wrap_tensor" not in name:
        return name.removeprefix(OPERATIONS).removesuffix("Backward").removesuffix("_default")
    made_by = getattr(type(node), "_forward_cls", None)
    return made_by.__name__ if made_by is not None and _function_passes(made_by) else None


@lru_cache(maxsize=1024)
def _function_passes(function: type) -> bool:
    place = f"{function.__module__}."
    if place.startswith(PLACES):
        return True
    if place.startswith(OTHERS):
        return False
    seen: set[CodeType] = set()
    each = (getattr(function, name, None) for name in ("forward", "backward", "vjp"))
    return any(_calls_collective(method, seen, DEPTH) for method in each)


def _calls_collective(function: Any, seen: set[CodeType], depth: int) -> bool:
    """Whether a function's code, or that of functions it names, names a collective of torch."""
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return False
    seen.add(function.__code__)
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    named = list(inspect.getclosurevars(function).globals.values())
    named += inspect.getclosurevars(function).nonlocals.values()
    modules = [value for value in named if isinstance(value, ModuleType)]
    if names & COLLECTIVES and (
        any(_of_torch(module.__name__) for module in modules)
        or any("distributed" in name.split(".") for name in names)
    ):
        return True
    own = [m for m in modules if not f"{m.__name__}.".startswith("torch.")]
    inside = [vars(m)[name] for m in own for name in names & vars(m).keys()]
    for value in (*named, *inside):
        if not isinstance(value, FunctionType):
            continue
        if _of_torch(value.__module__):
            if value.__name__ in COLLECTIVES:
                return True
        elif depth and _calls_collective(value, seen, depth - 1):
            return True
    return False


def _of_torch(module: str | None) -> bool:
    return f"{module}.".startswith("torch.distributed.")


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)
