"""A GPU that is not there: what a step asks of one is noted, and the CPU computes it.

Tensors on "cuda" are plain ones in the CPU's memory, so the branches for a GPU run, and what they
compute is exact. Import this before torch, which looks for a GPU once. For processes that do
nothing else: torch.cuda.is_available() stays False, and nothing gives the device back.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")


def _load() -> None:
    """The device, built where it has not been from this source and a torch of this version.

    It names no folder of torch, which the next process may have elsewhere: torch is loaded before.
    """
    (torch,) = importlib.util.find_spec("torch").submodule_search_locations
    key = SOURCE.read_bytes() + (Path(torch) / "version.py").read_bytes()
    folder = Path(tempfile.gettempdir()) / f"gradsurgery-claimed-gpu-{os.getuid()}"
    built = folder / f"{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not built.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        new = built.with_suffix(f".{os.getpid()}")
        include = [f"-isystem{torch}/include", f"-isystem{torch}/include/torch/csrc/api/include"]
        link = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
        compiler = os.environ.get("CXX", "g++")
        subprocess.run(
            [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", *include, SOURCE, *link, "-o", new],
            check=True,
        )
        new.rename(built)
    ctypes.CDLL(f"{torch}/lib/libtorch_cpu.so", mode=os.RTLD_GLOBAL)
    ctypes.CDLL(str(built), mode=os.RTLD_GLOBAL)


if "torch" in sys.modules:
    raise ImportError("claimed_gpu must be imported before torch, which looks for a GPU once")
_load()

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from gradsurgery.capture import gramians, together
from gradsurgery.ops._backend import _C
from gradsurgery.ops.combine import combine_into
from gradsurgery.ops.combine_tokens import combine_tokens_reference
from gradsurgery.ops.formed_gramian import formed_gramian_reference
from gradsurgery.ops.patches import Window, patches_reference
from gradsurgery.ops.row_sums import Summand, summed
from gradsurgery.ops.token_gramian import token_gramian_reference

OPS = torch.ops.claimed_gpu
PER_LAUNCH = 80  # tensors in the table of one launch: csrc/rows.h
_computes = True


@contextmanager
def noted() -> Iterator[list[str]]:
    """A list, which after the block holds what it asked of the GPU, in order."""
    found: list[str] = []
    OPS.notes(True)
    try:
        yield found
    finally:
        found += OPS.notes(False)


@contextmanager
def hollow(above: int = 4096) -> Iterator[None]:
    """Inside, no operation on more values is computed: its results are zero."""
    global _computes
    OPS.hollow(above)
    _computes = False
    try:
        yield
    finally:
        OPS.hollow(-1)
        _computes = True


@contextmanager
def weighed() -> Iterator[list[int]]:
    """A list, to which the block adds how many bytes more were taken inside than before, at most.

    Of hollow operations alone: what is computed is in memory of the CPU's.
    """
    found: list[int] = []
    before, _ = OPS.memory()
    yield found
    found.append(OPS.memory()[1] - before)


def on_cpu(value: Any) -> Any:
    """The same memory, of tensors in lists, too."""
    if isinstance(value, Tensor):
        return OPS.on_cpu(value) if value.is_cuda else value
    return [on_cpu(each) for each in value] if isinstance(value, (list, tuple)) else value


# -- torch's own questions of a GPU

torch.cuda._initialized = True  # nothing is left to be set up
torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
torch.cuda.device_of = torch.cuda.device = lambda _: nullcontext()
torch.cuda.synchronize = lambda device=None: OPS.note("synchronize")


class Event:
    """Whether its place was reached; who asks waits, but where the host has waited since."""

    made = 0

    def record(self, stream: object = None) -> None:
        Event.made += 1
        self.number = Event.made
        OPS.note(f"record {self.number}")

    def synchronize(self) -> None:
        OPS.note(f"await {self.number}")


torch.cuda.Event, torch.cuda.current_stream = Event, lambda device=None: None


# -- attention, which a GPU has in one operation each way, and a CPU in others

ATTENTION = torch.library.Library("aten", "IMPL")
CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _attention(q, k, v, bias, lse, dropout_p=0.0, is_causal=False, *, scale=None):
    out, lse = CPU(q, k, v, dropout_p, is_causal, attn_mask=bias, scale=scale)
    seed = torch.empty(0, dtype=torch.int64)
    return out, lse, seed, seed


def _attention_backward(
    grad, q, k, v, bias, out, lse, seed, offset, dropout_p, mask, is_causal=False, *, scale=None
):
    given = (grad, q, k, v, out, lse, dropout_p, is_causal)
    return *CPU_BACKWARD(*given, attn_mask=bias, scale=scale), None


def _chosen(q, k, v, bias=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    if enable_gqa:
        k, v = (side.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for side in (k, v))
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(bias.logical_not(), -torch.inf)
    if bias is not None:
        bias = bias.expand(*q.shape[:-1], k.shape[-2])
    given, kept = (q, k, v, bias), any(side.requires_grad for side in (q, k, v))
    served = torch.ops.aten._scaled_dot_product_efficient_attention
    return served(*given, kept, dropout_p, is_causal, scale=scale)[0]


for key in ("CUDA", "AutogradCUDA"):
    ATTENTION.impl("scaled_dot_product_attention", _chosen, key)
ATTENTION.impl("_scaled_dot_product_efficient_attention", _attention, "CUDA")
ATTENTION.impl("_scaled_dot_product_efficient_attention_backward", _attention_backward, "CUDA")


# -- CUDA C++ kernels, and what the CPU's compute in their place


def _tables(*sources: Sequence[Sequence[Tensor]]) -> int:
    return -(-sum(len(blocks) for each in sources for blocks in each) // PER_LAUNCH)


def _gramian(sources: Any, out: Tensor, scratch: Tensor, precise: bool, repeat: bool) -> None:
    # twice where float32 may not do, the second looks at a flag of the first; tensor cores multiply
    # few rows of float32 in float64
    m, dtype = len(out), sources[0][0].dtype
    once = not repeat or dtype == torch.float64 or (4 < m <= 17 and dtype == torch.float32)
    _launched("gramian", (1 if once else 2) * (_tables(sources) + 1 + (m in (9, 17))))
    if _computes:
        _compute_gramian(on_cpu(sources), on_cpu(out), precise, repeat)
    else:
        _orthonormal(out)


def _compute_gramian(sources: Any, out: Tensor, precise: bool, repeat: bool) -> None:
    if repeat or precise or sources[0][0].dtype == torch.float64:
        _C.gramian_cpu(sources, out, precise, 1)
    else:  # nothing is put right that float32 does not hold
        rows = torch.cat([torch.cat(blocks).float() for blocks in zip(*sources, strict=True)], 1)
        slices = [part @ part.mT for part in rows.split(32, 1)]
        out.copy_(torch.stack(slices).double().sum(0))


def _border(sources: Any, out: Tensor, scratch: Tensor) -> None:
    _launched("gramian_border", _tables(sources) + 1)
    if _computes:
        whole = on_cpu(out).clone()
        _C.gramian_cpu(on_cpu(sources), whole, True, 1)
        on_cpu(out)[-1], on_cpu(out)[:, -1] = whole[-1], whole[:, -1]


def _combine(sources: Any, weights: Tensor, outs: Any, cross: Any, gram: Any, scratch: Any) -> None:
    launches, (p, m) = _tables(sources, outs), weights.shape
    if scratch is not None:  # products: of one sum of few rows in the same read
        few = p == 1 and 4 < m + 1 <= 18
        launches = launches + 1 if few else 3 * launches + 2
    _launched("combine", launches)
    if _computes:
        _C.combine_cpu(*on_cpu([sources, weights, outs, cross, gram]), True, 1)


def _orthonormal(gramian: Tensor) -> None:
    """Of a hollow run: rows of zeros would be looked at once more, for values lost to underflow."""
    on_cpu(gramian).copy_(torch.eye(*gramian.shape[-2:]))


def _launched(name: str, count: int = 1) -> None:
    for _ in range(count):
        OPS.note(f"kernel {name}")


def _solve(problem: str) -> Callable[..., None]:
    def solve(*args: Any) -> None:
        _launched(problem)
        scratch = max(i for i, each in enumerate(args) if isinstance(each, Tensor))
        if _computes:
            getattr(_C, f"{problem}_cpu")(*on_cpu([*args[:scratch], *args[scratch + 1 :]]), 1)

    return solve


PROBLEMS = (
    "projection_weights", "cone_weights", "conflict_averse_weights", "deconflict_weights",
    "bargaining_weights", "eigen",
)  # fmt: skip


def serve_native() -> None:
    """From here on the GPU has the CUDA C++ kernels; without this it has Triton's alone."""
    _C.cuda_version = "claimed"
    _C.gramian_cuda, _C.gramian_border_cuda, _C.combine_cuda = _gramian, _border, _combine
    _C.gramian_scratch = lambda m: 1
    _C.weighting_scratch = lambda problem, count, m: 1
    for problem in PROBLEMS:
        setattr(_C, f"{problem}_cuda", _solve(problem))


