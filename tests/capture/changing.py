"""Parts of models that may change from one step to the next, for tests of recipes."""

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Halved(torch.autograd.Function):
    """A Function of one's own: of each sample, or of the k-th for all."""

    @staticmethod
    def forward(ctx, x, k):
        ctx.k = k
        return x / 2 if k is None else x / 2 + x[k]

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.clone()
        out = grad / 2
        if ctx.k is not None:
            out[ctx.k] += grad.sum(0)
        return out, None


D = 4  # features; B samples of T tokens


class Pool(nn.Module):
    """Parameters of many kinds, any of which may be used any number of times."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.norm, self.mix = nn.LayerNorm(D), nn.Conv1d(D, D, 3, padding=1)
        self.batch = nn.BatchNorm1d(D)
        self.batch.running_mean.normal_()
        self.table, self.stack = nn.Parameter(torch.randn(9, D)), nn.Parameter(torch.randn(3, D, D))
        self.scale, self.scalar = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(()))


def values(seed, *shape, high):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def packed(model, x, seed):
    """Samples in one row of tokens, which see those of their own sample, or of their half too."""
    tokens = torch.arange(x.shape[:2].numel()) // x.shape[1]
    mask = tokens[:, None] == tokens
    if seed is not None:
        half = values(seed, len(tokens), high=2)
        mask = mask | (half[:, None] == half)
    sides = [side.reshape(1, 1, -1, D) for side in (model.a(x), x, model.b(x))]
    return F.scaled_dot_product_attention(*sides, mask).view(x.shape)


def assigned(x, n):
    return torch.zeros_like(x).index_put((torch.tensor(n % len(x)),), x[0])


def parts(x, n):
    """The first samples go another way than the last."""
    n = n % len(x)
    return torch.cat([x[:n] * 2, x[n:]])


# each takes [B, T, D] to the same; `n` is a number that it saves, and `seed` what its values are of
STEPS = {
    "linear": lambda m, x, n, seed: m.a(x),
    "transposed": lambda m, x, n, seed: x @ (m.b.weight if n % 2 else m.b.weight.t()),
    "lines": lambda m, x, n, seed: F.linear(x, m.table[n % 6 : n % 6 + D]),
    "one of several": lambda m, x, n, seed: x @ m.stack[n % 3],
    "turned": lambda m, x, n, seed: F.linear(x, m.stack.transpose(1, 2 - n % 2)[0]),
    "part": lambda m, x, n, seed: x @ m.stack.unbind()[n % 3],
    "norm": lambda m, x, n, seed: m.norm(x),
    "normed": lambda m, x, n, seed: F.layer_norm(x, x.shape[-1 - n % 2 :]),
    "batch norm": lambda m, x, n, seed: m.batch(x.transpose(1, 2)).transpose(1, 2),
    "convolution": lambda m, x, n, seed: m.mix(x.transpose(1, 2)).transpose(1, 2),
    "scale": lambda m, x, n, seed: x * m.scale + m.scalar,
    "number": lambda m, x, n, seed: x * (1 + n / 7),
    "derived": lambda m, x, n, seed: x @ (m.b.weight * m.scalar.exp()).t(),
    "embedding": lambda m, x, n, seed: x * F.embedding(values(seed, *x.shape[:2], high=9), m.table),
    "picked lines": lambda m, x, n, seed: x + m.table[values(seed, len(x), high=9)][:, None],
    "dropped out": lambda m, x, n, seed: F.dropout(x, n / 16),
    "roll": lambda m, x, n, seed: x.roll(n, (n // 2) % 3),
    "flip": lambda m, x, n, seed: x.flip(n % 3),
    "cumsum": lambda m, x, n, seed: x.cumsum(n % 3),
    "softmax": lambda m, x, n, seed: x.softmax(n % 3),
    "sort": lambda m, x, n, seed: x.sort(n % 3)[0],
    "mean": lambda m, x, n, seed: x - x.mean(n % 3, keepdim=True),
    "maximum": lambda m, x, n, seed: x - x.amax(n % 3, keepdim=True),
    "slice": lambda m, x, n, seed: F.pad(x[:, n % 2 :], (0, 0, n % 2, 0)),
    "sample": lambda m, x, n, seed: x + x[n % len(x)],
    "two ways": lambda m, x, n, seed: parts(x, n),
    "split": lambda m, x, n, seed: torch.cat(x.split(1 + n % 3, n % 3)[::-1], n % 3),
    "joined": lambda m, x, n, seed: torch.stack([x.sin(), x], n % 4).sum(n % 4),
    "permuted": lambda m, x, n, seed: m.a(x.permute(1, 0, 2) if n % 2 else x).reshape(x.shape),
    "samples": lambda m, x, n, seed: x[torch.arange(len(x)).roll(seed % len(x))],
    "any samples": lambda m, x, n, seed: x + x[values(seed, len(x), high=len(x))],
    "chosen": lambda m, x, n, seed: x.index_select(n % 3, values(seed, x.shape[n % 3], high=2)),
    "added": lambda m, x, n, seed: x.index_add(0, values(seed, len(x), high=len(x)), x.sin()),
    "copied": lambda m, x, n, seed: x.index_copy(0, torch.tensor([seed % len(x)]), x[:1]),
    "gathered": lambda m, x, n, seed: x.gather(n % 3, values(seed, *x.shape, high=2)),
    "scattered": lambda m, x, n, seed: x.scatter_add(0, values(seed, *x.shape, high=len(x)), x),
    "where": lambda m, x, n, seed: torch.where(values(seed, *x.shape, high=2) > 0, x, x.flip(0)),
    "attention": lambda m, x, n, seed: F.scaled_dot_product_attention(m.a(x), x, m.b(x)),
    "packed": lambda m, x, n, seed: packed(m, x, None if n % 2 else seed),
    "assigned": lambda m, x, n, seed: x + assigned(x, n),
    "Function": lambda m, x, n, seed: Halved.apply(x, seed % len(x) if n % 2 else None),
    "kept less": lambda m, x, n, seed: checkpoint(m.a, x, use_reentrant=False),
    "hook": lambda m, x, n, seed: hooked(x, n),
}  # fmt: skip
INDICES = ("samples", "any samples", "chosen", "added", "copied", "scattered", "packed", "Function")


def hooked(x, n):
    """One that works on elements, or on samples at once."""
    x = x * 1
    if x.requires_grad:
        x.register_hook((lambda g: g * 2) if n % 2 else (lambda g: g - g.mean(0)))
    return x


OPERATION = st.tuples(
    st.sampled_from([*STEPS, *INDICES]), st.integers(0, 11), st.integers(0, 7)
)  # name, n, seed
CHANGES = (
    *("values", "n", "n", "n", "seed", "seed", "seed", "operation", "drop", "add", "swap", "size"),
    *("tokens", "freeze", "tie", "mode", "module", "groups", "parameters", "branch"),
)
