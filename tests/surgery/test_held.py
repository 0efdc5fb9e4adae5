"""What OWM and NullSpace promise of a step: outputs on data observed stay, whatever steps."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import gradsurgery as gs
from gradsurgery.capture import tape

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0),
    "decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}


class Net(nn.Module):
    """A module of parameters by name and a function of them and the inputs."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return self.function(self, x)


def rows(*shape):
    return lambda n: torch.randn(n, *shape)


def tokens(vocabulary, length=5, half=True):
    """Data observed read the lower half of a vocabulary."""
    return lambda n: torch.randint(0, vocabulary if n > 4 else vocabulary // 2, (n, length))


def mlp():
    return nn.Sequential(
        nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)
    )


def only(model, part):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    return model


def padded():
    embedding = nn.Embedding(40, 6, padding_idx=1)
    nn.init.normal_(embedding.weight)
    return nn.Sequential(embedding, nn.Linear(6, 3))


def tied():
    model = nn.Sequential(nn.Embedding(40, 30), nn.Tanh(), nn.Linear(30, 40, bias=False))
    model[2].weight = model[0].weight
    return model


def lora(net, x):
    return F.linear(x, net.w.detach()) + F.linear(F.linear(x, net.a), net.b)


def normed(kind):
    return lambda: nn.Sequential(kind(nn.Linear(20, 16)), nn.Tanh(), kind(nn.Linear(16, 3)))


def convolutions(dims, **options):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return lambda: nn.Sequential(conv(4, 8, 3, **options), nn.Tanh(), conv(8, 8, 3, groups=8))


def attention(net, x):
    return net.layer(x, net.memory(x), net.memory(x), need_weights=False)[0]


