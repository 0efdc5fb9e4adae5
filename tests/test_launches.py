"""What a step asks of a GPU, and that its branches for one compute what those for a CPU do.

A process of its own claims to have a GPU, whose work the CPU does: benchmarks/claimed_gpu.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

# a machine that installs a wheel may have no compiler, and the device is built by one; it stands in
# for kernels of Triton, which is for Linux alone
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++"
)

STEPS = """
import os
import sys
sys.path.insert(0, {benchmarks!r})
import claimed_gpu
import copy
import torch
from torch import nn
from gradsurgery.bench.models import MODELS, loss, transformer, with_lora
import gradsurgery as gs

from gradsurgery.capture import planner, together

if {native}:
    claimed_gpu.serve_native()
if {kept}:  # planes of the forget row, where pairs of tokens would cost less
    planner.KEEP["cuda"], planner.KEPT["cuda"], planner.PAIR["cuda"] = 0, planner.NO_LAUNCHES, 1e3
    together.PRODUCTS = 200  # of a few planes at a time
if {formed}:
    os.environ["GRADSURGERY_PATH"] = "direct"
bordered, several = together._bordered, []
together._bordered = lambda *args: several.append(len(args[1])) or bordered(*args)
form, together_formed = together.formed_gramians, []
together.formed_gramians = lambda *args: together_formed.append(len(args[0])) or form(*args)
torch.manual_seed(0)
torch.set_num_threads(1)


def tokens(batch):
    return torch.randint(0, 50, (batch, 12)), torch.randint(0, 50, (batch, 12))


def images(batch):
    return torch.randn(batch, 1, 16, 16), torch.randint(0, 10, (batch,))


def convolutions():
    def norm(channels):
        return nn.Sequential(nn.GroupNorm(4, channels), nn.ReLU())

    return nn.Sequential(
        nn.Conv2d(1, 24, 3, 2, 1, bias=False), norm(24),
        *(layer for _ in range(2) for layer in (nn.Conv2d(24, 24, 3, 2, 1, bias=False), norm(24))),
        nn.Conv2d(24, 24, 3, padding=1), norm(24), nn.Conv2d(24, 24, 3, padding=1), norm(24),
        nn.ConvTranspose2d(24, 16, 2, 2), nn.Conv2d(16, 32, 3, padding=1, groups=2),
        nn.Flatten(2), nn.Conv1d(32, 32, 3, padding=1), nn.RMSNorm(16),
        nn.Flatten(), nn.Linear(512, 10),
    )


models = {{
    "transformer": (transformer(64, 2, 50, 12), tokens),
    "LoRA": (with_lora(transformer(64, 2, 50, 12), 4), tokens),
    "CNN": (MODELS["CNN 0.1M"][0](), images),
    "convolutions": (convolutions(), images),
}}
rules = [gs.OrthoGrad(), gs.OrthoGrad(granularity="tensor", retain="mean"), gs.UPGrad()]
for name, (model, batches) in models.items():
    # the last time with products that float32 does not hold
    for rule, size in [*zip(rules, [1] * len(rules)), (gs.OrthoGrad(), 1e-22)]:
        given = [batches(6), batches(5)]
        ends = []
        for device in "cpu", "cuda":
            twin, mine = copy.deepcopy(model).to(device), copy.deepcopy(rule)
            held = [p for p in twin.parameters() if p.requires_grad]
            surgeon = gs.Surgeon(twin, torch.optim.SGD(held, lr=0.1 / size), mine)
            forget, retain = ([t.to(device) for t in batch] for batch in given)
            for _ in range(2):
                if isinstance(rule, gs.UPGrad):
                    surgeon.step(batch=retain, loss=loss)
                else:
                    scaled = lambda model, batch: loss(model, batch) * size
                    surgeon.step(forget=forget, retain=retain, loss=scaled)
            ends.append(torch.cat([p.detach().cpu().flatten() for p in held]))
        start = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        apart = (ends[1] - ends[0]).norm() / (ends[0] - start).norm()
        print(name, type(rule).__name__, float(apart))
        assert apart < 2e-5, (name, rule, apart)


assert (max(several, default=0) > 1) == {kept}
assert (max(together_formed, default=0) > 1) == {formed}


