"""Triton's kernels, compiled ahead of time for every GPU generation: they fit, and do not spill.

The launches are those of the host code, for tensors that have shapes and no memory.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.conftest import INTERPRETED

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

# these import Triton: only once it is known to be there
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gradsurgery.kernels import (  # noqa: E402
    combine,
    combine_tokens,
    formed_gramian,
    gramian,
    patches,
    row_sums,
    token_gramian,
)
from gradsurgery.kernels.tiles import precision  # noqa: E402
from gradsurgery.ops.formed_gramian import stored_dtype  # noqa: E402

# shared memory of a block in bytes, and matrix instructions of tiles with 64 rows
CHIPS = {80: (163 << 10, "mma.sync"), 90: (227 << 10, "wgmma"), 100: (227 << 10, "tcgen05.mma")}
# bytes of a thread: ptxas parks a few constants of a loop where one more block of threads then fits
PARKED = 32
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


class Launch(NamedTuple):
    kernel: object
    grid: tuple
    signature: dict
    constants: dict
    attributes: dict
    options: dict

    def constant(self, name):
        names = [parameter.name for parameter in self.kernel.params]
        return self.constants.get((names.index(name),)) if name in names else None


class Recorder:
    """Stands where a kernel stands, and notes how it is launched."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append(self.launch(grid, args, options))

    def launch(self, grid, args, options):
        signature, constants, attributes = {}, {}, {}
        for k, (parameter, value) in enumerate(zip(self.kernel.params, args, strict=True)):
            if parameter.is_constexpr:
                signature[parameter.name], constants[k,] = "constexpr", value
            else:
                signature[parameter.name] = self.type_of(value, (k,), constants, attributes)
        return Launch(self.kernel, grid, signature, constants, attributes, options)

    def type_of(self, value, path, constants, attributes):
        """As Triton specializes: ones are constants, multiples of 16 and aligned memory known."""
        if isinstance(value, tuple):
            parts = enumerate(value)
            return tuple(self.type_of(v, (*path, k), constants, attributes) for k, v in parts)
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if value == 1:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"


@pytest.fixture
def launches(monkeypatch):
    """All launches of a call, of every kernel."""
    recorders = []
    for module, name in (
        (token_gramian, "token_gramian_kernel"),
        (formed_gramian, "formed_gramian_kernel"),
        (combine_tokens, "combine_tokens_kernel"),
        (gramian, "gramian_kernel"),
        (combine, "combine_kernel"),
        (row_sums, "row_sums_kernel"),
        (patches, "patches_kernel"),
    ):
        recorders.append(Recorder(getattr(module, name)))
        monkeypatch.setattr(module, name, recorders[-1])

    def of(call):
        call()
        return [launch for recorder in recorders for launch in recorder.launches]

    return of


def compile_for(launch, chip):
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = GPUTarget("cuda", chip, 32)
    return triton.compile(source, target=target, options=launch.options)


