"""Which implementation of an operator runs, and how it is registered with torch."""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _dispatch_keys, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from gradsurgery.errors import InputError

try:
    from gradsurgery import _C
except ImportError:  # a source tree that was never built: plain torch serves every operator
    _C = None

# torch brings it on Linux; its precisions and its float64 are those of NVIDIA's GPUs
TRITON = importlib.util.find_spec("triton") is not None and torch.version.hip is None
LIBRARY = torch.library.Library("gradsurgery", "DEF")
BACKENDS = ("torch", "native", "triton")

Implementations = dict[tuple[str, str], Callable]
OPERATORS: dict[str, Implementations] = {}


def _ordinary_keys() -> frozenset[int]:
    """Who torch's dispatcher would ask about a tensor of the CPU that is nothing else."""
    with torch.inference_mode():
        inferred = torch.empty(0, device="cpu")
    with torch.inference_mode(False):
        made = torch.empty(0, device="cpu")
    return frozenset(_dispatch_keys(tensor).raw_repr() for tensor in (made, inferred))


ORDINARY = _ordinary_keys()

# Triton's kernels are the GPU's, also where its interpreter runs them
KEYS = {"torch": ("torch", "any"), "triton": ("triton", "cuda")}


def choose(name: str, implementations: Implementations, device: str) -> Callable:
    """The implementation for a device type: native, else Triton, else plain torch.

    GRADSURGERY_BACKEND forces one, and then its absence is an error.
    """
    return implementations[key_of(name, implementations, device)]


def backend_of(name: str, device: str) -> str:
    """The backend that serves a registered operator on a device type: native, triton or torch."""
    return key_of(name, OPERATORS[name], device)[0]


def key_of(name: str, implementations: Implementations, device: str) -> tuple[str, str]:
    best = "native", device
    if best in implementations and native_available(device) and not _forced():
        return best
    forced, usable = _backends(device)
    for backend in usable:
        key = KEYS.get(backend) or (backend, device)
        if key in implementations:
            return key
    raise InputError(
        f"GRADSURGERY_BACKEND={forced}: {name} has no {forced} implementation for {device} here"
    )


def _backends(device: str) -> tuple[str, list[str]]:
    """The one that is forced, and those that can run on this type of device, best first."""
    forced = _forced()
    if forced and forced not in BACKENDS:
        raise InputError(f"GRADSURGERY_BACKEND={forced}: must be one of {', '.join(BACKENDS)}")
    usable = []
    if forced in ("", "native") and native_available(device):
        usable.append("native")
    if forced == "triton" or (not forced and device == "cuda"):
        usable += ["triton"] * triton_available(device)
    if forced in ("", "torch"):
        usable.append("torch")
    return forced, usable


def _forced() -> str:
    return os.environ.get("GRADSURGERY_BACKEND", "")


def native_available(device: str) -> bool:
    return _C is not None and (device != "cuda" or _C.cuda_version is not None)


def triton_available(device: str) -> bool:
    """Its interpreter serves any device, slowly."""
    if device == "cuda":
        return TRITON and _capable()
    return TRITON and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _capable() -> bool:
    """Whether the GPU, where there is one, is of a kind that the kernels are compiled for."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


def runs_triton(tensor: torch.Tensor, among: bool = False) -> bool:
    """Whether the kernels for this tensor are Triton's; `among`: if there are native ones too."""
    if not tensor.is_cuda and os.environ.get("GRADSURGERY_BACKEND") != "triton":
        return False
    usable = _backends(tensor.device.type)[1]
    return "triton" in (usable if among else usable[:1])


def runs_cuda(tensor: torch.Tensor) -> bool:
    """Whether the native kernels for this tensor are the CUDA ones.

    A test build compiles them for the host, and then they serve CPU tensors.
    """
    return tensor.is_cuda or (_C is not None and _C.cuda_version == "emulated")


def register(
    name: str,
    schema: str,
    implementations: Implementations,
    *,
    device_of: Callable[..., torch.device],
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Define gradsurgery::<name> and give it its kernels, its fake and its backward.

    `define` and `impl` rather than `custom_op`: a third of the cost of a call.
    """
    OPERATORS[name] = implementations
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))

    def kernel(*args: object) -> object:
        return choose(name, implementations, device_of(*args).type)(*args)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gradsurgery::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"gradsurgery::{name}",
        backward or functools.partial(_refuse, name),
        setup_context=setup_context,
        lib=LIBRARY,
    )
    torch.library.register_vmap(
        f"gradsurgery::{name}", functools.partial(_one_by_one, name), lib=LIBRARY
    )


def _one_by_one(name: str, info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """The operator on each sample that torch.func.vmap has, one after another."""
    if info.batch_size == 0:
        raise InputError(f"{name} inside torch.func.vmap needs a sample at least")
    operator = getattr(torch.ops.gradsurgery, name)
    found = [operator(*_sample(args, in_dims, i)) for i in range(info.batch_size)]
    flat, structures = zip(*map(pytree.tree_flatten, found), strict=True)
    stacked = [torch.stack(parts) for parts in zip(*flat, strict=True)]
    return (
        pytree.tree_unflatten(stacked, structures[0]),
        pytree.tree_unflatten([0] * len(stacked), structures[0]),
    )


def _sample(args: Any, dims: Any, i: int) -> Any:
    if isinstance(dims, (list, tuple)):
        return [_sample(arg, dim, i) for arg, dim in zip(args, dims, strict=True)]
    return args if dims is None else args.select(dims, i)


def call(name: str, *args: Any) -> Any:
    """The operator gradsurgery::<name>; on plain tensors of the CPU without torch's dispatcher.

    A small Gramian or solve takes a few microseconds, the way through the dispatcher forty.
    """
    if plain(args):
        return choose(name, OPERATORS[name], "cpu")(*args)
    return getattr(torch.ops.gradsurgery, name)(*args)


def plain(args: Sequence[Any]) -> bool:
    """Whether nobody but the kernel would see a call: no autograd, transform, mode, trace, ...

    `args` are tensors, lists of them, and what is neither.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and _len_torch_dispatch_stack() == 0
        and _len_torch_function_stack() == 0
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not _profiler_enabled()
        and _ordinary(args, torch.is_grad_enabled())
    )


def _ordinary(args: Sequence[Any], recorded: bool) -> bool:
    """Whether all tensors are torch's own, with memory on the CPU as it is read, and untracked."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if type(arg) is not torch.Tensor or (recorded and arg.requires_grad):
                return False
            if _dispatch_keys(arg).raw_repr() not in ORDINARY:  # negated, wrapped, fake, ...
                return False
        elif isinstance(arg, (list, tuple)) and not _ordinary(arg, recorded):
            return False
    return True


def _refuse(name: str, *_: object) -> None:
    """Without a backward, torch would warn and go on without a gradient."""
    raise InputError(f"{name} has no derivative here: detach its result or its arguments")
