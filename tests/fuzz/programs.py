"""Programs of random steps over a pool of parameters: each step takes [B, T, D] to [B, T, D]."""

import random

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.fuzz.functions import (
    EDITS,
    Counting,
    Edited,
    InPlace,
    Linear,
    New,
    Saved,
    Two,
)
from tests.fuzz.pool import VECTORS, WEIGHTS, B, D, T


class Chosen:
    """Details of a step, the same for the same seed; seed 0 takes the first of everything."""

    def __init__(self, seed):
        self.random = random.Random(seed) if seed else None

    def of(self, values):
        values = list(values)
        return values[0] if self.random is None else self.random.choice(values)

    def number(self, n):
        return self.of(range(n))

    def weight(self, m):
        return WEIGHTS[self.of(WEIGHTS)](m)

    def vector(self, m):
        return VECTORS[self.of(VECTORS)](m)

    def edit(self):
        return EDITS[self.of(EDITS)]

    def index(self, *shape, high=D + 2):
        values = [self.number(high) for _ in range(torch.Size(shape).numel())]
        return torch.tensor(values, dtype=torch.int64).view(shape)


def folded(x):
    return x.transpose(1, 2)


def set_rows(m, x, c):
    x = x.clone()
    x[:, c.number(T)] = c.vector(m)
    return x


def added_window(m, x, c):
    x = x.clone()
    x[:, 1:] += x[:, :-1].clone() * m.scalar
    return x


def sample_by_sample(m, x, c):
    out = torch.zeros_like(x)
    for i in range(len(x)):
        out[i] = m.a(x[i]) if i % 2 else x[i] * c.vector(m)
    return out


def through_view(m, x, c):
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1, D).mul_(c.vector(m))
    x.transpose(0, 1)[c.number(T)].add_(1)
    return x


def one_sample(m, x, c):
    k = c.number(B)
    return torch.cat([x[:k], F.linear(x[k : k + 1], c.weight(m)), x[k + 1 :]])


def unrolled(cell, vectors=False):
    def run(m, x, c):
        module, h = getattr(m, cell), torch.zeros_like(x[:, 0])
        state, outs = (h, h) if cell == "long" else h, []
        for t in range(x.shape[1]):
            state = module(x[:, t], state)
            outs.append(state[0] if cell == "long" else state)
        return torch.stack(outs, 1)

    return run


def own_cell(m, x, c):
    """A recurrence with two biases that are summed before use."""
    w, u, h, outs = c.weight(m), c.weight(m), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] @ w + h @ u + (m.scale + m.shift))
        outs.append(h)
    return torch.stack(outs, 1)


def checkpointed(m, x, c):
    w = c.weight(m)

    def inner(x):
        return m.drop(torch.tanh(m.a(x) @ w)) + m.norm(x)

    return checkpoint(inner, x, use_reentrant=False)


def offloaded(m, x, c):
    with torch.autograd.graph.save_on_cpu():
        return torch.tanh(F.linear(x, c.weight(m), c.vector(m)))


def hooked(m, x, c):
    y = torch.tanh(x)
    if y.requires_grad:
        y.register_hook(c.edit())
    return y


def hooked_output(m, x, c):
    y = F.linear(x, c.weight(m), c.vector(m))
    if y.requires_grad:
        y.register_hook(c.edit())
    return y


def hooked_weight(m, x, c):
    w = c.weight(m) * 1.0
    if w.requires_grad:
        w.register_hook(c.edit())
    return F.linear(x, w)


def hooked_vector(m, x, c):
    v = c.vector(m) * 1.0
    if v.requires_grad:
        edit = c.edit()
        v.register_hook(lambda g: edit(g[None]) if edit(g[None]) is None else edit(g[None])[0])
    return x * v


def hooked_node(m, x, c):
    y = m.a(x)
    edit = c.edit()

    def after(ins, outs):
        return tuple(g if g is None or edit(g) is None else edit(g) for g in ins)

    y = torch.sin(y)
    if y.requires_grad:
        y.grad_fn.register_hook(after)
    return y


def retained(m, x, c):
    y = m.a(x)
    if y.requires_grad:
        y.retain_grad()
    return y


