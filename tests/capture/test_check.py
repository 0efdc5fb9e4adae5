"""gs.check on models that are right, wrong, refused, slow, frozen; what it leaves as it was."""

import functools
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradsurgery as gs
from gradsurgery import grads
from gradsurgery.capture import FactoredJacobian, formulas, leaves
from tests.capture.zoo import ZOO, make
from tests.models import assert_same_state, state_of

ROOT = Path(__file__).resolve().parents[2]
SOME = ["mlp glu", "small cnn", "embedding tied to head", "gru", "weight norm", "unused layers"]


def classify(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def digits(size, dtype=torch.float64):
    return torch.randn(size, 6, dtype=dtype), torch.randint(3, (size,))


def mlp(*between):
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Tanh(), nn.Linear(8, 3)).double()


def taken(model, batch, loss, groups=None):
    """The path of every parameter as the whole batch's Jacobian has it."""
    with gs.tape(model) as tape:
        jacobian = tape.jacobian(loss(model, batch), groups)
    derived = {id(p) for part in jacobian._derived for p in part.parameters}
    found = {}
    for name, p, plane in zip(jacobian.names, jacobian.parameters, jacobian._planes, strict=True):
        path = "stored rows" if plane is None or plane.plan is None else plane.plan.path
        path = "stored rows" if id(p) in derived else path
        found[name] = "not reached" if plane is None and id(p) not in derived else path
    return found


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_rows_are_exact(name, dtype):
    model, batch = make(name, dtype=dtype)
    checked = gs.check(model, batch, loss=ZOO[name].loss)
    assert checked.exact
    assert checked.refused is None
    assert checked.rtol == {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    assert max(checked.gramian_error, checked.update_error) <= checked.rtol / 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["mlp glu", "embedding tied to head"])
def test_16_bits_are_held_to_roundings(name, dtype):
    model, batch = make(name, dtype=dtype)
    checked = gs.check(model, batch, loss=ZOO[name].loss)
    assert checked.exact
    assert checked.rtol <= 5 * torch.finfo(dtype).eps


def test_autocast_counts_as_16_bits():
    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1], reduction="none")

    checked = gs.check(mlp().float(), digits(4, torch.float32), loss=loss)
    assert checked.exact
    assert checked.rtol == 3e-2


