"""Every `.grad` is memory of its own, laid out as autograd lays it out, and hooks see all of it."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import gradsurgery as gs
from gradsurgery import grads
from tests.capture.oracle import batch, flattened, loop, trainable

B = 5


def parameter(*shape):
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


class Of(nn.Module):
    """x through one matrix [3, 4] that `weight` makes of the parameters."""

    def __init__(self, weight, **parameters):
        super().__init__()
        self.weight = weight
        for name, value in parameters.items():
            self.register_parameter(name, value)

    def forward(self, x):
        return torch.tanh(x @ self.weight(self).T).square().sum(1)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b_ih, self.b_hh = parameter(4, 4), parameter(4), parameter(4)

    def forward(self, x):
        h = torch.zeros_like(x)
        for _ in range(3):
            h = torch.tanh(x @ self.w + h + (self.b_ih + self.b_hh))
        return h.square().sum(1)


class Saved(torch.autograd.Function):
    """The product of two parameters with a constant, whose gradient is what it saved."""

    @staticmethod
    def forward(ctx, weight, scale):
        ctx.save_for_backward(scale)
        return (weight * scale).sum()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        scale = ctx.saved_tensors[0]
        return (scale if float(grad) == 1 else grad * scale), None


class Lent(nn.Module):
    """The gradient of `w` is the tensor `constant` itself where all samples make one row."""

    def __init__(self):
        super().__init__()
        self.w, self.out = parameter(3, 4), parameter(4)
        self.constant = torch.randn(3, 4, dtype=torch.float64)

    def forward(self, x):
        return x @ self.out + Saved.apply(self.w, self.constant) / B


class Sum(nn.Module):
    def __init__(self, left, right):
        super().__init__()
        self.other = parameter(*right.shape)

    def forward(self, x):
        return x + self.other


def parametrized():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    parametrize.register_parametrization(model[0], "weight", Sum(None, model[0].weight))
    return nn.Sequential(model, Energy())


class Energy(nn.Module):
    def forward(self, x):
        return x.square().flatten(1).sum(1)


class Stored(nn.Module):
    """A hook keeps the gradient of a tensor computed from parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.kept = parameter(3, 4), parameter(3, 4), []

    def forward(self, x):
        weight = self.a + self.b
        weight.register_hook(self.keep)
        return (x @ weight.T).square().sum(1)

    def keep(self, grad):
        try:
            grad.data_ptr()
        except RuntimeError:  # several gradients at once have no memory of their own
            return
        self.kept.append((grad, grad.clone()))


class LastLayout(nn.Module):
    """A convolution's weight, used as it is and summed with another; both channels_last."""

    def __init__(self):
        super().__init__()
        layout = {"memory_format": torch.channels_last}
        self.a, self.b, self.c = (
            nn.Parameter(torch.randn(4, 2, 3, 3, dtype=torch.float64).to(**layout)) for _ in "abc"
        )

    def forward(self, x):
        x = x.view(-1, 1, 2, 2).expand(-1, 2, 2, 2)
        x = F.conv2d(x, self.c, padding=1)[:, :2]
        return F.conv2d(x, self.a + self.b, padding=1).square().sum((1, 2, 3))