# name: (model, data of n samples, whether anything may move)
MODELS = {
    "all weights": (mlp, rows(20), True),
    "biases alone": (lambda: only(mlp(), "bias"), rows(20), False),
    "second layer": (lambda: only(mlp(), "2."), rows(20), True),
    "weight norm": (normed(parametrizations.weight_norm), rows(20), False),
    "spectral norm": (normed(parametrizations.spectral_norm), rows(20), False),
    "orthogonal": (normed(parametrizations.orthogonal), rows(20), False),
    "norms": (
        lambda: nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 16), nn.GroupNorm(2, 16), nn.PReLU()),
        rows(20),
        True,
    ),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, 3)), rows(20), True),
    "convolution": (convolutions(2), rows(4, 5, 5), True),
    "grouped": (convolutions(2, groups=4, padding=1), rows(4, 3, 3), True),
    "grouped lines": (
        lambda: nn.Conv1d(20, 4, 8, groups=2, padding=1, stride=2),
        rows(20, 9),
        True,
    ),
    "depthwise": (lambda: nn.Conv1d(4, 8, 15, groups=4), rows(4, 16), True),
    "depth": (convolutions(3, groups=2), rows(4, 5, 5, 5), True),
    "transposed": (lambda: nn.ConvTranspose1d(40, 4, 3, stride=2), rows(40, 3), True),
    "transposed groups": (lambda: nn.ConvTranspose1d(40, 4, 3, groups=2), rows(40, 3), True),
    "reflected": (lambda: nn.Conv1d(4, 2, 9, padding=2, padding_mode="reflect"), rows(4, 7), True),
    "embedding": (lambda: nn.Sequential(nn.Embedding(40, 30), nn.Linear(30, 3)), tokens(40), True),
    "padded": (padded, tokens(40), True),
    "bags": (lambda: nn.Sequential(nn.EmbeddingBag(40, 30), nn.Linear(30, 3)), tokens(40), True),
    "largest of bags": (
        lambda: nn.Sequential(nn.EmbeddingBag(40, 30, mode="max"), nn.Linear(30, 3)),
        tokens(40),
        True,
    ),
    "positions": (
        lambda: Net(lambda net, x: net.head(net.words(x) + net.places[: x.shape[1]]),
                    words=nn.Embedding(40, 30), places=torch.randn(9, 30), head=nn.Linear(30, 3)),
        tokens(40),
        True,
    ),
    "positions looked up": (
        lambda: Net(lambda net, x: net.head(net.words(x) + net.places(torch.arange(x.shape[1]))),
                    words=nn.Embedding(40, 30), places=nn.Embedding(9, 30), head=nn.Linear(30, 3)),
        tokens(40),
        True,
    ),
    "scalar": (
        lambda: Net(lambda net, x: net.scale * net.head(x),
                    scale=torch.ones(()), head=nn.Linear(20, 3)),
        rows(20),
        True,
    ),
    "vector": (
        lambda: Net(lambda net, x: (net.body(x).tanh() @ net.v)[:, None],
                    body=nn.Linear(20, 9), v=torch.randn(9)),
        rows(20),
        True,
    ),
    "tied vocabulary": (tied, tokens(40), True),
    "tied autoencoder": (
        lambda: Net(lambda net, x: F.linear(x, net.w).tanh() @ net.w, w=torch.randn(15, 20)),
        rows(20),
        True,
    ),
    "layer used twice": (
        lambda: Net(lambda net, x: net.layer(net.layer(x).tanh()), layer=nn.Linear(20, 20)),
        rows(20),
        True,
    ),
    "weight and its norm": (
        lambda: Net(lambda net, x: F.linear(x, net.w) + F.linear(x, net.w / net.w.norm()),
                    w=torch.randn(3, 20)),
        rows(20),
        False,
    ),
    "weight and its norm, without gradients": (
        lambda: Net(lambda net, x: net.head(F.linear(x, net.w) / net.w.detach().norm()),
                    w=torch.randn(9, 20), head=nn.Linear(9, 3)),
        rows(20),
        True,
    ),
    "features without gradients": (
        lambda: Net(lambda net, x: net.head(net.body(x).detach() if len(x) == 4 else net.body(x)),
                    body=nn.Linear(20, 9), head=nn.Linear(9, 3)),
        rows(20),
        True,
    ),
    "weight and a penalty": (
        lambda: Net(lambda net, x: F.linear(x, net.w) * net.w.square().sum(), w=torch.randn(3, 20)),
        rows(20),
        False,
    ),
    "adapter": (
        lambda: Net(lora, w=torch.randn(9, 20), a=torch.randn(4, 20), b=torch.randn(9, 4)),
        rows(20),
        True,
    ),
    "adapter at its start": (
        lambda: Net(lora, w=torch.randn(9, 20), a=torch.randn(8, 20), b=torch.zeros(9, 8)),
        rows(20),
        True,
    ),
    "merged adapter": (
        lambda: Net(lambda net, x: F.linear(x, net.w + net.b @ net.a),
                    w=torch.randn(9, 20), a=torch.randn(4, 20), b=torch.randn(9, 4)),
        rows(20),
        False,
    ),
    "recurrent": (
        lambda: Net(lambda net, x: net.cell(x)[0], cell=nn.GRU(40, 30, batch_first=True)),
        rows(3, 40),
        True,
    ),
    "attention": (
        lambda: Net(attention, layer=nn.MultiheadAttention(40, 2, batch_first=True),
                    memory=nn.Linear(40, 40)),
        rows(3, 40),
        True,
    ),
    "experts": (
        lambda: Net(lambda net, x: torch.bmm(x.view(-1, 2, 20).movedim(1, 0), net.w).movedim(0, 1),
                    w=torch.randn(2, 20, 5)),
        rows(40),
        True,
    ),
    "chunks of one weight": (
        lambda: Net(lambda net, x: F.linear(x, net.w[:3]) + F.linear(x.flip(1), net.w[3:]),
                    w=torch.randn(6, 20)),
        rows(20),
        True,
    ),
    "einsum": (
        lambda: Net(lambda net, x: torch.einsum("btd,dhk->bthk", x, net.w),
                    w=torch.randn(40, 2, 3)),
        rows(3, 40),
        False,
    ),
    "bilinear": (
        lambda: Net(lambda net, x: net.f(x, x.tanh()), f=nn.Bilinear(8, 8, 3)),
        rows(8),
        False,
    ),
    "head not used": (
        lambda: Net(lambda net, x: net.head(x), head=nn.Linear(20, 3), other=nn.Linear(20, 3)),
        rows(20),
        True,
    ),
}  # fmt: skip