# -- Triton's kernels, and what the CPU's compute in their place


def _run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    OPS.note(f"kernel {kernel.fn.__name__}")


def _after(module: str, name: str, compute: Callable[..., Any]) -> None:
    """Let a kernel's host code be followed by the same on the CPU."""
    kernels = importlib.import_module(f"gradsurgery.kernels.{module}")
    launch = getattr(kernels, name)

    def served(*args: Any) -> Any:
        out = launch(*args)
        if _computes:
            found = compute(*on_cpu(args))
            if out is not None:
                on_cpu(out).copy_(found)
        elif out is not None and out.dtype == torch.float64 and out.shape[-2] == out.shape[-1]:
            _orthonormal(out)
        return out

    setattr(kernels, name, served)


def _formed(left: Tensor, right: Tensor, offsets: Tensor, kept: Any, stored: Any) -> Tensor:
    ends = offsets.tolist()
    rows = [slice(*pair) for pair in pairwise(ends)]
    sides = [[side[None, row] for row in rows] for side in (left, right)]
    return formed_gramian_reference(*sides, torch.arange(len(rows)).split(1), len(rows), kept)


def _of_addresses(kernel: Callable) -> Callable:
    """Given the sides of one plane, and where those of the others are: compute for each."""

    def compute(*args: Any) -> Any:
        *shown, addresses = args
        return kernel(*shown, addresses.tolist())

    return compute