MODELS = {
    "added": lambda: Of(lambda m: m.a + m.b, a=parameter(3, 4), b=parameter(3, 4)),
    "three added": lambda: Of(
        lambda m: m.a + m.b + m.c, a=parameter(3, 4), b=parameter(3, 4), c=parameter(3, 4)
    ),
    "a sum and one alone": lambda: Of(
        lambda m: torch.cat([m.a + m.b, m.a]), a=parameter(3, 4), b=parameter(3, 4)
    ),
    "stacked": lambda: Of(
        lambda m: torch.stack([m.a, m.b]).sum(0), a=parameter(3, 4), b=parameter(3, 4)
    ),
    "views added": lambda: Of(
        lambda m: (m.a.view(12) + m.b.view(12)).view(3, 4), a=parameter(2, 6), b=parameter(6, 2)
    ),
    "overlapping parts": lambda: Of(
        lambda m: m.a + torch.cat([m.b, m.c]),
        a=parameter(3, 4), b=parameter(2, 4), c=parameter(1, 4),
    ),
    "summed over a dimension": lambda: Of(lambda m: m.table.sum(0), table=parameter(5, 3, 4)),
    "expanded": lambda: Of(lambda m: m.row.expand(3, 4), row=parameter(1, 4)),
    "scalars added": lambda: Of(
        lambda m: (m.s + m.t) * m.a, s=parameter(), t=parameter(), a=parameter(3, 4)
    ),
    "the same twice": lambda: Of(lambda m: m.a + m.a, a=parameter(3, 4)),
    "transposed": lambda: Of(
        lambda m: (m.a + m.b).T, a=nn.Parameter(parameter(3, 4).data.T), b=parameter(4, 3)
    ),
    "cell": Cell,
    "parametrized": parametrized,
    "a function's saved tensor": Lent,
    "kept by a hook": Stored,
    "channels last": LastLayout,
    "linear layers": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3), Energy()
    ).double(),
}  # fmt: skip
SUMMED, ONE = torch.tensor([0, 0, 0, 1, 2]), torch.zeros(B, dtype=torch.int64)
KINDS = {
    "samples": (None, "stored"),
    "a summed row": (SUMMED, "stored"),
    "one row": (ONE, "stored"),
    "by a backward pass": (SUMMED, "backward"),
}
models = pytest.mark.parametrize("name", MODELS)
SOME = ["a sum and one alone", "stacked", "scalars added", "cell", "parametrized", "linear layers"]
some = pytest.mark.parametrize("name", SOME)
kinds = pytest.mark.parametrize(("groups", "combine"), KINDS.values(), ids=KINDS)


def made(name, groups=None, combine="stored"):
    """A model, its Jacobian, and its rows by a loop of backward passes."""
    torch.manual_seed(3)
    model = MODELS[name]()
    return model, *jacobian_of(model, groups, combine)