@pytest.mark.parametrize("k", [0, 2], ids=["bias", "weight"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_wrong_formula_is_found(monkeypatch, k, dtype):
    right = formulas.FORMULAS["Addmm"]

    def wrong(node, where, *args):
        finish = right(node, where, *args)
        return (lambda grad: finish(1.01 * grad)) if finish and where == k else finish

    monkeypatch.setitem(formulas.FORMULAS, "Addmm", wrong)
    checked = gs.check(mlp().to(dtype), digits(4, dtype), loss=classify)
    assert not checked.exact
    assert checked.worst.endswith("weight" if k else "bias")
    assert checked.update_error == pytest.approx(0.01, rel=0.5)
    assert f"exact: NO, worst in {checked.worst}" in str(checked)
    assert gs.check(mlp().to(dtype), digits(4, dtype), loss=classify, rtol=0.5).exact


def shares(kind):
    """Parameters that autograd gives one gradient, or one with values that share memory."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            shape = (4, 6, 3) if kind == "summed" else (6, 3)
            self.a, self.b = (nn.Parameter(torch.randn(shape).double()) for _ in "ab")
            self.out = nn.Linear(3, 3).double()

        def forward(self, x):
            weight = {
                "added": lambda: self.a + self.b,
                "stacked": lambda: torch.stack([self.a, self.b]).sum(0),
                "summed": lambda: self.a.sum(0) + self.b.mean(0),
            }[kind]()
            return self.out(torch.tanh(x @ weight))

    return Model()


@pytest.mark.parametrize("kind", ["added", "stacked", "summed"])
def test_gradients_in_each_others_memory_are_found(kind, monkeypatch):
    checked = gs.check(shares(kind), digits(4), loss=classify)
    assert checked.exact
    assert checked.update_error is not None and checked.update_error < 1e-12
    monkeypatch.setattr(leaves, "own", lambda found: found)
    monkeypatch.setattr(grads, "_laid_out", lambda grad, parameter: grad)
    checked = gs.check(shares(kind), digits(4), loss=classify)
    assert not checked.exact
    assert checked.worst in ("a", "b")
    assert checked.update_error == math.inf
    assert checked.gramian_error is not None and checked.gramian_error < 1e-12


def added_wrongly(self, weights, release, hooks=True, *, right, wrong):
    right(self, weights, release, hooks)
    wrong(self, [p for p in self.parameters if p.grad is not None])


def once_only(self, parameters):
    """A second backward takes the place of the first."""
    del self
    for p in parameters:
        seen = vars(p).setdefault("seen", p.grad.clone())
        p.grad.copy_(seen)


def from_the_pairs(self, parameters):
    """A bias's gradient is a row of the Jacobian."""
    del parameters
    for p, mine in zip(self.parameters, self._uses, strict=True):
        if p.dim() == 1 and p.grad is not None:
            p.grad = mine[0].blocks.data[0].copy_(p.grad)


def none_left(self, parameters):
    del self
    parameters[0].grad = None


@pytest.mark.parametrize("wrong", [once_only, from_the_pairs, none_left])
def test_wrong_gradients_are_found_where_weighted_sums_are_right(wrong, monkeypatch):
    add = functools.partialmethod(added_wrongly, right=FactoredJacobian._add, wrong=wrong)
    monkeypatch.setattr(FactoredJacobian, "_add", add)
    checked = gs.check(mlp(), digits(4), loss=classify)
    assert not checked.exact
    assert checked.update_error is not None and checked.update_error > 0.1
    assert checked.gramian_error is not None and checked.gramian_error < 1e-12


def test_it_trains_nothing_where_hooks_step():
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.register_post_accumulate_grad_hook(lambda p: p.data.sub_(p.grad))
    held = [p.grad for p in model.parameters()]
    assert gs.check(model, digits(4), loss=classify).exact
    for p, value, grad in zip(model.parameters(), before, held, strict=True):
        assert torch.equal(p, value)
        assert p.grad is grad
        assert torch.equal(grad, torch.ones_like(p))


@pytest.mark.parametrize("grouped", [False, True], ids=["samples", "grouped"])
@pytest.mark.parametrize("name", SOME)
def test_paths_are_those_of_the_whole_batch(name, grouped):
    model, batch = make(name, size=9)
    groups = torch.tensor([0, 0, 1, 2, -1, 0, 3, 4, 5]) if grouped else None
    checked = gs.check(model, batch, loss=ZOO[name].loss, groups=groups)
    assert checked.paths == taken(model, batch, ZOO[name].loss, groups)
    assert (checked.samples, checked.rows) == (9, 6 if grouped else 9)


def test_the_path_changes_with_the_batch():
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none")

    # 4 tokens: 2 samples' products cost 8^2/2 (6 + 8) = 448 and their planes 8 (6 8) + .. = 600;
    # those of 60 240^2/2 (6 + 8) = 403,200 and 240 (6 8) + .. = 100,824
    batches = [(torch.randn(n, 4, 6).double(), torch.randint(3, (n,))) for n in (2, 60)]
    paths = [gs.check(mlp(), batch, loss=loss).paths["0.weight"] for batch in batches]
    assert paths == ["factored", "direct"]


@pytest.mark.parametrize("groups", [None, torch.zeros(5, dtype=torch.int64)])
def test_a_single_row(groups):
    size = 1 if groups is None else 5
    checked = gs.check(mlp(), digits(size), loss=classify, groups=groups)
    assert checked.exact
    assert checked.rows == 1
    assert set(checked.paths.values()) == {"stored rows"}


def test_a_refusal_is_reported_with_what_it_takes():
    model = mlp(nn.BatchNorm1d(8)).train()
    checked = gs.check(model, digits(5), loss=classify)
    assert not checked.exact
    assert "1 (BatchNorm1d) in training mode" in checked.refused
    assert checked.paths["0.weight"] == checked.paths["0.bias"] == "refused"
    assert checked.paths["1.weight"] == "stored rows"
    assert checked.paths["3.weight"] in ("factored", "direct")
    assert checked.memory is None
    assert checked.gramian_error is None
    assert str(checked).startswith(f"refused: {checked.refused}")
    assert gs.check(model.eval(), digits(5), loss=classify).exact


def test_all_is_refused_where_nothing_is_known():
    model = mlp()

    def loss(model, batch):
        hidden = checkpoint(model, batch[0].requires_grad_(), use_reentrant=True)
        return F.cross_entropy(hidden, batch[1], reduction="none")

    checked = gs.check(model, digits(5), loss=loss)
    assert "use_reentrant=False" in checked.refused
    assert set(checked.paths.values()) == {"refused"}


def test_slow_parameters_are_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.out = nn.Bilinear(6, 6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.pair(x, x))

    checked = gs.check(Model().double(), digits(5), loss=classify)
    assert checked.exact
    assert checked.paths["pair.weight"] == "one row at a time"
    assert "no formula for TrilinearBackward0" in checked.slow["pair.weight"]
    assert list(checked.slow) == ["pair.weight"]
    assert "pair.weight  [4, 6, 6]  one row at a time" in str(checked)


def test_frozen_and_unreached_parameters_are_named():
    model = mlp(nn.Linear(8, 8).requires_grad_(False))
    model.register_parameter("spare", nn.Parameter(torch.zeros(2).double()))
    checked = gs.check(model, digits(5), loss=classify)
    assert checked.frozen == ["1.weight", "1.bias"]
    assert checked.paths["spare"] == "not reached"
    assert not set(checked.frozen) & set(checked.paths)
    assert "frozen: 2 parameters" in str(checked)


@pytest.mark.parametrize("kind", ["BatchNorm", "Dropout"])
@pytest.mark.parametrize("graded", [False, True], ids=["no grad", "grad"])
def test_nothing_is_changed(kind, graded):
    model = mlp(nn.BatchNorm1d(8) if kind == "BatchNorm" else nn.Dropout(0.3)).train()
    if graded:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    before, held = state_of(model), [p.grad for p in model.parameters()]
    random, batch = torch.get_rng_state(), digits(5)
    buffers = dict(model.named_buffers())
    torch.set_rng_state(random)
    checked = gs.check(model, batch, loss=classify)
    assert (checked.refused is None) == checked.exact == (kind == "Dropout")
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_state(before, state_of(model))
    assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert not any(p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_buffers_a_forward_pass_replaces_are_put_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + len(x)
            return x

    model = mlp(Counts())
    before = model[1].seen
    gs.check(model, digits(5), loss=classify)
    assert model[1].seen is before
    assert before == 0


def test_a_failing_loss_changes_nothing():
    def loss(model, batch):
        model(batch[0])
        raise KeyError("labels")

    model = mlp(nn.BatchNorm1d(8)).train()
    before = state_of(model)
    with pytest.raises(KeyError, match="labels"):
        gs.check(model, digits(5), loss=loss)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    ("batch", "loss", "options", "message"),
    [
        ({}, classify, {}, "batch holds no tensor"),
        ((torch.ones(4, 6), torch.ones(3)), classify, {}, "different batch sizes: .3, 4."),
        ((torch.ones(0, 6), torch.ones(0)), classify, {}, "batch is empty"),
        ((torch.ones(4, 6), 3), classify, {}, "leading batch dimension, got 3"),
        (None, lambda m, b: classify(m, b).mean(), {}, "reduction='none'"),
        (None, lambda m, b: classify(m, b).detach(), {}, "does not depend on the model's param"),
        (None, classify, {"groups": torch.zeros(3, dtype=torch.int64)}, r"groups must be \[4\]"),
        (None, classify, {"groups": torch.zeros(4)}, "groups must be int64"),
        (None, classify, {"groups": [0, 0, 1, 1]}, "groups must be a Tensor, got list"),
        (None, classify, {"groups": torch.full((4,), -2)}, "groups must be -1 or rows, got -2"),
        (None, classify, {"groups": torch.full((4,), -1)}, "groups leaves every sample out"),
    ],
)
def test_bad_arguments(batch, loss, options, message):
    with pytest.raises(gs.InputError, match=message):
        gs.check(mlp(), digits(4) if batch is None else batch, loss=loss, **options)


def test_a_loss_that_is_not_finite_is_an_error():
    x, y = digits(4)
    x[1] = torch.nan
    with pytest.raises(gs.NonFiniteError, match="row 1"):
        gs.check(mlp(), (x, y), loss=classify)


def test_it_may_be_called_without_gradients_and_on_compiled_models():
    with torch.no_grad():
        checked = gs.check(torch.compile(mlp(), backend="eager"), digits(4), loss=classify)
    assert checked.exact


def test_the_table_has_a_line_for_layers_that_are_alike():
    two = mlp(), nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model = nn.Sequential(*two)
    checked = gs.check(model, digits(5), loss=classify)
    lines = [" ".join(line.split()) for line in str(checked).splitlines()]
    assert "*.0.bias [8] stored rows x 2" in lines
    assert f"0.0.weight [8, 6] {checked.paths['0.0.weight']}" in lines
    assert any(line.startswith("memory: ") for line in lines)
    assert json.loads(json.dumps(checked.to_dict()))["paths"] == checked.paths


SCRIPT = """
    import ctypes
    from pathlib import Path

    import torch
    from torch import nn
    from torch.nn import functional as F

    import gradsurgery as gs

    def status(field):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024

    def loss(model, batch):
        logits = model(batch[0])
        return F.cross_entropy(logits.mT, batch[1], reduction="none").mean(1)

    def run(batch, groups):
        with gs.tape(model) as tape:
            losses = loss(model, batch)
        jacobian = tape.jacobian(losses, groups)
        weights = torch.linspace(-1, 1, jacobian.m) + jacobian.gramian()[0].float()
        jacobian.backward(weights)

    torch.set_num_threads(1)
    width, tokens, size = 384, 32, 16
    model = nn.Sequential(
        nn.Embedding(100, width),
        *(nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True) for _ in "four"),
        nn.Linear(width, 100),
    )
    batch = tuple(torch.randint(100, (2, size, tokens)))
    groups = torch.arange(size).sub(GROUP - 1).clamp(min=0)
    run(tuple(part[:2] for part in batch), None)  # what is made once is no one's
    model.zero_grad()
    checked = gs.check(model, batch, loss=loss, groups=groups)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    run(batch, groups)
    print(checked.memory, status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no such /proc")
@pytest.mark.parametrize("group", [1, 8], ids=["samples", "grouped"])
def test_memory_is_what_a_run_takes(group):
    code = textwrap.dedent(SCRIPT).replace("GROUP", str(group))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env = {k: v for k, v in env.items() if not k.startswith("MALLOC_")}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd=ROOT
    )
    estimated, measured = map(int, out.stdout.split())
    assert measured > 50e6
    assert abs(estimated / measured - 1) < 0.25, f"{estimated / 1e6:.0f} of {measured / 1e6:.0f} MB"