# what a rule remembers may be loaded there, though its Gramian is solved on the CPU
model, batches = models["transformer"]
batch = [t.to("cuda") for t in batches(5)]
twin = copy.deepcopy(model).to("cuda")
for rule in gs.GradVac(), gs.CRMOGM(rule=gs.UPGrad()):
    surgeon = gs.Surgeon(twin, torch.optim.SGD(twin.parameters(), lr=0.1), rule)
    surgeon.step(batch=batch, loss=loss)
    state = rule.state_dict()
    there = {{key: v if v.dtype == torch.uint8 else v.to("cuda") for key, v in state.items()}}
    rule.load_state_dict(there)
    surgeon.step(batch=batch, loss=loss)


# weights that are written to between two sums
for device in "cpu", "cuda":
    with gs.tape(twin) as tape:
        losses = loss(twin, batch)
    jacobian = tape.jacobian(losses)
    weights = torch.ones(len(losses), dtype=torch.float64, device=device)
    once = jacobian.combine(weights)
    weights *= 2
    for one, two in zip(once, jacobian.combine(weights), strict=True):
        assert torch.allclose(2 * one, two, rtol=1e-4, atol=1e-6), device


def one_lost(model, batch):
    found = loss(model, batch)
    return torch.where(torch.arange(len(found), device=found.device) == 3, found / 0, found)


model, batches = models["transformer"]
given = [batches(6), batches(5)]
said = []
for device in "cpu", "cuda":
    twin = copy.deepcopy(model).to(device)
    start = {{key: value.clone() for key, value in twin.state_dict().items()}}
    surgeon = gs.Surgeon(twin, torch.optim.SGD(twin.parameters(), lr=0.1), gs.UPGrad())
    try:
        surgeon.step(batch=[t.to(device) for t in given[0]], loss=one_lost)
    except gs.NonFiniteError as error:
        said.append(str(error))
    assert all(torch.equal(value, start[key]) for key, value in twin.state_dict().items())
assert said == ["losses: row 3 is not finite: inf"] * 2, said
"""


PROJECTIONS = """
import sys
sys.path.insert(0, {benchmarks!r})
import claimed_gpu
import warnings
import torch
import gradsurgery as gs
from gradsurgery.ops.project_out import PROMISE

if {native}:
    claimed_gpu.serve_native()
torch.manual_seed(0)
torch.set_num_threads(1)
base = torch.randn(6, 50000, dtype=torch.float64)
g = torch.randn(50000, dtype=torch.float64)


def replaced(i, row):
    rows = base.clone()
    rows[i] = row
    return rows


def large(x):
    return torch.where(torch.arange(50000) == 7, x, base[2])


cases = {{  # rows, gradient, options, waits where one look is enough
    "plain": (base, g, {{}}, 1),
    "one row": (base[:1], g, {{}}, 1),
    "seventeen": (torch.randn(17, 50000).double(), g, {{}}, 1),
    "few columns": (base[:, :90], g[:90], {{}}, 1),
    "refine=0": (base, g, dict(refine=0), 1),
    "badly scaled": (base * torch.tensor([1e-6, 1e6, 1, 1e3, 1e-3, 1])[:, None], g, {{}}, 1),
    "a duplicate": (replaced(4, base[1] * 2), g, {{}}, None),
    "nearly a duplicate": (replaced(4, base[1] + 1e-3 * base[2]), g, {{}}, None),
    "nearer": (replaced(4, base[1] + 1e-5 * base[2]), g, dict(refine=2), None),
    "a row of zeros": (replaced(3, 0.0), g, {{}}, None),
    "only zeros": (base * 0, g, {{}}, None),
    "gradient of zeros": (base, g * 0, {{}}, None),
    "gradient in the span": (base, base[2] - base[3], {{}}, None),
    "out of float32's range": (base * 1e-25, g * 1e-22, {{}}, None),
    "overflowing": (base, g * 2e36, {{}}, None),
    "out of float64's range": (base * 1e-200, g * 1e-170, {{}}, None),
    "NaN": (replaced(2, large(torch.nan)), g, {{}}, None),
    "infinity": (base, large(torch.inf), {{}}, None),
}}
steep = torch.full((1, 64), -0.9), torch.full((64,), 4e4)
steep[0][0, 0], steep[1][0] = 1, 6.5e4
cases |= {{f"overflowing float16, {{k}}": (*steep, dict(refine=k), None) for k in (0, 1)}}
for dtype in torch.float32, torch.float64, torch.bfloat16, torch.float16:
    for name, (rows, grad, options, most) in cases.items():
        if dtype != torch.float64 and "float64" in name:
            continue
        if dtype == torch.float16 and "float16" not in name:
            continue
        ends = []
        for device in "cpu", "cuda":
            given = grad.to(dtype).to(device), rows.to(dtype).to(device)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    with claimed_gpu.noted() as notes:
                        perp, info = gs.project_out(*given, return_info=True, **options)
                    ends.append((perp.cpu().double(), *(each.cpu() for each in info), len(said)))
                except gs.NonFiniteError as error:
                    ends.append(str(error))
            waits = [note for note in notes if "_local_scalar_dense" in note]
        what = name, dtype, ends
        if isinstance(ends[0], str):
            assert ends[1] == ends[0], what
            continue
        (perp, rank, kept, worst, said), found = ends
        assert found[1] == rank and found[4] == said, what
        near = 1e-12 if dtype == torch.float64 else PROMISE[dtype] / 10
        near = max(near, 10 * float(worst))  # what is left of a row is rounding, and no more like
        assert (found[0] - perp).norm() <= near * perp.norm(), what
        assert abs(found[2] - kept) <= near and found[3] <= max(worst * 2, PROMISE[dtype]), what
        if most is not None:
            assert len(waits) == most, (what, waits)
