"""The tape itself: its errors, and that it leaves nothing behind."""

import copy
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.capture.oracle import BATCH, batch, check, energy, entropy, loop, mlp

X = batch()


def recorded(model, forward=None):
    with gs.tape(model) as tape:
        losses = entropy(model(X)) if forward is None else forward(model)
    return tape, losses


# errors, each by the name of the argument


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": lambda x: x}, "model must be a Module, got function"),
        ({"coupled": "maybe"}, "coupled must be 'refuse' or 'exact', got 'maybe'"),
        ({"parameters": []}, "model has no parameter"),
        ({"parameters": [nn.Parameter(torch.ones(2))]}, "model has no parameter"),
        ({"model": nn.Tanh()}, "model has no parameter"),
        ({"model": mlp().requires_grad_(False)}, "model has no parameter"),
        ({"model": nn.Linear(2, 2, dtype=torch.cfloat)}, "parameter weight must be floating point"),
    ],
)
def test_arguments_of_tape(options, match):
    with pytest.raises(gs.InputError, match=match), gs.tape(**{"model": mlp(), **options}):
        pass


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda losses: losses.detach(), "losses do not depend on the model's parameters"),
        (lambda losses: losses.tolist(), "losses must be a Tensor, got list"),
        (lambda losses: list(losses), "losses must be a Tensor, got list"),
        (lambda losses: losses.long(), "losses must be floating point, got torch.int64"),
        (lambda losses: losses.to(torch.cdouble), "losses must be floating point, got.*complex"),
        (lambda losses: None, "losses must be a Tensor, got NoneType"),
    ],
)
def test_losses(change, match):
    tape, losses = recorded(mlp())
    with pytest.raises(gs.InputError, match=match):
        tape.jacobian(change(losses))


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ([0] * BATCH, "groups must be a Tensor, got list"),
        (torch.zeros(BATCH), "groups must be int64, got torch.float32"),
        (torch.zeros(BATCH, dtype=torch.int32), "groups must be int64, got torch.int32"),
        (torch.zeros(3, dtype=torch.int64), r"groups must be \[6\] like losses, got \[3\]"),
        (torch.full((BATCH,), -2), "groups must be -1 or rows, got -2"),
    ],
)
def test_groups(groups, match):
    tape, losses = recorded(mlp())
    with pytest.raises(gs.InputError, match=match):
        tape.jacobian(losses, groups)


def test_losses_of_another_model():
    """No gradient reaches the taped model: rows of zeros would be a step that does nothing."""
    model, other = mlp(), mlp()
    tape, losses = recorded(model, lambda _: entropy(other(X)))
    with pytest.raises(gs.InputError, match="by another model, such as a copy"):
        tape.jacobian(losses)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([1.0] * BATCH, "weights must be a Tensor, got list"),
        (torch.ones(BATCH + 1), r"weights must be \[6\] or \[4, 6\], got \[7\]"),
        (torch.ones(1, BATCH), r"weights must be \[6\] or \[4, 6\], got \[1, 6\]"),
        (torch.full((BATCH,), torch.nan), "weights must be finite"),
        (torch.full((BATCH,), torch.inf), "weights must be finite"),
    ],
)
@pytest.mark.parametrize("method", ["combine", "backward"])
def test_weights(weights, match, method):
    tape, losses = recorded(mlp())
    jacobian = tape.jacobian(losses)
    with pytest.raises(gs.InputError, match=match):
        getattr(jacobian, method)(weights)


def test_per():
    tape, losses = recorded(mlp())
    with pytest.raises(gs.InputError, match="per must be 'model' or 'tensor', got 'layer'"):
        tape.jacobian(losses).gramian(per="layer")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 4])
def test_losses_that_are_not_finite(value, row):
    x = torch.zeros(BATCH, dtype=torch.float64)
    x[row] = value
    tape, losses = recorded(mlp(), lambda model: energy(model(X)) + x)
    with pytest.raises(gs.NonFiniteError, match=f"losses: row {row} is not finite"):
        tape.jacobian(losses)


