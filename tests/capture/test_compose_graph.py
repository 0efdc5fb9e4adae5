"""What autograd's graph can hold besides torch's operations on dense real tensors."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from tests.capture.oracle import (
    BATCH,
    agrees,
    batch,
    check,
    energy,
    entropy,
    labels,
    loop,
    mlp,
    refused,
)

X = batch()


# one parameter in several places


class Tied(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens).tanh()).transpose(1, 2)


class Shared(nn.Module):
    """One module twice, its weight used by its parent too, and one parameter in two modules."""

    def __init__(self):
        super().__init__()
        self.inner, self.same, self.scale = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.same.bias = self.scale.bias

    def forward(self, x):
        x = self.inner(self.inner(x).tanh())
        x = F.linear(x, self.inner.weight.t(), self.inner.bias)
        return self.same(x) * self.scale(x) + x @ self.inner.weight[:, :1] + self.inner.weight[0]


def test_shared_parameters():
    tokens, tied = labels(9, 12).view(4, 3), Tied().double()
    assert len(list(tied.parameters())) == 1
    agrees(tied, lambda: F.cross_entropy(tied(tokens), tokens, reduction="none").mean(1))
    shared = Shared().double()
    agrees(shared, lambda: energy(shared(X)))


def test_parametrized():
    weight_norm = nn.utils.parametrizations.weight_norm
    spectral_norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(weight_norm(nn.Linear(5, 7)), nn.Tanh(), spectral_norm(nn.Linear(7, 4)))
    model.double()
    agrees(model, lambda: energy(model(X)))


# hooks


def test_parameter_hook():
    """It changes each row's gradient, so each row is got for itself."""
    model = mlp()
    model[0].weight.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    agrees(model, lambda: entropy(model(X)), warns=["0.weight: it has a hook"])


def test_hook_on_one_of_two_parameters():
    """The other one is computed with it, and has all of its rows too."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)), nn.Linear(7, 4))
    model.double()
    model[0].parametrizations.weight.original0.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    agrees(model, lambda: entropy(model(X)), warns=["original0, .*original1: it has a hook"])


def test_hook_of_an_activation():
    model = mlp()

    def forward():
        h = model[0](X)
        h.register_hook(lambda grad: 3 * grad)
        weight = model[2].weight * 2
        weight.register_hook(lambda grad: 5 * grad)
        return energy(h.tanh() @ weight.t())

    agrees(model, forward)


def test_module_hooks():
    class Two(nn.Module):
        def forward(self, a, b):
            return a * 2, b * a

    class Model(nn.Module):
        def __init__(self, used):
            super().__init__()
            self.left, self.right, self.two = nn.Linear(5, 4), nn.Linear(5, 4), Two()
            self.used = used

        def forward(self, x):
            outs = self.two(self.left(x), self.right(x))
            return sum(outs[k].square().sum(1) for k in self.used)

    calls = []
    for used in ([0], [1], [0, 1]):
        model = Model(used).double()
        for module in (model.two, model.left):
            module.register_full_backward_hook(lambda m, i, o: calls.append(m))
        model.two.register_full_backward_hook(
            lambda m, i, o: tuple(None if g is None else 3 * g for g in i)
        )
        model.two.register_full_backward_pre_hook(lambda m, o: None)
        x = X.clone().requires_grad_()
        agrees(model, lambda model=model, x=x: model(x))
    assert calls


def test_hook_after_accumulation():
    """`backward` runs it, as torch's does; the rows are as without."""
    model = mlp()
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    jacobian = agrees(model, lambda: entropy(model(X)))
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], model[0].weight.grad)
    jacobian.combine(torch.ones(BATCH, dtype=torch.float64))
    assert len(seen) == 1


# functions of the user's own


class Linear(torch.autograd.Function):
    """With an argument that is no tensor before the others."""

    @staticmethod
    def forward(ctx, scale, x, weight):
        ctx.scale = scale
        ctx.save_for_backward(x, weight)
        return scale * x @ weight.T

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return None, ctx.scale * grad @ weight, ctx.scale * grad.T @ x


class Mul(torch.autograd.Function):
    """Not torch's: it has two outputs."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.flip(1), x + 1

    @staticmethod
    def backward(ctx, grad, other):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return grad * x.flip(1) + (grad * x).flip(1) + other


class Exp(torch.autograd.Function):
    """Named like an operation on elements; it centres, across samples."""

    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad - grad.mean(0)


class Once(torch.autograd.Function):
    """A backward pass outside of autograd's own fails."""

    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch._C._current_graph_task_id() < 0:
            raise ValueError("not in a backward pass")
        return grad * 0.5


def test_function_with_a_parameter():
    model = mlp()
    forward = lambda: energy(Linear.apply(3.0, model[1](model[0](X)), model[2].weight))  # noqa: E731
    agrees(model, forward, warns=["2.weight.*LinearBackward"])


@pytest.mark.parametrize("output", [0, 1])
def test_function_of_activations(output):
    model = mlp()
    agrees(model, lambda: energy(model[2](Mul.apply(model[0](X))[output])))


