"""gs.integrations.torchjd against the real torchjd, and where it goes further."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from gradsurgery.integrations.torchjd import Engine
from tests.models import assert_same_state, state_of

B, CLASSES = 6, 3
one_by_one = pytest.mark.filterwarnings("ignore:.*rows are got one by one")
a_pass_each = pytest.mark.filterwarnings("ignore:.*a backward pass each")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def theirs():
    """torchjd's Gramian of what `forward` returns; its hooks are gone afterwards."""
    autogram = pytest.importorskip("torchjd.autogram")

    def compute(modules, forward, batch_dim):
        engine = autogram.Engine(*modules, batch_dim=batch_dim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vmap's, of slow fallbacks
            return engine.compute_gramian(forward())

    return compute


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens)).mean(1))


class TwoTasks(nn.Module):
    """A trunk and two heads; losses [B, 2]."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(7, 1), nn.Linear(7, 1)])

    def forward(self, x):
        hidden = self.trunk(x)
        return torch.stack([head(hidden).square().squeeze(1) for head in self.heads], dim=1)


class Tied(nn.Module):
    """The first layer and the last share a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def mlp():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))
    return model, torch.randn(B, 5)


def cnn():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )
    return model, torch.randn(B, 2, 8, 8)


def attention():
    return Attention(), torch.randint(11, (B, 4))


def classification(model, x):
    labels = torch.arange(B) % CLASSES
    return lambda: F.cross_entropy(model(x), labels, reduction="none")


def oracle(output, modules):
    """The Gramian of gradients got one at a time."""
    parameters = list({id(p): p for m in modules for p in m.parameters()}.values())
    rows = []
    for element in output.flatten():
        grads = torch.autograd.grad(element, parameters, retain_graph=True, allow_unused=True)
        filled = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
        ]
        rows.append(torch.cat([g.flatten() for g in filled]))
    matrix = torch.stack(rows)
    return matrix @ matrix.mT


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("make", [mlp, cnn, attention])
def test_gramians_of_losses_are_torchjds(make, batch_dim, theirs):
    model, x = make()
    forward = classification(model, x)
    expected = theirs([model], forward, batch_dim)
    gramian = Engine(model, batch_dim=batch_dim).compute_gramian(forward())
    assert gramian.shape == (B, B)
    assert_equal(gramian, expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_gramians_of_tasks_are_torchjds_in_the_order_of_the_output(order, theirs):
    model, x = TwoTasks(), torch.randn(B, 5)

    def forward():
        return model(x).permute(order)

    for batch_dim in (order.index(0), order.index(0) - 2, None):
        expected = theirs([model], forward, batch_dim)
        gramian = Engine(model, batch_dim=batch_dim).compute_gramian(forward())
        assert gramian.shape == (2 * B, 2 * B)
        assert_equal(gramian, expected)


@one_by_one
@pytest.mark.parametrize("batch_dim", [0, 1, 2])
def test_gramians_of_any_output_are_torchjds(batch_dim, theirs):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
    x = torch.randn(4, 5)

    def forward():
        return model(x).view(4, 2, 3).movedim(0, batch_dim)

    expected = theirs([model], forward, batch_dim)
    assert_equal(Engine(model, batch_dim=batch_dim).compute_gramian(forward()), expected)


def test_the_gramian_of_a_scalar_is_its_squared_norm(theirs):
    model, x = mlp()

    def forward():
        return model(x).square().mean()

    gramian = Engine(model, batch_dim=None).compute_gramian(forward())
    assert gramian.shape == (1, 1)
    assert_equal(gramian, theirs([model], forward, None))


def test_several_modules_are_one_model(theirs):
    body, head = mlp()[0][:4], nn.Linear(7, 3)
    forward = classification(nn.Sequential(body, head), torch.randn(B, 5))
    expected = theirs([body, head], forward, 0)
    assert_equal(Engine(body, head).compute_gramian(forward()), expected)
    assert_equal(Engine(head).compute_gramian(forward()), oracle(forward(), [head]))


@pytest.mark.parametrize("make", [mlp, cnn, attention])
def test_weighted_losses_go_backward_after_their_gramian(make, theirs):
    weighting = pytest.importorskip("torchjd.aggregation").MGDAWeighting()
    model, x = make()
    forward = classification(model, x)
    weights = weighting(theirs([model], forward, 0))
    expected = torch.autograd.grad(forward(), list(model.parameters()), weights)

    losses = forward()
    engine = Engine(model)
    losses.backward(weighting(engine.compute_gramian(losses)))
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-7, atol=1e-9)


def test_the_graph_is_kept():
    model, x = mlp()
    losses = classification(model, x)()
    engine = Engine(model)
    first = engine.compute_gramian(losses)
    assert_equal(engine.compute_gramian(losses), first)
    losses.sum().backward()


