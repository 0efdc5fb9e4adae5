"""Stored rows: buffers, autocast, and what torch.func does not run, refused by name."""

import copy

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.models import batch, classification, mlp


def moved_by(model, data, loss, **options):
    """The model after a step of stored rows that moves no parameter, and the rows."""
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
    gs.Surgeon(twin, optimizer, gs.Mean(), rows="stored", **options).step(batch=data, loss=loss)
    rows = gs.DenseJacobian.from_model(
        copy.deepcopy(model), data, loss, chunk_size=options.get("chunk_size", 32)
    )
    return twin, rows.materialize()


def rows_after_one_pass(model, data, loss):
    """Gradients of one ordinary pass of the whole batch, and the model after it."""
    twin = copy.deepcopy(model)
    losses, params = loss(twin, data), list(twin.parameters())
    grads = [torch.autograd.grad(each, params, retain_graph=True) for each in losses]
    return twin, torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])


class Average(nn.Module):
    """Keeps an average of its inputs, as another tensor or in place, and a count."""

    def __init__(self, in_place=False):
        super().__init__()
        self.in_place, self.layers = in_place, mlp()
        self.register_buffer("average", torch.zeros(6).double())
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        mean = x.detach().mean(0)
        if self.in_place:
            self.average.mul_(0.9).add_(0.1 * mean)
        else:
            self.average = 0.9 * self.average + 0.1 * mean
        return self.layers(x)


def spectral():
    torch.manual_seed(2)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 4)).double()


@pytest.mark.parametrize("size,chunk_size", [(5, 32), (5, 2), (1, 1)])
@pytest.mark.parametrize("make", [Average, spectral])
def test_buffers_are_afterwards_those_of_an_ordinary_pass(make, size, chunk_size):
    model, data = make(), batch(size)
    expected, rows = rows_after_one_pass(model, data, classification)
    twin, found = moved_by(model, data, classification, chunk_size=chunk_size)
    torch.testing.assert_close(found, rows, rtol=1e-10, atol=1e-12)
    changed = 0
    for (name, buffer), other in zip(twin.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-12, msg=name)
        changed += not torch.equal(buffer, dict(model.named_buffers())[name])
    assert changed >= 2


def test_buffers_of_from_model_too():
    model, data = Average(), batch(5)
    expected, _ = rows_after_one_pass(model, data, classification)
    gs.DenseJacobian.from_model(model, data, classification)
    assert torch.equal(model.average, expected.average)
    assert model.calls == 1


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * grad


def squared(model, data):
    return Square.apply(model(data[0])).sum(1)


def penalty(model, data):
    """With a gradient at the inputs, differentiated again."""
    x = data[0].clone().requires_grad_()
    out = model(x).square().sum(1)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out + grad.square().sum(1)


def branching(model, data):
    losses = classification(model, data)
    return losses if losses.sum() > -1 else 2 * losses


def tracked():
    norm = nn.InstanceNorm1d(4, track_running_stats=True, affine=True)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 2), norm, nn.Flatten()).double()


@pytest.mark.parametrize("way", ["from_model", "step"])
@pytest.mark.parametrize(
    "make,loss,message",
    [
        (mlp, squared, "torch.autograd.Function Square has no setup_context"),
        (mlp, penalty, "the loss calls requires_grad_.. or takes a gradient"),
        (mlp, branching, r"values of samples decide what is computed \(.item\(\), if\)"),
        (tracked, lambda m, d: m(d[0]).pow(3).sum(1), "buffers by values .*: 2.running_mean, 2.r"),
        (lambda: Average(in_place=True), classification, "changes buffers by values.*: average"),
    ],
    ids=["Function", "penalty", "branch", "instance norm", "in place"],
)
def test_what_torch_func_does_not_run_is_named(make, loss, message, way):
    model, data = make(), batch(4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gs.InputError, match=message) as told:
        if way == "step":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            gs.Surgeon(model, optimizer, gs.UPGrad(), rows="stored").step(batch=data, loss=loss)
        else:
            gs.DenseJacobian.from_model(model, data, loss)
    assert "rows='captured'" in str(told.value)
    assert "\n" not in str(told.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    # captured rows are the way out
    _, rows = rows_after_one_pass(model, data, loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    info = gs.Surgeon(model, optimizer, gs.UPGrad()).step(batch=data, loss=loss)
    torch.testing.assert_close(info.gramian, rows @ rows.mT, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layers", [[0], [0, 2]], ids=["one", "all"])
def test_a_loss_that_freezes_parameters_is_named(layers):
    model = mlp()

    def freezing(model, data):
        for layer in layers:
            model[layer].requires_grad_(False)
        return classification(model, data)

    # the forget row is of a mean, and comes first: torch.func has no part in it
    surgeon = gs.Surgeon(
        model, torch.optim.SGD(model.parameters(), lr=0.1), gs.OrthoGrad(), rows="stored"
    )
    match = "does not depend on" if len(layers) > 1 else "the loss calls requires_grad_"
    with pytest.raises(gs.InputError, match=match):
        surgeon.step(forget=batch(3), retain=batch(4), loss=freezing)


def test_an_error_of_the_loss_itself_is_left_as_it_is():
    def broken(model, data):
        raise RuntimeError("of mine")

    with pytest.raises(RuntimeError, match=r"^of mine$"):
        gs.DenseJacobian.from_model(mlp(), batch(3), broken)


@pytest.mark.parametrize("rows", ["samples", "mean"])
def test_the_backward_pass_is_outside_of_autocast(rows):
    # as that of captured rows: in a caller's autocast the loss alone is in low precision
    torch.manual_seed(0)
    model = mlp().float()
    x, y = batch(5)
    data = x.float(), y

    class Odd(torch.autograd.Function):  # its backward multiplies matrices of float32
        @staticmethod
        def forward(x, weight):
            return x @ weight

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad):  # type: ignore[override]
            x, weight = ctx.saved_tensors
            seen.append((grad.float() @ weight.mT.float()).dtype)
            return (grad.float() @ weight.mT.float()).to(x.dtype), None

    Odd.generate_vmap_rule = True
    seen, scale = [], torch.randn(4, 4)

    def loss(model, data):
        return nn.functional.cross_entropy(
            Odd.apply(model(data[0]), scale), data[1], reduction="none"
        )

    def inside(model, data):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, data)

    expected = gs.DenseJacobian.from_model(model, data, inside, rows=rows).materialize()
    assert set(seen) == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gs.DenseJacobian.from_model(model, data, loss, rows=rows).materialize()
    assert set(seen) == {torch.float32}
    assert torch.equal(found, expected)
    exact = gs.DenseJacobian.from_model(model, data, loss, rows=rows).materialize()
    assert (found - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("way", [{"rows": "stored"}, {}], ids=str)
def test_losses_of_whole_numbers_are_called_so(way):
    model = mlp()
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), gs.UPGrad(), **way)
    for loss in (
        lambda m, d: (m(d[0]).argmax(1) == d[1]).long(),
        lambda m, d: m(d[0]).argmax(1) == d[1],
    ):
        with pytest.raises(gs.InputError, match=r"loss must be floating point, got torch\.\w+: wh"):
            surgeon.step(batch=batch(4), loss=loss)
    with pytest.raises(gs.InputError, match="from comparisons"):
        surgeon.step(batch=batch(4), loss=lambda m, d: (m(d[0]).argmax(1) == d[1]).double())