@pytest.mark.parametrize("row", [0, 4])
def test_gradient_that_is_not_finite(row):
    """A finite loss whose gradient is not: the square root of nothing."""
    x = X.clone()
    x[row] = 0
    model = nn.Linear(5, 4, bias=False).double()
    tape, losses = recorded(model, lambda m: m(x).square().sum(1).sqrt())
    with pytest.raises(gs.NonFiniteError, match=f"row {row} is not finite.*weight"):
        tape.jacobian(losses).gramian()


def test_no_grad():
    model = mlp()

    @torch.no_grad()
    def evaluated():
        return recorded(model)

    @torch.enable_grad()
    def enabled():
        return recorded(model)

    tape, losses = evaluated()
    with pytest.raises(gs.InputError, match=r"torch\.no_grad"):
        tape.jacobian(losses)
    with torch.no_grad():
        tape, losses = enabled()
        rows_inside = tape.jacobian(losses, retain_graph=True).materialize()
    torch.testing.assert_close(rows_inside, tape.jacobian(losses).materialize())
    with torch.inference_mode():
        tape, losses = recorded(model)
        with pytest.raises(gs.InputError, match="losses do not depend"):
            tape.jacobian(losses)


@pytest.mark.parametrize("derived", [False, True])
def test_modified_afterwards(derived):
    """What the Jacobian has kept of the forward pass is checked before it is used."""
    model = mlp()
    if derived:  # the leaf that meets the tensor is computed from parameters
        nn.utils.parametrizations.weight_norm(model[2])
    kept = []

    def forward(model):
        kept.append(model[1](model[0](X)))
        return energy(model[2](kept[0]))

    tape, losses = recorded(model, forward)
    jacobian = tape.jacobian(losses)
    with torch.no_grad():
        kept[0].zero_()
    for use in (
        jacobian.gramian,
        lambda: jacobian.combine(torch.ones(BATCH)),
        jacobian.materialize,
    ):
        with pytest.raises(gs.InputError, match="of the forward pass was modified in place"):
            use()


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1)])
def test_groups_modified_afterwards(shape):
    """Rows are those that the groups named, whatever is written into them later."""
    model, groups = mlp(), torch.arange(BATCH).view(shape) // 2
    tape, losses = recorded(model)
    expected = tape.jacobian(losses.view(shape), groups.clone(), retain_graph=True).materialize()
    jacobian = tape.jacobian(losses.view(shape), groups)
    groups.zero_()
    torch.testing.assert_close(jacobian.materialize(), expected)