def test_it_follows_the_dtype_of_the_output():
    model, x = mlp()
    model, x = model.float(), x.float()
    losses = classification(model, x)()
    gramian = Engine(model).compute_gramian(losses)
    assert gramian.dtype == torch.float32
    assert not gramian.requires_grad
    torch.testing.assert_close(gramian, oracle(losses, [model]), rtol=1e-4, atol=1e-6)


def test_nothing_is_left_on_the_modules():
    model, x = cnn()
    before, attributes = state_of(model), [dict(vars(m)) for m in model.modules()]
    losses = classification(model, x)()
    engine = Engine(model, model[0])
    engine.compute_gramian(losses)
    assert_same_state(before, state_of(model))
    assert [dict(vars(m)) for m in model.modules()] == attributes
    for module in model.modules():
        assert not any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))
    for parameter in model.parameters():
        assert parameter.grad is None
        assert not parameter._backward_hooks


def test_torchjd_is_not_imported():
    code = "import sys, gradsurgery.integrations.torchjd; sys.exit('torchjd' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tied_weights_are_exact_where_torchjd_is_not(theirs):
    model, x = Tied(), torch.randn(B, 5)

    def forward():
        return model(x).square().sum(1)

    expected = oracle(forward(), [model])
    assert_equal(Engine(model).compute_gramian(forward()), expected)
    apart = theirs([model], forward, 0)
    assert (apart - expected).abs().max() > 1e-3 * expected.abs().max()

    modules = [model.first, model.last]  # which meet in a parameter
    assert_equal(Engine(*modules).compute_gramian(forward()), expected)
    assert_equal(Engine(model, *modules).compute_gramian(forward()), expected)


def test_a_module_may_go_unused_or_be_bypassed(theirs):
    model, x = mlp()
    spare = nn.Linear(3, 3)

    def forward():
        out = F.linear(model[:4](x), model[4].weight, model[4].bias)
        spare(out)
        return out.square().sum(1)

    expected = oracle(forward(), [model])
    assert_equal(Engine(model, spare).compute_gramian(forward()), expected)
    apart = theirs([model, spare], forward, 0)
    assert (apart - expected).abs().max() > 1e-3 * expected.abs().max()


def normalized():
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    return model, torch.randn(B, 5)


def test_coupled_samples_are_refused_by_name():
    model, x = normalized()
    losses = classification(model, x)()
    with pytest.raises(gs.InputError, match=r"1 \(BatchNorm1d\) in training mode.*0\.weight"):
        Engine(model).compute_gramian(losses)
    above = Engine(model[2]).compute_gramian(losses)  # nothing is coupled there
    assert_equal(above, oracle(losses, [model[2]]))
    model.eval()
    losses = classification(model, x)()
    assert_equal(Engine(model).compute_gramian(losses), oracle(losses, [model]))


@one_by_one
@a_pass_each
def test_coupled_samples_are_exact_without_a_batch_dimension(theirs):
    model, x = normalized()
    forward = classification(model, x)
    expected = theirs([model], forward, None)
    assert_equal(Engine(model, batch_dim=None).compute_gramian(forward()), expected)


def test_what_is_trainable_is_asked_each_time():
    model, x = mlp()
    engine = Engine(model)
    model[0].requires_grad_(False)
    losses = classification(model, x)()
    assert_equal(engine.compute_gramian(losses), oracle(losses, [model[2], model[4]]))
    model.requires_grad_(False)
    with pytest.raises(gs.InputError, match="no parameter"):
        engine.compute_gramian(losses)


def test_wrong_arguments_are_refused():
    model, x = mlp()
    with pytest.raises(gs.InputError, match="modules is empty"):
        Engine()
    with pytest.raises(gs.InputError, match=r"modules\[1\] must be a Module, got Tensor"):
        Engine(model, x)
    with pytest.raises(gs.InputError, match="batch_dim must be an int or None, got 'first'"):
        Engine(model, batch_dim="first")
    losses = classification(model, x)()
    with pytest.raises(gs.InputError, match=r"output must have a dimension batch_dim=1, got \[6\]"):
        Engine(model, batch_dim=1).compute_gramian(losses)
    with pytest.raises(gs.InputError, match="must have a dimension batch_dim=0"):
        Engine(model).compute_gramian(losses.mean())
    with pytest.raises(gs.InputError, match="output must be a Tensor, got list"):
        Engine(model).compute_gramian([losses])
    with pytest.raises(gs.InputError, match="do not depend on the model's parameters"):
        Engine(model).compute_gramian(losses.detach())
    with pytest.raises(gs.NonFiniteError, match="row 2"):
        poisoned = torch.ones(B)
        poisoned[2] = torch.inf
        Engine(model).compute_gramian(losses * poisoned)