def loss(model, batch):
    return model(batch[0]).flatten(1).square().sum(1)


def wavy(model, batch):
    return (model(batch[0]).flatten(1) - 1).square().sum(1)


def built(name, seed=0):
    torch.manual_seed(seed)
    make, data, moves = MODELS[name]
    model = make().double().eval()
    past, new = data(4), data(8)
    if past.is_floating_point():
        past, new = past.double(), new.double()
    return model, past, new, moves


def moved(before, model):
    return {n: float((p - before[n]).abs().max()) for n, p in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*there is no formula for.*")
@pytest.mark.parametrize(
    "name, optimizer",
    [(name, ("momentum", "decay")[k % 2]) for k, name in enumerate(MODELS)]
    + [("norms", optimizer) for optimizer in OPTIMIZERS],
)
def test_outputs_on_observed_data_stay(name, optimizer):
    model, past, new, moves = built(name)
    stepped = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    kept = gs.NullSpace(model)
    surgeon = gs.Surgeon(model, stepped, gs.Mean(), project=kept)
    surgeon.step(batch=(new,), loss=wavy)  # momentum from before
    kept.observe((past,), loss)
    before, state = model(past).detach(), copy.deepcopy(model.state_dict())
    for _ in range(5):
        surgeon.step(batch=(new,), loss=wavy)
    torch.testing.assert_close(model(past).detach(), before, rtol=0, atol=1e-9)
    found = moved(state, model)
    assert (max(found.values()) > 1e-4) == moves, found


def test_holds_over_many_steps():
    model, past, new, _ = built("all weights")
    kept = gs.NullSpace(model)
    kept.observe((past,), loss)
    before = model(past).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    surgeon = gs.Surgeon(model, optimizer, gs.Mean(), project=kept)
    first = wavy(model, (new,)).mean()
    for _ in range(100):
        surgeon.step(batch=(new,), loss=wavy)
    torch.testing.assert_close(model(past).detach(), before, rtol=0, atol=1e-9)
    assert wavy(model, (new,)).mean() < 0.7 * first


def near_dependent():
    """Inputs with singular values from 1 to 1e-8: all but the first few vanish when squared."""
    u, v = (torch.linalg.qr(torch.randn(n, n).double()).Q for n in (24, 20))
    return u[:, :9] @ torch.diag(10.0 ** -torch.arange(9).double()) @ v[:9] * 20


@pytest.mark.parametrize(
    "kind, optimizer",
    [(gs.NullSpace, "sgd"), (gs.NullSpace, "momentum"), (gs.NullSpace, "adam"), (gs.OWM, "adamw")],
)
def test_holds_over_a_thousand_steps(kind, optimizer):
    """A gradient that has the same sign in every step takes Adam's weights as far as they go."""
    torch.manual_seed(0)
    model, past = nn.Linear(20, 4, bias=False).double(), near_dependent()
    kept = kind(model)
    for part in past.split(6):
        kept.observe((part,), loss)
    before, start = model(past).detach(), model.weight.detach().clone()
    stepped = OPTIMIZERS[optimizer](model.parameters())
    signs = torch.randn(4, 20).double().sign()
    for _ in range(1200):
        model.weight.grad = signs.clone()
        with kept.steps():
            stepped.step()
    assert (model.weight - start).norm() > 50
    torch.testing.assert_close(model(past).detach(), before, rtol=0, atol=1e-6)


def test_few_bits_drift_as_their_rounding_adds_up():
    """Each step rounds each weight once, and a step like the last may round the same way."""
    torch.manual_seed(0)
    model, past = nn.Linear(20, 4, bias=False), torch.randn(6, 20)
    kept = gs.NullSpace(model)
    kept.observe((past,), loss)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    signs, steps = torch.randn(4, 20).sign(), 400
    before = F.linear(past.double(), model.weight.double()).detach()
    for _ in range(steps):
        model.weight.grad = signs.clone()
        with kept.steps():
            optimizer.step()
    drift = (F.linear(past.double(), model.weight.double()) - before).abs().max()
    largest = F.linear(past.abs(), model.weight.abs()).max()
    assert drift < steps * 2.0**-24 * largest
    assert (model.weight.abs().mean() > 0.1) and drift < 1e-4


@pytest.mark.parametrize("alpha", [1e-3, 1e-1, 10.0])
def test_alpha_bounds_what_outputs_move_by(alpha):
    torch.manual_seed(0)
    model = nn.Linear(20, 4, bias=False).double()
    past = near_dependent()
    kept = gs.OWM(model, alpha=alpha)
    kept.observe((past,), loss)
    step = torch.randn(4, 20).double()
    moved = past @ kept(["weight"], [step])[0].mT
    assert 1e-9 < moved.norm() <= alpha**0.5 / 2 * step.norm()
    exact = torch.linalg.inv(torch.eye(20).double() + past.mT @ past / alpha)
    torch.testing.assert_close(moved, past @ exact @ step.mT, rtol=0, atol=1e-9)


def test_rtol_bounds_what_outputs_move_by():
    torch.manual_seed(0)
    layer = nn.Linear(12, 3).double()
    past, new = torch.randn(40, 12).double(), torch.randn(8, 12).double()
    past = past * 10.0 ** -torch.arange(12)
    for rtol in (0.0, 1e-12, 1e-6, 1e-3):
        model = copy.deepcopy(layer)
        kept = gs.NullSpace(model, rtol=rtol)
        kept.observe((past,), loss)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        gs.Surgeon(model, optimizer, gs.Mean(), project=kept).step(batch=(new,), loss=wavy)
        step = (model.weight - layer.weight).norm()
        largest = torch.linalg.eigvalsh(past.mT @ past)[-1]
        change = (model(past) - layer(past)).norm()
        assert change <= (max(rtol, 48 * 2.3e-16) * largest).sqrt() * step * 1.001
        assert step > 1e-3


def test_optimizers_see_the_gradients_as_they_are():
    """As the paper has it: Adam's moments are of gradients, and its step is projected."""
    model, past, new, _ = built("second layer")
    plain = copy.deepcopy(model)
    kept = gs.NullSpace(model)
    kept.observe((past,), loss)
    hidden = model[:2](past).detach()
    projector = torch.eye(16).double() - torch.linalg.pinv(hidden) @ hidden
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    gs.Surgeon(model, optimizer, gs.Mean(), project=kept).step(batch=(new,), loss=wavy)
    free = torch.optim.Adam(plain.parameters(), lr=1e-2)
    before = plain[2].weight.detach().clone()
    gs.Surgeon(plain, free, gs.Mean()).step(batch=(new,), loss=wavy)
    step = (plain[2].weight - before) @ projector
    torch.testing.assert_close(model[2].weight - before, step, rtol=0, atol=1e-12)
    seen = optimizer.state[model[2].weight]["exp_avg"], free.state[plain[2].weight]["exp_avg"]
    torch.testing.assert_close(*seen, rtol=0, atol=0)


def test_steps_holds_a_loop_of_ones_own():
    model, past, new, _ = built("norms")
    kept = gs.NullSpace(model)
    kept.observe((past,), loss)
    before = model(past).detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        wavy(model, (new,)).mean().backward()
        with kept.steps():
            optimizer.step()
    torch.testing.assert_close(model(past).detach(), before, rtol=0, atol=1e-9)


def test_what_raises_in_a_step_leaves_parameters():
    model, past, _, _ = built("all weights")
    kept = gs.NullSpace(model)
    kept.observe((past,), loss)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), kept.steps():
        with torch.no_grad():
            model[0].weight += 1
            model[0].bias += 1
        raise KeyboardInterrupt
    assert not any(moved(before, model).values())