def jacobian_of(model, groups=None, combine="stored", seed=1):
    with gs.tape(model) as tape:
        losses = model(batch(B, 4, seed=seed))
    rows = loop(losses, model, groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tape.jacobian(losses, groups, combine=combine), rows


def sums(model, rows, weights):
    return [weights @ row for row in flattened(rows, model, len(weights))]


def weights_of(jacobian):
    return torch.linspace(-1, 1.3, jacobian.m, dtype=torch.float64)


def span(tensor):
    """The bytes from a tensor's first value to its last."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def assert_own(tensors, others=()):
    """No two share memory, nor any with the others; each is as autograd would lay it out."""
    spans = [span(tensor) for tensor in tensors]
    for k, (start, end) in enumerate(spans):
        for lo, hi in (*spans[:k], *map(span, others)):
            assert end <= lo or hi <= start, f"tensor {k} shares its memory"
        values = tensors[k].numel() * tensors[k].element_size()
        assert end - start == values, f"tensor {k} is not dense"


def assert_equal(found, expected):
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        a = torch.zeros_like(b) if a is None else a.flatten()
        torch.testing.assert_close(
            a, b, rtol=1e-10, atol=1e-12, msg=lambda text, k=k: f"{k}: {text}"
        )


def all_grads(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


@models
@kinds
def test_grads_are_memory_of_their_own(name, groups, combine):
    model, jacobian, rows = made(name, groups, combine)
    weights = weights_of(jacobian)
    before = jacobian.combine(weights)
    jacobian.backward(weights)
    parameters = list(trainable(model).values())
    values = [t for mine in jacobian._uses for use in mine for t in use.values]
    saved = [model.constant] if name == "a function's saved tensor" else []
    saved += [kept for kept, _ in getattr(model, "kept", [])]
    assert_own(all_grads(model), [*before, *parameters, *values, *saved])
    assert_own(before, [*parameters, *values, *saved])
    assert_equal([p.grad for p in parameters], sums(model, rows, weights))
    for p in parameters:
        assert p.grad is None or p.grad.stride() == torch.empty_like(p).stride()
    for kept, copied in getattr(model, "kept", []):
        assert torch.equal(kept, copied)


@models
@kinds
@pytest.mark.parametrize("release", [False, True], ids=["kept", "released"])
def test_backward_adds_exactly_after_grads_were_changed_in_place(name, groups, combine, release):
    model, jacobian, rows = made(name, groups, combine)
    weights, parameters = weights_of(jacobian), list(trainable(model).values())
    once = sums(model, rows, weights)
    gram = jacobian.gramian()
    norm = float(torch.cat(once).norm())
    jacobian.backward(weights, release=release)
    nn.utils.clip_grad_norm_(parameters, norm / 2)
    share = norm / 2 / (norm + 1e-6)
    assert_equal([p.grad for p in parameters], [share * each for each in once])
    if not release:
        assert_equal(jacobian.combine(weights), once)
        torch.testing.assert_close(jacobian.gramian(), gram, rtol=0, atol=0)
        jacobian.backward(weights)
        assert_equal([p.grad for p in parameters], [(1 + share) * each for each in once])
    model.zero_grad(set_to_none=False)
    following, other_rows = jacobian_of(model, groups, combine, seed=9)
    following.backward(weights, release=release)
    following, _ = jacobian_of(model, groups, combine, seed=9)
    following.backward(weights, release=release)
    expected = [2 * each for each in sums(model, other_rows, weights)]
    assert_equal([p.grad for p in parameters], expected)


@some
def test_micro_batches_of_a_surgeon_step_as_one_batch_does(name):
    torch.manual_seed(3)
    model = MODELS[name]()
    start = copy.deepcopy(model)
    steps = []
    for options in ({}, {"micro_batch": 2}):
        mine = copy.deepcopy(start)
        optimizer = torch.optim.SGD(mine.parameters(), 1.0, momentum=0.9, weight_decay=0.1)
        surgeon = gs.Surgeon(mine, optimizer, gs.Sum(), **options)
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                surgeon.step(batch=batch(B, 4), loss=lambda m, x: m(x))
        steps.append(list(mine.parameters()))
    plain = start
    optimizer = torch.optim.SGD(plain.parameters(), 1.0, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        held = list(plain.parameters())
        found = torch.autograd.grad(plain(batch(B, 4)).sum(), held)
        for p, grad in zip(held, found, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    for mine in steps:
        assert_equal([p.detach() for p in mine], [p.detach().flatten() for p in plain.parameters()])


@models
def test_a_row_given_away_is_right_or_refused_where_another_jacobian_has_it(name):
    model, forget, rows = made(name, ONE)
    retain, _ = jacobian_of(model, seed=7)
    both = gs.concat([forget, retain])
    wider = gs.concat([both, retain])
    ones = [torch.ones(1, dtype=torch.float64), weights_of(wider)]
    expected = [sums(model, rows, ones[0]), [each.flatten() for each in wider.combine(ones[1])]]
    both.backward(weights_of(both), release=True)
    for grad in all_grads(model):
        grad.fill_(7.0)
    for jacobian, weights, want in zip((forget, wider), ones, expected, strict=True):
        try:
            found = jacobian.combine(weights)
        except gs.InputError as error:
            assert "modified in place" in str(error)
            continue
        assert_equal(found, want)
        assert_own(all_grads(model), found)


def test_a_row_of_its_own_pass_is_scaled_in_its_place_where_nobody_else_has_it(alone):
    model, forget, _ = made("linear layers", ONE)
    retain, _ = jacobian_of(model, seed=7)
    both = gs.concat([forget, retain])
    place = both._uses[0][0].blocks.data_ptr()
    del forget, retain
    both.backward(weights_of(both), release=True)
    assert next(model.parameters()).grad.data_ptr() == place


@pytest.mark.parametrize(("name", "count"), [("linear layers", 0), ("added", 1), ("stacked", 1)])
def test_of_gradients_that_share_memory_all_but_one_are_copied(name, count, monkeypatch):
    torch.manual_seed(3)
    model, copied = MODELS[name](), []
    shapes = [p.shape for p in model.parameters()]
    real = torch.Tensor.clone

    def clone(self, *args, **kwargs):
        copied.extend([self.shape] if self.shape in shapes else [])
        return real(self, *args, **kwargs)

    with gs.tape(model) as tape:
        losses = model(batch(B, 4))
    monkeypatch.setattr(torch.Tensor, "clone", clone)
    jacobian = tape.jacobian(losses, ONE)
    assert len(copied) == count
    jacobian.backward(torch.ones(1))
    assert len(copied) == count


def test_own_tells_who_else_has_a_tensor():
    kept, whole = torch.randn(3), torch.randn(6)
    for given, alone in (
        ([torch.randn(3)], [True]),
        ([torch.randn(2, 3).T], [True]),
        ([torch.randn(2, 3)[1:]], [True]),
        ([kept], [False]),
        ([kept.view(3, 1)], [False]),
        ([whole[:3], whole[3:]], [False, False]),
        ([torch.randn(1, 3).expand(2, 3)], [False]),
        ([torch.randn(2, 6)[:, ::2]], [False]),
        ([None, torch.randn(3)], [True, True]),
    ):
        places = [None if t is None else t.data_ptr() for t in given]
        values = [None if t is None else t.clone() for t in given]
        found = grads.own(given)
        for place, value, out, stays in zip(places, values, found, alone, strict=True):
            assert out is None if value is None else torch.equal(out, value)
            assert out is None or (out.data_ptr() == place) == stays
    one = torch.randn(2, 3)
    pair = [one, one]
    del one
    first, second = grads.own(pair)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(grads.own([torch.eye(3).to_sparse()])[0], torch.eye(3))


# hooks


@some
@kinds
def test_hooks_after_accumulation_run_once_with_all_of_the_gradient(name, groups, combine):
    model, jacobian, _ = made(name, groups, combine)
    weights, seen = weights_of(jacobian), []
    expected = jacobian.combine(weights)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.register_post_accumulate_grad_hook(lambda p: seen.append((p, p.grad.clone())))
    jacobian.backward(weights)
    assert sorted(id(p) for p, _ in seen) == sorted(map(id, model.parameters()))
    by_id = {id(p): grad for p, grad in seen}
    assert_equal(
        [by_id[id(p)] for p in model.parameters()], [1 + each.flatten() for each in expected]
    )


def test_hooks_after_accumulation_run_for_stored_rows_too():
    model = nn.Linear(3, 1).double()
    jacobian = gs.DenseJacobian.from_model(
        model, torch.randn(4, 3).double(), lambda m, x: m(x)[:, 0]
    )
    seen = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append((p, p.grad.clone())))
    jacobian.backward(torch.ones(4))
    assert [p is q for (p, _), q in zip(seen, model.parameters(), strict=True)] == [True, True]
    assert all(torch.equal(p.grad, grad) for p, grad in seen)


@some
def test_a_hook_that_raises_leaves_no_gradient_in_part(name):
    model, jacobian, _ = made(name)
    weights = weights_of(jacobian)
    expected = [each.flatten() for each in jacobian.combine(weights)]

    def refuse(_):
        raise RuntimeError("no")

    for p in model.parameters():
        handle = p.register_post_accumulate_grad_hook(refuse)
        with pytest.raises(RuntimeError, match="no"):
            jacobian.backward(weights)
        for q, whole in zip(model.parameters(), expected, strict=True):
            if q.grad is not None:
                torch.testing.assert_close(q.grad.flatten(), whole, rtol=1e-10, atol=1e-12)
        assert p.grad is not None
        handle.remove()
        model.zero_grad()
    jacobian.backward(weights)
    assert_equal([p.grad for p in model.parameters()], expected)


@some
@kinds
def test_linear_hooks_on_parameters_act_as_in_an_ordinary_backward_pass(name, groups, combine):
    torch.manual_seed(3)
    model = MODELS[name]()
    for k, p in enumerate(model.parameters()):
        p.register_hook(lambda grad, k=k: (k + 2) * grad)
    jacobian, rows = jacobian_of(model, groups, combine)
    weights = weights_of(jacobian)
    jacobian.backward(weights)
    held = list(model.parameters())
    assert_equal([p.grad for p in held], sums(model, rows, weights))
    assert_own([p.grad for p in held])
    losses = model(batch(B, 4))
    index = torch.arange(B) if groups is None else groups
    expected = torch.autograd.grad((losses * weights[index]).sum(), held)
    assert_equal([p.grad for p in held], [grad.flatten() for grad in expected])


# rows that exist


def test_stored_rows_of_one_mean_are_blocks_of_their_own():
    for name in ("added", "stacked", "views added", "summed over a dimension", "scalars added"):
        torch.manual_seed(3)
        model = MODELS[name]()
        x = batch(B, 4)
        jacobian = gs.DenseJacobian.from_model(model, x, lambda m, x: m(x), rows="mean")
        assert_own(jacobian.blocks)
        found = torch.autograd.grad(model(x).mean(), list(model.parameters()))
        for block, grad in zip(jacobian.blocks, found, strict=True):
            torch.testing.assert_close(block[0], grad, rtol=1e-12, atol=1e-14)
        jacobian.backward(torch.ones(1, dtype=torch.float64))
        assert_own(all_grads(model), jacobian.blocks)


@pytest.mark.parametrize("rows", ["samples", "mean"])
def test_stored_rows_leave_the_layout_of_their_parameters(rows):
    torch.manual_seed(3)
    model = LastLayout()
    jacobian = gs.DenseJacobian.from_model(model, batch(B, 4), lambda m, x: m(x), rows=rows)
    weights = weights_of(jacobian)
    jacobian.backward(weights)
    for p, update in zip(model.parameters(), jacobian.combine(weights), strict=True):
        assert p.grad.stride() == p.stride()
        torch.testing.assert_close(p.grad, update, rtol=0, atol=0)


def test_a_rule_that_hands_out_its_rows_moves_each_parameter_once():
    class First(gs.surgery.elementwise.Elementwise):
        def _edit(self, blocks):
            return [blocks[0][0] for _ in blocks]

    a, b = parameter(3), parameter(3)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = a, b

        def forward(self, x):
            return x @ self.a + (x * x) @ self.b

    model, x = Two(), torch.randn(4, 3, dtype=torch.float64)
    before = [p.detach().clone() for p in (a, b)]
    seen = []

    class Clipped(torch.optim.SGD):
        def step(self, closure=None):
            nn.utils.clip_grad_norm_([a, b], 1e-3)
            seen.extend([a.grad, b.grad])
            return super().step(closure)

    gs.Surgeon(model, Clipped(model.parameters(), 1.0), First()).step(
        batch=x, loss=lambda m, x: m(x)
    )
    assert_own(seen)
    moved = torch.cat([p.detach() - q for p, q in zip((a, b), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_a_sparse_gradient_that_is_there_is_added_to():
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), Energy()).double()
    ids = torch.tensor([[0, 1], [2, 2], [5, 1]])
    model(ids).sum().backward()
    assert model[0].weight.grad.is_sparse
    dense = model[0].weight.grad.to_dense()
    with gs.tape(model) as tape:
        losses = model(ids)
    with pytest.warns(UserWarning, match="no formula for EmbeddingBackward0"):
        jacobian = tape.jacobian(losses)
    jacobian.backward(torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(model[0].weight.grad.to_dense(), 2 * dense)