PLAIN = {
    "linear": lambda m, x, c: m.a(x),
    "tied": lambda m, x, c: m.out(x) + m.b(x),
    "norm": lambda m, x, c: m.norm(x),
    "scaled": lambda m, x, c: x * m.scale + m.scalar,
    "places": lambda m, x, c: x + m.places,
    "own": lambda m, x, c: (x * m.own).tanh() + m.own.mean(),
    "words": lambda m, x, c: x * F.embedding(c.index(B, T), m.table),
    "softmax": lambda m, x, c: x.softmax(c.of([-1, 1])) * 3,
    "turned": lambda m, x, c: m.a(x.transpose(0, 1)).tanh().transpose(0, 1),
    "rows": lambda m, x, c: (x.reshape(B * T, D) @ m.b.weight + m.shift).view(B, T, D),
    "sin": lambda m, x, c: x.flip(1).sin(),
    "one sample": one_sample,
    "moved": lambda m, x, c: x[c.index(B, high=B)],
    "parts": lambda m, x, c: torch.cat([x[..., 2:] * m.scalar, x[..., :2]], -1),
}
SHARED = {
    "linear": lambda m, x, c: F.linear(x, c.weight(m)),
    "affine": lambda m, x, c: F.linear(x, c.weight(m), c.vector(m)),
    "matmul": lambda m, x, c: x @ c.weight(m),
    "einsum": lambda m, x, c: torch.einsum("btd,ed->bte", x, c.weight(m)),
    "batched": lambda m, x, c: torch.bmm(x, c.weight(m).expand(B, D, D)),
    "broadcast": lambda m, x, c: x.unsqueeze(-2).matmul(c.weight(m)).squeeze(-2),
    "times": lambda m, x, c: x * c.vector(m),
    "plus": lambda m, x, c: x + c.vector(m),
    "both": lambda m, x, c: torch.addcmul(c.vector(m), x, c.vector(m), value=0.5),
    "normed": lambda m, x, c: F.layer_norm(x, (D,), c.vector(m), c.vector(m)),
    "convolved": lambda m, x, c: folded(F.conv1d(folded(x), c.weight(m)[:, :, None])),
    "slopes": lambda m, x, c: folded(F.prelu(folded(x), c.vector(m))),
    "lerp": lambda m, x, c: torch.lerp(x, x.tanh(), c.vector(m)),
    "looked up": lambda m, x, c: x + F.embedding(c.index(B, T, high=D), c.weight(m)),
    "indexed": lambda m, x, c: x * c.weight(m)[c.index(B, T, high=D)],
    "bag": lambda m, x, c: (
        x + F.embedding_bag(c.index(B, 2, high=D), c.weight(m), mode="sum")[:, None]
    ),
    "distances": lambda m, x, c: torch.cdist(x, c.weight(m)),
    "attended": lambda m, x, c: F.scaled_dot_product_attention(
        F.linear(x, c.weight(m)), x, F.linear(x, c.weight(m), c.vector(m))
    ),
    "keys": lambda m, x, c: F.scaled_dot_product_attention(
        x, c.weight(m).expand(B, D, D), c.weight(m).expand(B, D, D)
    ),
    "prefix": lambda m, x, c: torch.cat([c.vector(m).expand(B, 1, D), x[:, 1:]], 1),
    "rows": lambda m, x, c: torch.addmm(c.vector(m), x.reshape(-1, D), c.weight(m)).view(B, T, D),
    "scaled rows": lambda m, x, c: x * (F.linear(x, c.vector(m)[None]).sigmoid()),
    "gated": lambda m, x, c: x * F.linear(x, c.weight(m)).sigmoid() + x @ c.weight(m),
    "own cell": own_cell,
    "largest": lambda m, x, c: torch.maximum(x, c.vector(m)),
    "kept": lambda m, x, c: torch.where(x > 0, x, c.vector(m)),
    "division": lambda m, x, c: x / (1 + c.vector(m).square()),
}
IN_PLACE = {
    "set": set_rows,
    "window": added_window,
    "samples": sample_by_sample,
    "view": through_view,
    "relu": lambda m, x, c: F.relu(F.linear(x, c.weight(m)), inplace=True),
    "times": lambda m, x, c: F.linear(x, c.weight(m)).mul_(c.vector(m)).add_(c.vector(m)),
    "clamp": lambda m, x, c: m.a(x).clamp_(-1, 1),
    "fill": lambda m, x, c: m.a(x).masked_fill_(x > 0.5, 0.3),
    "copy": lambda m, x, c: torch.zeros_like(x).copy_(m.b(x)),
    "index add": lambda m, x, c: x.clone().index_add_(1, c.index(2, high=T), m.b(x[:, :2])),
    "index copy": lambda m, x, c: x.clone().index_copy_(
        1, torch.tensor([0]), c.vector(m).expand(B, 1, D)
    ),
    "scatter": lambda m, x, c: torch.zeros_like(x).scatter_add_(
        1, c.index(B, T, high=T)[..., None].expand(B, T, D), m.a(x)
    ),
    "put": lambda m, x, c: x.clone().index_put_(
        (torch.arange(B), c.index(B, high=T)), c.vector(m).expand(B, D), accumulate=True
    ),
    "swapped": lambda m, x, c: m.a(x).transpose_(1, 2).transpose_(1, 2),
    "sigmoid": lambda m, x, c: m.a(x).sigmoid_(),
}
MODULES = {
    "group norm": lambda m, x, c: folded(m.groups(folded(x))),
    "rms": lambda m, x, c: m.root(x),
    "convolution": lambda m, x, c: x + folded(m.mix(folded(x))),
    "depthwise": lambda m, x, c: folded(m.deep(folded(x))),
    "words": lambda m, x, c: x + m.words(c.index(B, T)),
    "bag": lambda m, x, c: x + m.bag(c.index(B, 3))[:, None],
    "attention": lambda m, x, c: m.attention(x, x, x, need_weights=c.of([False, True]))[0],
    "block": lambda m, x, c: m.block(x),
    "gru": lambda m, x, c: m.gru(x)[0],
    "lstm": lambda m, x, c: m.lstm(x)[0],
    "gru cell": unrolled("cell"),
    "lstm cell": unrolled("long"),
    "rnn cell": unrolled("short"),
    "bilinear": lambda m, x, c: m.pair(x, x.tanh()),
    "prelu": lambda m, x, c: folded(m.slope(folded(x))),
    "dropout": lambda m, x, c: m.drop(m.a(x)),
    "checkpoint": checkpointed,
    "offloaded": offloaded,
    "batch norm": lambda m, x, c: folded(m.batch(folded(x))),
}
FUNCTIONS = {
    "edited": lambda m, x, c: Edited.apply(m.a(x), c.edit()),
    "edited weight": lambda m, x, c: F.linear(x, Edited.apply(c.weight(m), c.edit())),
    "linear": lambda m, x, c: Linear.apply(x, c.weight(m)),
    "new": lambda m, x, c: New.apply(x, c.weight(m))[0],
    "two": lambda m, x, c: sum(Two.apply(x, c.vector(m))[: c.of([1, 2])]),
    "in place": lambda m, x, c: InPlace.apply(m.a(x)),
    "saved": lambda m, x, c: Saved.apply(x, c.weight(m)),
    "counting": lambda m, x, c: Counting.apply(m.a(x)),
}
HOOKS = {
    "activation": hooked,
    "output": hooked_output,
    "weight": hooked_weight,
    "vector": hooked_vector,
    "node": hooked_node,
    "retained": retained,
}
MEETING = {
    "centered": lambda m, x, c: x - x.mean(0),
    "softmax": lambda m, x, c: x.softmax(0),
    "rolled": lambda m, x, c: x + x.roll(1, 0),
    "sorted": lambda m, x, c: x.sort(0)[0],
    "one for all": lambda m, x, c: x + x[c.number(B)],
    "whole": lambda m, x, c: x / (1 + x.square().sum()),
    "mean weight": lambda m, x, c: F.linear(x, c.weight(m) * x.mean()),
}
THEMES = {
    "plain": PLAIN,
    "shared": SHARED,
    "in place": IN_PLACE,
    "modules": MODULES,
    "functions": FUNCTIONS,
    "hooks": HOOKS,
    "meeting": MEETING,
}