def test_rows_of_an_embedding_that_were_read_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 2)).double()
    nn.init.normal_(model[0].weight)
    kept = gs.NullSpace(model)
    kept.observe((torch.tensor([[0, 2], [5, 2]]),), loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    before = model[0].weight.detach().clone()
    everything = torch.arange(9)[:, None]
    gs.Surgeon(model, optimizer, gs.Mean(), project=kept).step(batch=(everything,), loss=wavy)
    same = (model[0].weight == before).all(1)
    assert same.nonzero().flatten().tolist() == [0, 2, 5]


def test_moments_of_groups_and_picked_rows():
    torch.manual_seed(0)
    conv, x = nn.Conv1d(4, 6, 3, groups=2).double(), torch.randn(5, 4, 8).double()
    patches = F.unfold(x[:, :, None], (1, 3)).unflatten(1, (2, -1)).movedim(2, 3)
    expected = torch.einsum("ngtd,ngte->gde", patches, patches)
    with tape(conv) as recorder:
        jacobian = recorder.jacobian(loss(conv, (x,)))
    torch.testing.assert_close(jacobian.inputs_seen()[0], {1: expected})
    assert jacobian.inputs_seen()[1] is None
    table = nn.Embedding(4, 3)
    with tape(table) as recorder:
        jacobian = recorder.jacobian(loss(table, (torch.tensor([[0, 3], [0, 0]]),)))
    (seen,) = jacobian.inputs_seen()
    assert seen is not None and seen[0].flatten().tolist() == [3, 0, 0, 1]


def test_names_what_is_not_held():
    model, past, new, _ = built("norms")
    kept = gs.NullSpace(model, others="leave")
    assert kept.not_held == []
    kept.observe((past,), loss)
    assert kept.not_held == ["0.weight", "0.bias", "1.bias", "2.weight", "2.bias", "3.weight"]
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    gs.Surgeon(model, optimizer, gs.Mean(), project=kept).step(batch=(new,), loss=wavy)
    found = moved(before, model)
    assert all(found[name] > 0 for name in kept.not_held)


def test_what_observed_losses_do_not_depend_on_is_free():
    model, past, new, _ = built("head not used")
    kept = gs.NullSpace(model)
    kept.observe((past,), loss)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    surgeon = gs.Surgeon(model, optimizer, gs.Mean(), project=kept)
    surgeon.step(batch=(new,), loss=lambda net, batch: net.other(batch[0]).square().sum(1))
    found = moved(before, model)
    assert found["other.weight"] > 0 and found["other.bias"] > 0 and not found["head.weight"]


def test_refuses_parameters_that_were_not_observed():
    model, past, new, _ = built("all weights")
    model[2].requires_grad_(False)
    kept = gs.NullSpace(model, others="leave")
    kept.observe((past,), loss)
    model[2].requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for observed in (False, True):
        if observed:  # the data observed before are still not known to it
            kept.observe((new,), loss)
        with pytest.raises(gs.InputError, match=r"2.weight was frozen, or not there, when"):
            gs.Surgeon(model, optimizer, gs.Mean(), project=kept).step(batch=(new,), loss=wavy)
    assert not any(moved(before, model).values())
    kept = gs.NullSpace(model)
    only(model, "0.")
    kept.observe((past,), loss)
    only(model, "2.")
    with pytest.raises(gs.InputError, match="no parameter trained now was trained when"):
        kept.observe((past,), loss)


def test_refuses_inputs_of_random_draws():
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    kept, x = gs.NullSpace(model), torch.randn(3, 5)
    with pytest.raises(gs.InputError, match=r"random numbers were drawn by 1 while"):
        kept.observe((x,), loss)
    assert kept.state_dict() == {}
    model.eval()
    kept.observe((x,), loss)
    functional = Net(lambda net, x: net.body(F.dropout(x)), body=nn.Linear(5, 3))
    with pytest.raises(gs.InputError, match=r"random numbers were drawn while"):
        gs.OWM(functional).observe((x,), loss)


def test_a_refused_observation_leaves_buffers():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gs.InputError, match="computes across samples"):
        gs.NullSpace(model).observe((torch.randn(3, 5),), loss)
    assert not any(moved(before, model).values())


