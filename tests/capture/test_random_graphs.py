"""Graphs of randomly chosen operations: the rows are exact, or refused, never wrong."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from tests.capture.oracle import check, loop

B, T, D = 4, 3, 4


class Pool(nn.Module):
    """Parameters of many kinds, any of which may be used any number of times."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.norm, self.mix = nn.LayerNorm(D), nn.Conv1d(D, D, 3, padding=1)
        self.table = nn.Parameter(torch.randn(5, D))
        self.scale, self.scalar = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(()))
        self.places = nn.Parameter(torch.randn(T, D))
        self.own = nn.Parameter(torch.randn(B, 1, D))


def steps(model, choose):
    """Each takes [B, T, D] to [B, T, D]; the last ones have samples meet."""
    index = torch.tensor([choose(5) for _ in range(B * T)]).view(B, T)
    k, t = choose(B), choose(T)
    order = torch.tensor([choose(B) for _ in range(B)])
    weight = {0: model.a.weight, 1: model.a.weight.t(), 2: model.a.weight * model.scalar}[choose(3)]

    def assigned(x):
        out = torch.zeros_like(x)
        out[:, 1:] = x[:, :-1]
        out[:, 0] = model.places[t]
        return out

    def one_sample(x):
        """Something is done to one sample only."""
        return torch.cat([x[:k], model.b(x[k : k + 1]) * model.scalar, x[k + 1 :]])

    def attention(x):
        return F.scaled_dot_product_attention(model.a(x), x, model.b(x))

    def as_rows(x):
        return (x.reshape(B * T, D) @ model.b.weight + model.scale).view(B, T, D)

    def time_first(x):
        return model.a(x.transpose(0, 1)).tanh().transpose(0, 1)

    def parts(x):
        left, right = x.chunk(2, -1)
        return torch.cat([right * model.scalar, left], -1)

    def stacked(x):
        return torch.stack([model.a(row) if i == k else row * 2 for i, row in enumerate(x)])

    plain = [
        lambda x: model.a(x),
        lambda x: F.linear(x, weight),
        lambda x: F.linear(x, model.table[:D], model.table[-1]),
        lambda x: model.norm(x),
        lambda x: x + model.mix(x.transpose(1, 2)).transpose(1, 2),
        lambda x: x * F.embedding(index, model.table),
        lambda x: x + model.table[index[:, 0]][:, None],
        lambda x: x * model.scale + model.scalar,
        lambda x: x + model.places,
        lambda x: x + model.own,
        lambda x: (x * model.own).tanh() + model.own.mean(),
        lambda x: x.softmax(-1) * 3,
        lambda x: x.softmax(1) * 3,
        lambda x: x.flip(1).sin(),
        lambda x: x.cumsum(1),
        lambda x: x.roll(1, 0),
        lambda x: x[order],
        lambda x: torch.where(x > 0, x, x * model.scale),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: torch.einsum("btd,tds->bts", x, model.places[..., None] * model.scale),
        lambda x: x.index_select(2, torch.tensor([2, 0, 1, 1])),
        lambda x: torch.maximum(x, model.places),
        assigned, one_sample, attention, as_rows, time_first, parts, stacked,
    ]  # fmt: skip
    junction = [
        lambda x: x - x.mean(0),
        lambda x: x.softmax(0),
        lambda x: x + x.roll(1, 0),
        lambda x: x.cumsum(0),
        lambda x: x.sort(0)[0],
        lambda x: x + x[k],
    ]
    return plain, junction


def program(model, seed):
    """A function from a batch to losses of one sample each, or of tokens, or of two at once."""
    generator = torch.Generator().manual_seed(seed)
    choose = lambda n: int(torch.randint(n, (), generator=generator))  # noqa: E731
    plain, junction = steps(model, choose)
    chosen = [plain[choose(len(plain))] for _ in range(2 + choose(5))]
    if choose(3) == 0:
        chosen.insert(choose(len(chosen) + 1), junction[choose(len(junction))])
    branch = choose(len(chosen) + 1)
    kind = choose(4)
    groups = [None, torch.randint(-1, 3, (B,), generator=generator)][choose(4) == 0]

    def forward(x):
        kept = x
        for i, step in enumerate(chosen):
            if i == branch:
                kept = x
            x = step(x).clamp(-5, 5)
        x = x + 0.5 * kept
        if kind == 0:
            return x.square().sum(2)
        losses = x.square().sum((1, 2))
        if kind == 1:
            return torch.cat([losses[:2], losses[2:] * model.scalar])
        if kind == 2:
            return losses + 0.1 * model.scale.square().sum()
        return losses

    if kind == 0 and groups is not None:
        groups = groups[:, None].expand(B, T).contiguous()
    return forward, groups


@pytest.mark.parametrize("coupled", ["refuse", "exact"])
@pytest.mark.parametrize("first", range(0, 120, 20))
def test_random_graphs(first, coupled):
    refused = 0
    for seed in range(first, first + 20):
        torch.manual_seed(seed)
        model = Pool().double()
        forward, groups = program(model, seed)
        if groups is not None and int(groups.max()) < 0:
            continue
        x = torch.randn(B, T, D, dtype=torch.float64)
        with gs.tape(model, coupled=coupled) as tape:
            losses = forward(x)
        if not losses.requires_grad:
            continue
        rows = loop(losses, model, groups)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                jacobian = tape.jacobian(losses, groups)
            except gs.InputError as error:
                assert coupled == "refuse" and "computes across samples" in str(error)
                refused += 1
                continue
        try:
            check(jacobian, model, rows)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
    assert refused <= 12