def test_stepped_before_it_is_used():
    """Rows of a weight that is computed from parameters need the parameters as they were."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))).double()
    tape, losses = recorded(model)
    jacobian = tape.jacobian(losses)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    with pytest.raises(gs.InputError, match="modified in place"):
        jacobian.gramian()


def test_modified_before():
    model = mlp()
    kept = []

    def forward(model):
        kept.append(model[1](model[0](X)))
        return energy(model[2](kept[0]))

    tape, losses = recorded(model, forward)
    with torch.no_grad():
        kept[0].zero_()
    with pytest.raises(gs.InputError, match=r"losses: a tensor .* was modified in place"):
        tape.jacobian(losses)


def test_warning_points_at_the_caller():
    model = mlp()
    model[0].weight.register_hook(lambda grad: grad)
    tape, losses = recorded(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tape.jacobian(losses)
    assert [w.filename for w in caught] == [__file__]


# nothing stays


def state(model):
    """All that a module and its parameters carry."""
    hooks = [
        {
            k: dict(v) if isinstance(v, dict) else v
            for k, v in module.__dict__.items()
            if "hook" in k
        }
        for module in model.modules()
    ]
    of_parameters = [
        (sorted(p.__dict__), p._backward_hooks, p._post_accumulate_grad_hooks, p._version)
        for p in model.parameters()
    ]
    attributes = [sorted(module.__dict__) for module in model.modules()]
    return hooks, of_parameters, attributes, list(model.state_dict()), model.training


class Interrupted(Exception):
    pass


def test_tapes_that_overlap_leave_the_compiler_as_it_was():
    """As those of two threads do: the first to begin is the first to end."""
    stance = torch._dynamo.eval_frame._stance
    first, second = gs.tape(mlp()), gs.tape(mlp())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance == stance


@pytest.mark.parametrize("fails", ["", "forward", "jacobian"])
def test_nothing_left_behind(fails):
    model = mlp(middle=[nn.LayerNorm(7), nn.BatchNorm1d(7)]).eval()
    before, out = state(model), model(X)
    stance = torch._dynamo.eval_frame._stance
    try:
        with gs.tape(model) as tape:
            losses = entropy(model(X))
            if fails == "forward":
                raise Interrupted
            if fails == "jacobian":
                tape.jacobian(losses, torch.zeros(1))
        tape.jacobian(losses).backward(torch.ones(BATCH, dtype=torch.float64))
    except (Interrupted, gs.InputError):
        assert fails
    model.zero_grad()
    assert state(model) == before
    assert torch._dynamo.eval_frame._stance == stance
    assert torch.equal(model(X), out)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert state(other)[2:] == before[2:]
        assert torch.equal(other(X), out)


def test_graph_is_freed():
    """Without retain_graph, nothing but what the rows need is kept."""
    import gc
    import weakref

    model = mlp()
    tape, losses = recorded(model)
    node = weakref.ref(losses)
    jacobian = tape.jacobian(losses)
    del losses
    gc.collect()
    assert node() is None
    jacobian.gramian()


def test_tapes_inside_each_other():
    """Of two models, and of one model twice."""
    first, second = mlp(), mlp()
    with gs.tape(first) as outer:
        h = first(X)
        with gs.tape(second) as inner:
            losses = energy(second[2](second[1](second[0](X))) * h)
        rows = loop(losses, first), loop(losses, second)
        check(inner.jacobian(losses, retain_graph=True), second, rows[1])
        with gs.tape(first) as again:
            more = entropy(first(X))
        check(again.jacobian(more, retain_graph=True), first, loop(more, first))
    check(outer.jacobian(losses), first, rows[0])


# memory


BIG = {
    "tokens": (
        "nn.Sequential(nn.Embedding(512, 512), *[m for _ in range(3) for m in "
        "(nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU())], nn.Linear(512, 4096))",
        "torch.randint(512, (64, 8))",
        "model(x).logsumexp(2).mean(1)",
    ),
    "images": (
        "nn.Sequential(nn.Conv2d(64, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 512, 3), "
        "nn.ReLU(), nn.Conv2d(512, 64, 2))",
        "torch.randn(64, 64, 4, 4)",
        "model(x).square().flatten(1).sum(1)",
    ),
}
PEAK = """
import torch, gradsurgery as gs
from torch import nn
torch.set_num_threads(1)
def high():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
def reset():
    open("/proc/self/clear_refs", "w").write("5")
model, x = {model}, {x}
def losses():
    return {losses}
losses()[:2].sum().backward()  # what an ordinary step needs is there already
with gs.tape(model) as tape:
    values = losses()
reset()
before = high()
jacobian = tape.jacobian(values)
jacobian.gramian()
jacobian.backward(torch.ones(64))
n = sum(p.numel() for p in model.parameters())
print(n, (high() - before) * 1024 / (64 * n * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("path", ["factored", "direct"])
@pytest.mark.parametrize("kind", BIG)
def test_rows_are_never_stored(kind, path):
    """The peak above the forward pass's is far below that of 64 gradients."""
    model, x, losses = BIG[kind]
    script = PEAK.format(model=model, x=x, losses=losses)
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, env={**os.environ, "GRADSURGERY_PATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    n, share = result.stdout.split()
    assert int(n) > 2_500_000
    assert float(share) < 0.25, share