def test_refuses_inputs_that_are_not_finite():
    model = Net(lambda net, x: torch.where(x > 1, 0, net.body(x)), body=nn.Linear(1, 1, bias=False))
    with pytest.raises(gs.NonFiniteError, match=r"inputs of body.weight are not finite"):
        gs.NullSpace(model).observe((torch.tensor([[0.5], [torch.inf]]),), loss)


def test_refuses_steps_that_can_move_nothing():
    layer = nn.Linear(5, 3).double()
    past, new = torch.randn(9, 5).double(), torch.randn(4, 5).double()
    kept = gs.NullSpace(layer)
    kept.observe((past,), loss)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    with pytest.raises(gs.InputError, match=r"leave no direction to weight: .* rtol above 0"):
        gs.Surgeon(layer, optimizer, gs.Mean(), project=kept).step(batch=(new,), loss=wavy)


def test_observed_twice_is_observed_together():
    model, past, new, _ = built("tied vocabulary")
    apart, together = gs.OWM(model), gs.OWM(model)
    apart.observe((past,), loss)
    apart.observe((new,), loss)
    together.observe((torch.cat([past, new]),), loss)
    torch.testing.assert_close(apart.state_dict(), together.state_dict())
    assert set(apart.state_dict()["0.weight"]) == {0, 1}


