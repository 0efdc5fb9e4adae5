"""What a step asks of a GPU, and that its branches for one compute what those for a CPU do.

A process of its own claims to have a GPU, whose work the CPU does: benchmarks/claimed_gpu.py.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

# a machine that installs a wheel may have no compiler, and the device is built by one
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

STEPS = """
import sys
sys.path.insert(0, {benchmarks!r})
import claimed_gpu
import copy
import torch
from torch import nn
from models import MODELS, loss, transformer, with_lora
import gradsurgery as gs

from gradsurgery.capture import planner, together

if {native}:
    claimed_gpu.serve_native()
if {kept}:  # planes of the forget row, where pairs of tokens would cost less
    planner.KEEP["cuda"], planner.KEPT["cuda"], planner.PAIR["cuda"] = 0, 0, 1e3
bordered, several = together._bordered, []
together._bordered = lambda *args: several.append(len(args[1])) or bordered(*args)
torch.manual_seed(0)
torch.set_num_threads(1)


def tokens(batch):
    return torch.randint(0, 50, (batch, 12)), torch.randint(0, 50, (batch, 12))


def images(batch):
    return torch.randn(batch, 1, 16, 16), torch.randint(0, 10, (batch,))


models = {{
    "transformer": (transformer(64, 2, 50, 12), tokens),
    "LoRA": (with_lora(transformer(64, 2, 50, 12), 4), tokens),
    "CNN": (MODELS["CNN 0.1M"][0](), images),
}}
rules = gs.OrthoGrad(), gs.OrthoGrad(granularity="tensor", retain="mean"), gs.UPGrad()
for name, (model, batches) in models.items():
    for rule in rules:
        given = [batches(6), batches(5)]
        ends = []
        for device in "cpu", "cuda":
            twin, mine = copy.deepcopy(model).to(device), copy.deepcopy(rule)
            held = [p for p in twin.parameters() if p.requires_grad]
            surgeon = gs.Surgeon(twin, torch.optim.SGD(held, lr=0.1), mine)
            forget, retain = ([t.to(device) for t in batch] for batch in given)
            for _ in range(2):
                if isinstance(rule, gs.UPGrad):
                    surgeon.step(batch=retain, loss=loss)
                else:
                    surgeon.step(forget=forget, retain=retain, loss=loss)
            ends.append(torch.cat([p.detach().cpu().flatten() for p in held]))
        start = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        apart = (ends[1] - ends[0]).norm() / (ends[0] - start).norm()
        print(name, type(rule).__name__, float(apart))
        assert apart < 2e-5, (name, rule, apart)


assert (max(several, default=0) > 1) == {kept}


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


@pytest.mark.parametrize(
    "native,kept", [(True, False), (False, False), (True, True)],
    ids=["CUDA C++", "Triton", "planes that are kept"],
)  # fmt: skip
def test_a_step_takes_the_same_update_on_a_gpu(native, kept):
    code = STEPS.format(benchmarks=str(BENCHMARKS), native=native, kept=kept)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


def test_no_step_asks_more_of_a_gpu_than_it_did(tmp_path):
    """Launches of torch 2.13's operations; a wait is the same in every version."""
    most = {  # launches and waits of a step
        "MLP 6.3M": (81, 1),
        "LoRA 384x6 T64": (377, 1),
        "transformer 384x6 T64": (347, 1),
    }
    file = tmp_path / "counts.json"
    command = [sys.executable, BENCHMARKS / "launches.py", *most, "--json", file]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    for name, counts in json.loads(file.read_text()).items():
        assert 0 < counts["plain"] < counts["step"], name
        launches, waits = most[name]
        assert counts["step"] <= launches, name
        assert counts["waits"] <= waits, name
        assert sum(part["launches"] for part in counts["phases"].values()) == counts["step"]