def _at(like: Tensor, address: int) -> Tensor:
    """A tensor laid out as another, elsewhere in memory."""
    count = sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True)) + 1
    memory = (ctypes.c_char * (count * like.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


def _token_gramians(left: Tensor, right: Tensor, addresses: list[list[int]]) -> Tensor:
    pairs = zip(*addresses, strict=True)
    return torch.stack([token_gramian_reference(_at(left, a), _at(right, b)) for a, b in pairs])


def _combine_tokens_of(
    left: Tensor, right: Tensor, weights: Tensor, out: Tensor, addresses: list[list[int]]
) -> None:
    for (a, b, to), mine in zip(zip(*addresses, strict=True), weights, strict=True):
        combine_tokens_reference(_at(left, a), _at(right, b), mine, _at(out, to), 0)


def _rows_gramian(sources: Any, precise: bool = False, repeat: bool = True) -> Tensor:
    m = sum(len(source[0]) for source in sources)
    out = torch.empty(m, m, dtype=torch.float64, device="cpu")
    _compute_gramian(sources, out, precise, repeat)
    return out


def _row_sums(tensors: list[Tensor | None], each: int, dtype: torch.dtype, table: Tensor) -> Tensor:
    def summed_at(places: list[int]) -> Tensor:
        found = [t if t is None else _at(t, a) for t, a in zip(tensors, places, strict=True)]
        return summed(Summand(*found, each=each))

    return torch.stack([summed_at(places) for places in table.T.tolist()]).to(dtype)


def _patches(images: Tensor, window: list[list[int]], places: Tensor | None) -> Tensor:
    known = [images] if places is None else [_at(images, place) for place in places.tolist()]
    return torch.stack(patches_reference(known, Window(*map(tuple, window))))


def _gramians(*args: Any) -> Any:
    found = together.gramians(*args)
    for gram in () if _computes else found:
        _orthonormal(gram)
    return found


gramians.gramians = _gramians
JITFunction.run = _run
_C.cuda_version = None
_after("gramian", "gramian", _rows_gramian)
_after("combine", "combine_into", combine_into)
_after("combine_tokens", "combine_tokens", combine_tokens_reference)
_after("formed_gramian", "formed_gramian", _formed)
_after("token_gramian", "token_gramian", token_gramian_reference)
_after("token_gramian", "token_gramians", _of_addresses(_token_gramians))
_after("patches", "patches", _patches)
_after("row_sums", "row_sums", _row_sums)
_after("combine_tokens", "combine_tokens_of", _of_addresses(_combine_tokens_of))