def test_a_group_added_later_is_held_by_its_name():
    model, past, new, _ = built("all weights")
    optimizer = torch.optim.Adam(model[4].parameters(), lr=1e-2)
    kept = gs.NullSpace(model)
    kept.observe((past,), loss)
    before = model(past).detach()
    optimizer.add_param_group({"params": list(model[0].parameters())})
    surgeon = gs.Surgeon(model, optimizer, gs.Mean(), project=kept)
    for _ in range(3):
        surgeon.step(batch=(new,), loss=wavy)
    torch.testing.assert_close(model(past).detach(), before, rtol=0, atol=1e-9)


STATES = {
    "a tuple": (lambda eye: (1, eye), "expected a dict or None, got tuple"),
    "a number": (lambda eye: 3, "expected a dict or None, got int"),
    "a third dimension": (lambda eye: {2: eye}, "its keys must be the dimensions 0 or 1"),
    "true": (lambda eye: {True: eye}, "its keys must be the dimensions 0 or 1"),
    "no tensor": (lambda eye: {1: [1.0]}, r"\[1\] must be a Tensor, got list"),
    "a matrix": (lambda eye: {1: eye[0]}, r"\[1\] is \[5, 5\], and the parameter \[3, 5\]"),
    "other inputs": (lambda eye: {1: eye[..., :3]}, r"\[1\] is \[1, 5, 3\], and the parameter"),
    "divisors": (lambda eye: {1: eye[..., :1]}, r"\[1\] is \[1, 5, 1\], and the parameter"),
    "groups": (lambda eye: {1: eye.expand(2, -1, -1)}, r"\[1\] is \[2, 5, 5\], and the parameter"),
    "as columns": (lambda eye: {0: eye}, r"\[0\] is \[1, 5, 5\], and the parameter"),
    "no inputs": (lambda eye: {1: eye[..., :0]}, r"\[1\] is \[1, 5, 0\], and the parameter"),
    "float32": (lambda eye: {1: eye.float()}, r"\[1\] must be float64, got torch.float32"),
    "whole numbers": (lambda eye: {1: eye.long()}, r"\[1\] must be float64, got torch.int64"),
    "nan": (lambda eye: {1: eye / eye}, r"\[1\] has NaN or infinity"),
    "infinity": (lambda eye: {1: 1 / eye}, r"\[1\] has NaN or infinity"),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("kind", [gs.OWM, gs.NullSpace])
def test_refuses_a_state_that_does_not_fit(kind, name):
    make, message = STATES[name]
    eye = torch.eye(5).double()[None]
    layer = nn.Linear(5, 3).double()
    kept = kind(layer)
    kept.observe((torch.randn(2, 5).double(),), loss)
    update = [torch.randn(3, 5).double(), torch.randn(3).double()]
    before, held = copy.deepcopy(kept.state_dict()), kept(["weight", "bias"], update)
    for state in ({"bias": None, "weight": make(eye)}, {"weight": make(eye), "bias": None}):
        with pytest.raises(gs.InputError, match=f"state of weight is not that .*: {message}"):
            kept.load_state_dict(state)
    with pytest.raises(gs.InputError, match="state is of a parameter head, which the model has"):
        kept.load_state_dict({"weight": {1: eye}, "head": None})
    torch.testing.assert_close(kept.state_dict(), before, rtol=0, atol=0)
    assert all(map(torch.equal, kept(["weight", "bias"], update), held))


def test_a_state_of_both_dimensions_must_let_both_be_held():
    kept = gs.NullSpace(Net(lambda net, x: x, w=torch.randn(4, 5)))
    pairs, eye = torch.eye(2).double().expand(2, 2, 2), torch.eye(5).double()
    kept.load_state_dict({"w": {0: pairs, 1: eye[None]}})
    with pytest.raises(gs.InputError, match=r"state of w .* off its \[0\] would not be off its"):
        kept.load_state_dict({"w": {0: pairs, 1: eye.expand(4, 5, 5)}})


@pytest.mark.parametrize("name", [n for n in MODELS if MODELS[n][2]])
@pytest.mark.filterwarnings("ignore:.*there is no formula for.*")
def test_every_state_fits_its_model(name):
    model, past, _, _ = built(name)
    kept, again = gs.NullSpace(model), gs.NullSpace(model)
    kept.observe((past,), loss)
    again.load_state_dict(copy.deepcopy(kept.state_dict()))
    torch.testing.assert_close(again.state_dict(), kept.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.2)])