def test_function_across_samples():
    """What lies below it has exact rows, got from each row's gradient of its input."""
    model = mlp()
    agrees(model, lambda: energy(model[2](Exp.apply(model[0](X)))), warns=["0.weight.*ExpBackward"])


def test_function_that_cannot_be_asked():
    model = mlp()
    forward = lambda: energy(model[2](Once.apply(model[0](X))))  # noqa: E731
    refused(model, forward, "OnceBackward", "0.weight, 0.bias")


# compiled


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own imports
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_inside(backend, fresh_compiler):
    model = mlp(middle=[nn.LayerNorm(7)])
    compiled = torch.compile(model, backend=backend)
    compiled(X)
    agrees(model, lambda: entropy(compiled(X)))
    agrees(compiled, lambda: entropy(compiled(X)))


@pytest.mark.parametrize(
    ("what", "backend"),
    [
        ("model", "eager"),
        ("model", "aot_eager"),
        ("model", "inductor"),
        ("loss", "aot_eager"),
        ("broken", "aot_eager"),
    ],
)
def test_compiled_outside(what, backend, fresh_compiler):
    """What a compiler fused is one operation: its rows are got one by one."""
    model = mlp(middle=[nn.LayerNorm(7), nn.GELU()])

    def broken(x):
        h = model[:2](x)
        torch._dynamo.graph_break()
        return entropy(model[2:](h))

    forward = {
        "model": lambda f: entropy(f(X)),
        "loss": lambda f: f(X),
        "broken": lambda f: f(X),
    }[what]
    whole = {"model": model, "loss": lambda x: entropy(model(x)), "broken": broken}[what]
    losses = forward(torch.compile(whole, backend=backend))
    plain = forward(whole)
    with gs.tape(model) as tape:
        pass
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jacobian = tape.jacobian(losses)
    if backend != "eager":
        (warning,) = [w for w in caught if issubclass(w.category, UserWarning)]
        assert "CompiledFunctionBackward" in str(warning.message)
        assert "inside the tape" in str(warning.message)
    check(jacobian, model, loop(plain, model))


# other tensors


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}])
def test_embeddings_of_other_gradients(options):
    model = nn.Embedding(7, 4, **options).double()
    tokens = labels(7, 12).view(6, 2)
    agrees(model, lambda: energy(model(tokens)), warns=["weight.*EmbeddingBackward0"])
    agrees(model, lambda: energy(model(tokens)).sum())


def test_embedding_of_bounded_norm():
    model = nn.Embedding(7, 4, max_norm=0.5).double()
    agrees(model, lambda: energy(model(labels(7))))


class Complex(nn.Module):
    """Real parameters, complex values."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.real, self.imaginary = (nn.Parameter(torch.randn(5, 3)) for _ in range(2))
        self.pairs, self.bias = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        h = (self.inner(x) + 1j) * torch.view_as_complex(self.pairs) * self.bias
        return torch.fft.fft(h).abs().square() @ torch.complex(self.real, self.imaginary).abs()


def test_complex_values():
    model = Complex().double()
    agrees(model, lambda: energy(model(X)))


def test_complex_parts():
    """Of each part alone, through an operation that has no formula."""
    real, imaginary = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

    def forward():
        z = torch.complex(real(X), imaginary(X))
        return (z.conj() * (1 + 2j)).real.sum(1)

    agrees(nn.ModuleList([real, imaginary]), forward)


def test_negated_views():
    """Memory that holds the values with the other sign."""
    model = nn.Linear(5, 3).double()
    x = torch.complex(batch(), batch(seed=2)).conj().imag
    assert x.is_neg()
    agrees(model, lambda: energy(model(x)))


def test_complex_matrix():
    model = Complex().double()

    def forward():
        matrix = torch.complex(model.real, model.imaginary)
        return energy(((model.inner(X) + 1j) @ matrix).abs())

    agrees(model, forward, warns=["real, imaginary|imaginary, real", "MmBackward0"])


def test_complex_parameter():
    model = nn.Linear(5, 3, dtype=torch.complex128)
    with pytest.raises(gs.InputError, match=r"parameter weight must be floating point.*complex128"):
        gs.tape(model).__enter__()


def test_nested_tensors():
    model = mlp()

    def forward():
        ragged = torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged)
        return torch.stack([out.square().sum() for out in model(ragged).unbind()])

    refused(model, forward, "nested tensors", exact=False)


def test_functions_of_gradients():
    """A loss of the input's gradient, as in gradient penalties."""
    model = mlp()

    def forward():
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return energy(grad)

    agrees(model, forward)


def test_functional():
    """Other values in the parameters' place, and a forward pass mapped over samples."""
    model = mlp()
    values = {name: 2 * p for name, p in model.named_parameters()}
    agrees(model, lambda: energy(torch.func.functional_call(model, values, (X,))))
    agrees(model, lambda: torch.func.vmap(lambda x: model(x).square().sum())(X))


def test_loop_over_samples():
    model = mlp()
    agrees(model, lambda: torch.stack([model(x).square().sum() for x in X]))
    agrees(model, lambda: torch.stack([model(x[None]).square().sum() for x in X]))