def spilled(compiled, folder):
    """Bytes of a thread's values that are kept in memory for want of registers."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "-res-usage", binary]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return max(int(count) for count in re.findall(r"(?:STACK|LOCAL):(\d+)", report))


def meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def tokens(n, t, a, b, dtype):
    return meta(n, t, a, dtype=dtype), meta(n, t, b, dtype=dtype)


def rows(m, n, dtype):
    return [[meta(m, n, dtype=dtype)], [meta(1, n, dtype=dtype)]]


def weights(*shape):
    return meta(*shape, dtype=torch.float64)


def formed(left, right, count, kept=None):
    """As the operator calls it."""
    offsets, stored = meta(count + 1, dtype=torch.int64), stored_dtype(left, right)
    return formed_gramian.formed_gramian(left, right, offsets, kept, stored)


def normed(values, means, each, given=4):
    """Sums of 13 parameters, of which the first factors are there."""
    dtype = values.dtype if values.dtype == torch.float64 else torch.float32
    kind = values.dtype if given < 3 else dtype
    tensors = [values, values, means, means][:given] + [None] * (4 - given)
    return row_sums.row_sums(tensors, each, kind, meta(4, 13, dtype=torch.int64))


def statistics(n, t, c, dtype, d=torch.float32):
    return meta(n, 1, c, dtype=d if dtype.itemsize == 2 else dtype).expand(n, t, c)


LARGE = torch.bfloat16, torch.float32, torch.float64
CALLS = {
    # samples that fill tiles, that share one, and with one token; odd widths; few of all
    "token_gramian": [
        lambda d: token_gramian.token_gramian(*tokens(16, 1024, 4096, 4096, d)),
        lambda d: token_gramian.token_gramian(*tokens(256, 16, 4096, 1024, d)),
        lambda d: token_gramian.token_gramian(*tokens(4096, 1, 2048, 2048, d)),
        lambda d: token_gramian.token_gramian(*tokens(9, 13, 1001, 77, d)),
        lambda d: token_gramian.token_gramian(*tokens(16, 1000, 4095, 77, d)),
        lambda d: token_gramian.token_gramian(
            *tokens(16, 64, 768, 768, d), *tokens(1, 900, 768, 768, d)
        ),
    ],
    "token_gramian of several planes": [
        lambda d, n=n, t=t, a=a, b=b: token_gramian.token_gramians(
            *tokens(n, t, a, b, d), meta(2, 16, dtype=torch.int64)
        )
        for n, t, a, b in ((16, 1024, 4096, 4096), (32, 64, 384, 1536), (9, 13, 1000, 72))
    ],
    "token_gramian of picked rows": [
        lambda d: token_gramian.token_gramian(
            meta(32, 256, dtype=torch.int64), meta(32, 256, 2048, dtype=d)
        ),
        lambda d: token_gramian.token_gramian(
            meta(3, 5, dtype=torch.int64), meta(3, 5, 7, dtype=d)
        ),
    ],
    "formed_gramian": [
        lambda d, m=m, kept=kept, side=side: formed(
            meta(2000, side, dtype=d), meta(2000, side, dtype=d), m,
            meta(side, side, dtype=d) if kept else None,
        )
        for m in (16, 32, 63) for kept in (False, True) for side in (2048, 251)
    ],
    "combine_tokens": [
        lambda d, beta=beta, a=a, b=b: combine_tokens.combine_tokens(
            *tokens(32, 256, a, b, d), weights(32), meta(a, b, dtype=d), beta
        )
        for beta in (0.0, 0.5) for a, b in ((8192, 2048), (512, 512), (2047, 8191), (16, 4096))
    ],
    "combine_tokens of several planes": [
        lambda d, a=a, b=b: combine_tokens.combine_tokens_of(
            *tokens(32, 64, a, b, d), weights(16, 32), meta(a, b, dtype=d),
            meta(3, 16, dtype=torch.int64),
        )
        for a, b in ((384, 1536), (1000, 72))
    ],
    "gramian": [
        lambda d, m=m, n=n, precise=precise: gramian.gramian(rows(m, n, d), precise)
        for m in (7, 31, 63, 255) for n in (1 << 22, (1 << 20) + 3) for precise in (False, True)
    ],
    "combine": [
        lambda d, p=p: combine.combine_into(
            rows(16, 1 << 22, d), weights(p, 17), [[meta(p, 1 << 22, dtype=d)]]
        )
        for p in (1, 2, 3, 4)
    ],
    "patches": [
        lambda d, side=side, channels=channels, table=table: patches.patches(
            meta(32, 1, channels, side, side, dtype=d),
            ((3, 3), (2, 2), (1, 1), (1, 1), (side // 2, side // 2)),
            meta(3, dtype=torch.int64) if table else None,
        )
        for side, channels in ((32, 64), (7, 3)) for table in (False, True)
    ],
    # layer norms, RMS norms and biases; group norms of images
    "row_sums": [
        lambda d, given=given, c=c: normed(
            meta(32, 256, c, dtype=d), statistics(32, 256, 1, d).expand(32, 256, c), 1, given
        )
        for given in (1, 2, 4) for c in (4096, 77)
    ] + [
        lambda d, given=given, t=t: normed(
            meta(32, 256, t, dtype=d).mT, statistics(32, t, 32, d), 8, given
        )
        for given in (1, 4) for t in (1024, 49)
    ],
}  # fmt: skip


def distinct(launches):
    return {
        str((x.kernel, x.signature, x.constants, x.attributes, x.options)): x for x in launches
    }.values()


@pytest.mark.parametrize("dtype", LARGE, ids=["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", CALLS)
def test_fits_and_does_not_spill(name, chip, dtype, launches, tmp_path):
    shared, instruction = CHIPS[chip]
    failures = []
    for k, launch in enumerate(distinct(launches(lambda: [call(dtype) for call in CALLS[name]]))):
        compiled = compile_for(launch, chip)
        lost = spilled(compiled, tmp_path)
        if lost > PARKED or compiled.metadata.shared > shared:
            failures.append((k, launch.constants, launch.options, lost, compiled.metadata.shared))
        code = compiled.asm["ptx"]
        if dtype == torch.float64 or launch.constant("PRECISE"):
            continue  # a version may or may not know instructions for float64
        if name.startswith(("token_gramian", "combine_tokens")):
            assert instruction in code, f"{launch.constants} without {instruction}"
        elif name not in ("combine", "row_sums", "patches"):
            assert re.search(r"mma\.sync|wgmma|tcgen05\.mma", code)
    assert not failures, "\n".join(map(str, failures))


def test_float16_fits_too(launches, tmp_path):
    calls = [CALLS[name][0] for name in CALLS] + CALLS["combine_tokens"]
    for launch in distinct(launches(lambda: [call(torch.float16) for call in calls])):
        assert spilled(compile_for(launch, 90), tmp_path) <= PARKED


@pytest.mark.parametrize("setting", ["legacy", "newer"])
def test_tf32_is_taken_where_torch_allows_it(setting):
    before = torch.backends.cuda.matmul.fp32_precision
    assert precision(torch.float32) == "tf32x3"
    try:
        if setting == "legacy":
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert precision(torch.float32) == "tf32"
        assert precision(torch.bfloat16) == "ieee"
    finally:
        if setting == "legacy":
            torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before
    assert precision(torch.float32) == "tf32x3"


def test_grids_are_in_range(launches):
    huge = [
        lambda d: token_gramian.token_gramian(*tokens(100_000, 1, 8, 8, d)),
        lambda d: token_gramian.token_gramian(
            meta(4, 512, 90, 8, dtype=d), meta(4, 512, 90, 8, dtype=d)
        ),
        lambda d: combine_tokens.combine_tokens(
            *tokens(2, 2, 1 << 20, 1 << 17, d), weights(2), meta(1 << 20, 1 << 17, dtype=d), 0.0
        ),
        lambda d: gramian.gramian([[meta(3000, 1 << 33, dtype=d)]]),
        lambda d: combine.combine_into(
            rows(2, 1 << 33, d), weights(1, 3), [[meta(1, 1 << 33, dtype=d)]]
        ),
        lambda d: formed(
            meta(1 << 22, 1 << 16, dtype=d), meta(1 << 22, 1 << 16, dtype=d), 64
        ),
        lambda d: patches.patches(
            meta(256, 1, 512, 256, 256, dtype=d), ((3, 3), *[(1, 1)] * 3, (256, 256)), None
        ),
        lambda d: normed(meta(1 << 20, 4, 1 << 14, dtype=d), None, 1, 1),
    ]  # fmt: skip
    for launch in launches(lambda: [call(torch.bfloat16) for call in huge]):
        grid = (*launch.grid, 1, 1)[:3]
        assert 0 < grid[0] < 2**31, launch
        assert 0 < grid[1] < 2**16, launch
        assert 0 < grid[2] < 2**16, launch


@pytest.mark.parametrize("m", [1, 16, 17, 64])
@pytest.mark.parametrize("dtype", LARGE, ids=["bfloat16", "float32", "float64"])
def test_tiles_of_planes_stay_in_the_cache(m, dtype, launches):
    sides = meta(4096, 4096, dtype=dtype), meta(4096, 4096, dtype=dtype)
    (launch,) = launches(lambda: formed(*sides, m))
    _, high, wide = formed_gramian.tile_of(m, dtype, dtype)[:3]
    assert launch.grid[0] * m * high * wide * dtype.itemsize <= formed_gramian.BUFFER
    assert launch.grid[0] >= 64