def test_in_few_bits_outputs_stay_up_to_rounding(dtype, limit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    past, new = torch.randn(4, 20).to(dtype), torch.randn(8, 20).to(dtype)
    kept = gs.NullSpace(model)
    kept.observe((past,), loss)
    before, old = model(past).detach(), model(new).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    surgeon = gs.Surgeon(model, optimizer, gs.Mean(), project=kept)
    for _ in range(20):
        surgeon.step(batch=(new,), loss=wavy)
    assert (model(past) - before).abs().max() < limit
    assert (model(new) - old).abs().max() > 5 * limit


def test_holds_under_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
    past, new = torch.randn(4, 20), torch.randn(8, 20)
    kept = gs.NullSpace(model)
    with torch.autocast("cpu", torch.bfloat16):
        kept.observe((past,), lambda net, batch: loss(net, batch).float())
    assert kept.not_held == ["0.bias", "2.bias"]
    weight, optimizer = (
        model[0].weight.detach().clone(),
        torch.optim.SGD(model.parameters(), lr=0.1),
    )
    gs.Surgeon(model, optimizer, gs.Mean(), project=kept).step(batch=(new,), loss=wavy)
    change = (model[0].weight - weight).detach()
    assert change.norm() > 1e-3
    assert (past.bfloat16().float() @ change.mT).abs().max() < 1e-5


def test_a_parameter_with_other_uses_has_no_moments():
    model, past, _, _ = built("weight and its norm")
    with tape(model) as recorder:
        jacobian = recorder.jacobian(loss(model, (past,)))
    assert jacobian.inputs_seen() == [None]
    assert jacobian.input_moments() == [None]
