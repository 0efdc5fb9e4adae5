"""Dense layers, products, normalisation, direct parameters and weights computed from parameters."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.capture.zoo_entry import (
    EVERY_DTYPE,
    Entry,
    Made,
    classify,
    labelled,
    sequences,
    squares,
    sums,
    vectors,
)

WIDTH = {"width": (5, 1, 2, 8)}
HIDDEN = {**WIDTH, "hidden": (6, 2, 4)}
TOKENS = {"width": (6, 2, 4), "tokens": (4, 1, 2, 7)}

ACTIVATIONS = {
    "relu in place": lambda s: nn.ReLU(inplace=True),
    "gelu": lambda s: nn.GELU(),
    "gelu tanh": lambda s: nn.GELU(approximate="tanh"),
    "silu": lambda s: nn.SiLU(),
    "softplus": lambda s: nn.Softplus(),
    "mish": lambda s: nn.Mish(),
    "elu": lambda s: nn.ELU(),
    "leaky relu": lambda s: nn.LeakyReLU(),
    "hardswish": lambda s: nn.Hardswish(),
    "softmax": lambda s: nn.Softmax(-1),
    "prelu": lambda s: nn.PReLU(),
    "prelu per channel": lambda s: nn.PReLU(s.hidden),
    "rrelu": lambda s: nn.RReLU(),
    "dropout": lambda s: nn.Dropout(),
    "layer norm": lambda s: nn.LayerNorm(s.hidden),
    "rms norm": lambda s: nn.RMSNorm(s.hidden),
    "batch norm": lambda s: nn.BatchNorm1d(s.hidden),
    "group norm": lambda s: nn.GroupNorm(1, s.hidden),
}


def _mlp(activation):
    return Entry(
        lambda s: nn.Sequential(
            nn.Linear(s.width, s.hidden), activation(s), nn.Linear(s.hidden, 3)
        ),
        labelled(vectors),
        classify,
        HIDDEN,
    )


def _between(function, grow=1):
    """Two linear layers with a function between them; the first is `grow` times wider."""
    return Entry(
        lambda s: Made(
            lambda m, x: m.b(function(m.a(x))),
            a=nn.Linear(s.width, grow * s.hidden),
            b=nn.Linear(s.hidden, 3),
        ),
        vectors,
        squares,
        HIDDEN,
    )


def _of(function, batch=vectors, shapes=WIDTH, loss=squares, **parts):
    """A function of the inputs and of parts; each part is built from the shape."""
    return Entry(
        lambda s: Made(function, **{name: part(s) for name, part in parts.items()}),
        batch,
        loss,
        shapes,
    )


def _linear(out):
    return lambda s: nn.Linear(s.width, out)


def _square():
    return lambda s: nn.Linear(s.width, s.width)


def _weights(*sizes):
    """A parameter; "w" stands for the width."""
    return lambda s: torch.randn([s.width if n == "w" else n for n in sizes])


def _pair(size, shape):
    return torch.randn(size, shape.width), torch.randn(size, 3)


def _bilinear(s):
    return nn.Bilinear(s.width, 3, 4)


def _dense_skip(m, x):
    x = torch.cat([x, m.a(x).tanh()], 1)
    x = torch.cat([x, m.b(x).tanh()], 1)
    return m.c(x)


def _highway(m, x):
    gate = m.gate(x).sigmoid()
    return gate * m.a(x).relu() + (1 - gate) * x


def _qkv_slices(m, x):
    q, k, v = (F.linear(x, w, b) for w, b in zip(m.w.chunk(3), m.bias.chunk(3), strict=True))
    return (q @ k.mT).softmax(-1) @ v


def _linears(m, x):
    for layer in m.layers:
        x = x + layer(x).tanh()
    return x


def _shared_in_two(s):
    a, b = nn.Linear(s.width, s.width), nn.Linear(s.width, s.width)
    b.weight = a.weight
    return nn.Sequential(a, nn.Tanh(), b)


def _parametrized(parametrize):
    return Entry(
        lambda s: nn.Sequential(
            parametrize(nn.Linear(s.width, 4)), nn.Tanh(), parametrize(nn.Linear(4, 3))
        ),
        vectors,
        squares,
        WIDTH,
    )


DENSE = {
    "linear": Entry(lambda s: nn.Linear(s.width, 3), labelled(vectors), classify, WIDTH),
    **{f"mlp {name}": _mlp(activation) for name, activation in ACTIVATIONS.items()},
    "mlp glu": _between(F.glu, 2),
    "mlp swiglu": _between(lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], 2),
    "mlp maxout": _between(lambda x: x.unflatten(1, (-1, 3)).amax(2), 3),
    "mlp maxout with indices": _between(lambda x: x.unflatten(1, (-1, 3)).max(2).values, 3),
    "mlp in place": _between(lambda x: x.mul_(0.5).add_(0.1).tanh_()),
    "mlp normalised": _between(lambda x: F.normalize(x, dim=1)),
    "mlp sorted": _between(lambda x: x.sort(1).values),
    "mlp cumulated": _between(lambda x: x.cumsum(1) + x.flip(1)),
    "mlp where clamp": _between(lambda x: torch.where(x > 0, x.clamp(max=0.5), x.expm1())),
    "mlp filled": _between(lambda x: x.index_fill(1, torch.tensor([0]), 2.0) * x.square()),
    "mlp without bias": Entry(
        lambda s: nn.Sequential(
            nn.Linear(s.width, s.hidden, bias=False), nn.Tanh(), nn.Linear(s.hidden, 3, bias=False)
        ),
        vectors,
        sums,
        HIDDEN,
    ),
    "linear on sequences": Entry(
        lambda s: nn.Sequential(nn.Linear(s.width, 4), nn.Tanh(), nn.Linear(4, 3)),
        sequences,
        squares,
        TOKENS,
    ),
    "linear on four leading dims": Entry(
        lambda s: nn.Sequential(nn.Linear(s.width, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)),
        lambda b, s: (torch.randn(b, s.tokens, 2, 3, s.width),),
        sums,
        TOKENS,
    ),
    "linear across tokens": _of(
        lambda m, x: m.b(m.a(x).tanh().mT).mT,
        sequences,
        TOKENS,
        a=_square(),
        b=lambda s: nn.Linear(s.tokens, 3),
    ),
    "linear, samples in the middle": _of(
        lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh().contiguous()).transpose(0, 1),
        sequences,
        TOKENS,
        a=_square(),
        b=_linear(2),
    ),
    "matmul": _of(lambda m, x: (x @ m.a).tanh() @ m.b, a=_weights("w", 4), b=_weights(4, 3)),
    "matmul from the left": _of(lambda m, x: (m.a @ x.mT).tanh().mT, a=_weights(4, "w"), loss=sums),
    "addmm": _of(
        lambda m, x: torch.addmm(m.b, x, m.a, beta=0.5, alpha=2), a=_weights("w", 4), b=_weights(4)
    ),
    "matrix vector": _of(lambda m, x: (x @ m.a).unsqueeze(1), a=_weights("w")),
    "addmv": _of(lambda m, x: torch.addmv(m.b, x, m.a).tanh(), a=_weights("w"), b=_weights(1)),
    "bmm": _of(
        lambda m, x: torch.bmm(x.transpose(0, 1), m.a).transpose(0, 1).tanh(),
        sequences,
        TOKENS,
        a=lambda s: torch.randn(s.tokens, s.width, 3),
    ),
    "baddbmm": _of(
        lambda m, x: torch.baddbmm(m.b, x, m.a.expand(len(x), -1, -1)),
        sequences,
        TOKENS,
        a=_weights("w", 3),
        b=_weights(1, 1, 3),
    ),
    "einsum": _of(
        lambda m, x: torch.einsum("btd,dhe->bhte", x, m.a).tanh(),
        sequences,
        TOKENS,
        a=_weights("w", 2, 3),
    ),
    "einsum of two parameters": _of(
        lambda m, x: torch.einsum("btd,dr,re->bte", x, m.a, m.b),
        sequences,
        TOKENS,
        a=_weights("w", 2),
        b=_weights(2, 3),
    ),
    "einsum per token": _of(
        lambda m, x: torch.einsum("btd,tde->bte", x, m.a),
        sequences,
        TOKENS,
        a=lambda s: torch.randn(s.tokens, s.width, 3),
    ),
    "tensordot": _of(
        lambda m, x: torch.tensordot(x, m.a, dims=([1, 2], [1, 0])),
        sequences,
        TOKENS,
        a=lambda s: torch.randn(s.width, s.tokens, 3),
    ),
    "quadratic form": _of(
        lambda m, x: torch.stack([(x @ m.a * x).sum(1), (x * m.b).sum(-1) ** 2], 1),
        a=_weights("w", "w"),
        b=_weights("w"),
    ),
    "bilinear": Entry(
        lambda s: Made(lambda m, x, y: m.a(x, y).tanh(), a=_bilinear(s)),
        _pair,
        squares,
        WIDTH,
        falls_back=EVERY_DTYPE,
    ),
    "residual": _of(
        _linears, a=_square(), layers=lambda s: nn.ModuleList(_square()(s) for _ in range(3))
    ),
    "dense skip": _of(
        _dense_skip,
        a=_linear(4),
        b=lambda s: nn.Linear(s.width + 4, 3),
        c=lambda s: nn.Linear(s.width + 7, 2),
    ),
    "highway": _of(_highway, a=_square(), gate=_square()),
    # direct parameters
    "scale and shift": _of(
        lambda m, x: m.scale * m.a(x) + m.shift, a=_square(), scale=_weights("w"), shift=_weights(1)
    ),
    "temperature": _of(
        lambda m, x: m.a(x) / m.temperature.exp(),
        labelled(vectors),
        loss=classify,
        a=_linear(3),
        temperature=lambda s: torch.tensor(0.3),
    ),
    "only a scalar": _of(lambda m, x: (m.a * x).tanh(), a=lambda s: torch.tensor(1.5)),
    "scale per token": _of(
        lambda m, x: (x * m.scale + m.shift).tanh(),
        sequences,
        TOKENS,
        scale=lambda s: torch.randn(s.tokens, 1),
        shift=lambda s: torch.randn(1, s.tokens, s.width),
    ),
    "scale after transposing": _of(
        lambda m, x: (x.mT * m.scale[:, None]).tanh() ** 2, sequences, TOKENS, scale=_weights("w")
    ),
    "bias by cat": _of(
        lambda m, x: torch.cat([x, m.bias.expand(len(x), -1)], 1) @ m.a,
        a=lambda s: torch.randn(s.width + 2, 3),
        bias=_weights(1, 2),
    ),
    "lerp and addcmul": _of(
        lambda m, x: torch.addcmul(m.a, x, m.b).lerp(x, m.c.sigmoid()),
        a=_weights("w"),
        b=_weights("w"),
        c=_weights("w"),
    ),
    "power of a parameter": _of(lambda m, x: x.abs().add(0.1) ** m.a, a=_weights("w")),
    "centres by cdist": replace(
        _of(lambda m, x: torch.cdist(x, m.a).neg().exp(), a=_weights(4, "w")),
        falls_back=EVERY_DTYPE,
    ),
    "centres by difference": _of(
        lambda m, x: (x[:, None] - m.a).square().sum(-1).neg().exp(), a=_weights(4, "w")
    ),
    # weights computed from parameters
    "weight norm": _parametrized(parametrizations.weight_norm),
    "spectral norm": _parametrized(parametrizations.spectral_norm),
    "orthogonal": _parametrized(parametrizations.orthogonal),
    "low rank update": _of(
        lambda m, x: F.linear(x, m.w + m.b @ m.a),
        w=_weights(4, "w"),
        a=_weights(2, "w"),
        b=_weights(4, 2),
    ),
    "expanded weight": _of(lambda m, x: F.linear(x, m.w.expand(3, -1)).tanh(), w=_weights("w")),
    "cat of two parameters": _of(
        lambda m, x: F.linear(x, torch.cat([m.a, m.b])), a=_weights(3, "w"), b=_weights(2, "w")
    ),
    "indexed parameter": _of(
        lambda m, x: F.linear(x, m.a[[2, 0, 2, 4]]).tanh() + m.b[1],
        a=_weights(5, "w"),
        b=_weights(3),
    ),
    "mix of parameters": _of(
        lambda m, x: x @ torch.einsum("k,kde->de", m.mix.softmax(0), m.basis),
        mix=_weights(3),
        basis=_weights(3, "w", 4),
    ),
    "fused qkv in slices": _of(
        _qkv_slices,
        sequences,
        TOKENS,
        w=lambda s: torch.randn(3 * s.width, s.width),
        bias=lambda s: torch.randn(3 * s.width),
    ),
    "matrix exponential": _of(
        lambda m, x: x @ torch.matrix_exp(m.a - m.a.T),
        shapes={"width": (5, 2, 8)},
        a=_weights("w", "w"),
    ),
    "kronecker weight": _of(
        lambda m, x: x @ torch.kron(m.a, m.b), a=_weights("w", 2), b=_weights(1, 3)
    ),
    "positive weight": _of(
        lambda m, x: F.linear(x, F.softplus(m.a), m.b.exp()), a=_weights(3, "w"), b=_weights(3)
    ),
    "weight used derived and direct": _of(
        lambda m, x: F.linear(x, m.a.softmax(1)) + F.linear(x, m.a) * m.a.mean(), a=_weights(3, "w")
    ),
    "standardised weight": _of(
        lambda m, x: F.linear(
            x, (m.a - m.a.mean(1, keepdim=True)) / (m.a.std(1, keepdim=True) + 1)
        ),
        shapes={"width": (5, 2, 8)},
        a=_weights(3, "w"),
    ),
    # one parameter, several uses
    "module called twice": _of(lambda m, x: m.a(m.a(x).tanh()), a=_square()),
    "module called on two inputs": _of(
        lambda m, x: m.a(x).tanh() * m.a(x.flip(1)), a=_square(), loss=sums
    ),
    "weight used by the parent": _of(
        lambda m, x: F.linear(m.a(x).tanh(), m.a.weight.T, m.b), a=_linear(4), b=_weights("w")
    ),
    "one parameter in two modules": Entry(_shared_in_two, vectors, squares, WIDTH),
}