"""


MEMORY_OF_A_FUNCTION = """
import sys
sys.path.insert(0, {benchmarks!r})
import claimed_gpu
import copy
import torch
from torch import nn
import gradsurgery as gs

given = {{}}  # the one memory, by device, in which all gradients are handed over


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return given.setdefault(grad.device, torch.empty_like(grad)).copy_(grad).mul_(2)


class Double(nn.Module):
    def forward(self, x):
        return Doubled.apply(x)


torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), Double(),
    nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), Double(),
    nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, 4),
).double()
images, found = torch.randn(5, 3, 6, 6).double(), []
for device in "cpu", "cuda":
    twin = copy.deepcopy(model).to(device)
    with gs.tape(twin) as tape:
        losses = twin(images.to(device)).square().sum(1)
    found.append(tape.jacobian(losses).gramian(per="tensor").cpu())
assert torch.allclose(*found, rtol=1e-9), [each.diagonal(0, 1, 2) for each in found]
"""


def test_the_device_built_for_one_environment_serves_another_with_the_same_torch(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "torch").symlink_to(Path(torch.__file__).parent)
    code = "import claimed_gpu, torch; torch.ones(3, device='cuda'); print(torch.__file__)"
    path = [str(BENCHMARKS), str(ROOT)]

    def run(*path):
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, capture_output=True, text=True, env=env)
        assert found.returncode == 0, found.stderr
        return found.stdout

    assert str(elsewhere) in run(str(elsewhere), *path)
    shutil.rmtree(elsewhere)
    assert str(elsewhere) not in run(*path)
    assert len(list(tmp_path.glob("gradsurgery-claimed-gpu-*/*.so"))) == 1


def test_memory_that_a_function_uses_again_holds_no_gradients_of_norms():
    code = MEMORY_OF_A_FUNCTION.format(benchmarks=str(BENCHMARKS))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("native", [True, False], ids=["CUDA C++", "Triton"])
def test_projections_are_the_same_on_a_gpu_and_wait_once(native):
    code = PROJECTIONS.format(benchmarks=str(BENCHMARKS), native=native)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    "native,kept,formed", [(True, False, False), (False, False, False), (True, True, False),
                           (True, False, True), (False, False, True)],
    ids=["CUDA C++", "Triton", "planes that are kept", "planes that are formed",
         "planes that are formed, Triton"],
)  # fmt: skip
def test_a_step_takes_the_same_update_on_a_gpu(native, kept, formed):
    code = STEPS.format(benchmarks=str(BENCHMARKS), native=native, kept=kept, formed=formed)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


def test_no_step_asks_more_of_a_gpu_than_it_did(tmp_path):
    """Launches of torch 2.13's operations; a wait is the same in every version."""
    most = {  # launches and waits of a step, and its memory in a plain one's
        "MLP 6.3M": (74, 1, 1.03),
        "LoRA 384x6 T64": (376, 1, 1.06),
        "transformer 384x6 T64": (248, 1, 1.24),
        "ResNet-18 GN": (372, 1, 1.17),
    }
    file = tmp_path / "counts.json"
    command = [sys.executable, BENCHMARKS / "launches.py", *most, "--json", file]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    for name, counts in json.loads(file.read_text()).items():
        assert 0 < counts["plain"] < counts["step"], name
        launches, waits, memory = most[name]
        assert counts["step"] <= launches, name
        assert counts["waits"] <= waits, name
        assert counts["bytes"][1] <= memory * counts["bytes"][0], name
        assert sum(part["launches"] for part in counts["phases"].values()) == counts["step"]