def losses_of(m, x, kind):
    """[B] or [B, T]."""
    if kind == "tokens":
        return x.square().sum(2)
    if kind == "entropy":
        return F.cross_entropy(x[:, -1], torch.arange(B) % D, reduction="none")
    losses = x.square().sum((1, 2))
    if kind == "joined":
        return torch.cat([losses[:2], losses[2:] * m.scalar])
    if kind == "stacked":
        return torch.stack([losses, x.sin().sum((1, 2)) * m.scalar], 1)
    if kind == "regularized":
        return losses + 0.1 * m.scale.square().sum()
    if kind == "apart":
        return torch.stack([m.a(row).square().sum() for row in x])
    return losses


LOSSES = ["sum", "tokens", "entropy", "joined", "stacked", "regularized", "apart"]


def forward(m, x, steps, kind, seed):
    """Losses of the program; random numbers drawn in it are those of `seed`."""
    torch.manual_seed(seed)
    for theme, name, detail in steps:
        x = THEMES[theme][name](m, x, Chosen(detail)).clamp(-5, 5)
    return losses_of(m, x, kind)


def hook_modules(m, hooks):
    """Hooks on modules and parameters, (where, what, edit)."""
    for kind, name, edit in hooks:
        change = EDITS[edit]
        if kind == "parameter":
            parameter = dict(m.named_parameters())[name]
            parameter.register_hook(change)
        elif kind == "backward":
            dict(m.named_modules())[name].register_full_backward_hook(
                lambda module, ins, outs, change=change: _each(change, ins)
            )
        elif kind == "before backward":
            dict(m.named_modules())[name].register_full_backward_pre_hook(
                lambda module, outs, change=change: _each(change, outs)
            )
        elif kind == "forward":
            dict(m.named_modules())[name].register_forward_hook(
                lambda module, ins, out: out * 1.5 if isinstance(out, torch.Tensor) else None
            )


def _each(change, grads):
    return tuple(g if g is None or change(g) is None else change(g) for g in grads)


MODULE_HOOKS = ["parameter", "backward", "before backward", "forward"]
HOOKED_MODULES = ["a", "b", "norm", "mix"]
HOOKED_PARAMETERS = ["a.weight", "a.bias", "scale", "table", "scalar"]
