"""Programs of random steps over a pool of parameters: each step takes [B, T, D] to [B, T, D]."""

import random

import torch
from torch import nn
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
from tests.fuzz.pool import VECTORS, WEIGHTS, D


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
    x[:, c.number(x.shape[1])] = c.vector(m)
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
    x.transpose(0, 1)[c.number(x.shape[1])].add_(1)
    return x


def one_sample(m, x, c):
    k = c.number(len(x))
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
    "words": lambda m, x, c: x * F.embedding(c.index(*x.shape[:2]), m.table),
    "softmax": lambda m, x, c: x.softmax(c.of([-1, 1])) * 3,
    "turned": lambda m, x, c: m.a(x.transpose(0, 1)).tanh().transpose(0, 1),
    "rows": lambda m, x, c: (x.reshape(-1, D) @ m.b.weight + m.shift).view(x.shape),
    "sin": lambda m, x, c: x.flip(1).sin(),
    "one sample": one_sample,
    "moved": lambda m, x, c: x[c.index(len(x), high=len(x))],
    "parts": lambda m, x, c: torch.cat([x[..., 2:] * m.scalar, x[..., :2]], -1),
}
SHARED = {
    "linear": lambda m, x, c: F.linear(x, c.weight(m)),
    "affine": lambda m, x, c: F.linear(x, c.weight(m), c.vector(m)),
    "matmul": lambda m, x, c: x @ c.weight(m),
    "einsum": lambda m, x, c: torch.einsum("btd,ed->bte", x, c.weight(m)),
    "batched": lambda m, x, c: torch.bmm(x, c.weight(m).expand(len(x), D, D)),
    "broadcast": lambda m, x, c: x.unsqueeze(-2).matmul(c.weight(m)).squeeze(-2),
    "times": lambda m, x, c: x * c.vector(m),
    "plus": lambda m, x, c: x + c.vector(m),
    "both": lambda m, x, c: torch.addcmul(c.vector(m), x, c.vector(m), value=0.5),
    "normed": lambda m, x, c: F.layer_norm(x, (D,), c.vector(m), c.vector(m)),
    "convolved": lambda m, x, c: folded(F.conv1d(folded(x), c.weight(m)[:, :, None])),
    "slopes": lambda m, x, c: folded(F.prelu(folded(x), c.vector(m))),
    "lerp": lambda m, x, c: torch.lerp(x, x.tanh(), c.vector(m)),
    "looked up": lambda m, x, c: x + F.embedding(c.index(*x.shape[:2], high=D), c.weight(m)),
    "indexed": lambda m, x, c: x * c.weight(m)[c.index(*x.shape[:2], high=D)],
    "bag": lambda m, x, c: (
        x + F.embedding_bag(c.index(len(x), 2, high=D), c.weight(m), mode="sum")[:, None]
    ),
    "distances": lambda m, x, c: torch.cdist(x, c.weight(m)),
    "attended": lambda m, x, c: F.scaled_dot_product_attention(
        F.linear(x, c.weight(m)), x, F.linear(x, c.weight(m), c.vector(m))
    ),
    "keys": lambda m, x, c: F.scaled_dot_product_attention(
        x, c.weight(m).expand(len(x), D, D), c.weight(m).expand(len(x), D, D)
    ),
    "prefix": lambda m, x, c: torch.cat([c.vector(m).expand(len(x), 1, D), x[:, 1:]], 1),
    "rows": lambda m, x, c: torch.addmm(c.vector(m), x.reshape(-1, D), c.weight(m)).view(x.shape),
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
    "index add": lambda m, x, c: x.clone().index_add_(
        1, c.index(len(x[0, :2]), high=x.shape[1]), m.b(x[:, :2])
    ),
    "index copy": lambda m, x, c: x.clone().index_copy_(
        1, torch.tensor([0]), c.vector(m).expand(len(x), 1, D)
    ),
    "scatter": lambda m, x, c: torch.zeros_like(x).scatter_add_(
        1, c.index(*x.shape[:2], high=x.shape[1])[..., None].expand_as(x), m.a(x)
    ),
    "put": lambda m, x, c: x.clone().index_put_(
        (torch.arange(len(x)), c.index(len(x), high=x.shape[1])),
        c.vector(m).expand(len(x), D),
        accumulate=True,
    ),
    "swapped": lambda m, x, c: m.a(x).transpose_(1, 2).transpose_(1, 2),
    "sigmoid": lambda m, x, c: m.a(x).sigmoid_(),
}
MODULES = {
    "group norm": lambda m, x, c: folded(m.groups(folded(x))),
    "rms": lambda m, x, c: m.root(x),
    "convolution": lambda m, x, c: x + folded(m.mix(folded(x))),
    "depthwise": lambda m, x, c: folded(m.deep(folded(x))),
    "words": lambda m, x, c: x + m.words(c.index(*x.shape[:2])),
    "bag": lambda m, x, c: x + m.bag(c.index(len(x), 3))[:, None],
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


def penalty(m, x, c):
    """A gradient with respect to the input, differentiated again."""
    with torch.enable_grad():
        y = x if x.requires_grad else x.clone().requires_grad_()
        out = torch.tanh(F.linear(y, c.weight(m), c.vector(m))).square().sum()
        return x + torch.autograd.grad(out, y, create_graph=True)[0]


def experts(m, x, c):
    """Tokens picked by what they are, given to one expert each, and put back."""
    flat, out = x.reshape(-1, D), torch.zeros_like(x).reshape(-1, D)
    first = flat[:, 0] > 0
    for mask, w in ((first, c.weight(m)), (~first, c.weight(m))):
        where = mask.nonzero().flatten()
        out = out.index_add(0, where, F.linear(flat[where], w))
    return out.view(x.shape) * m.scalar


def packed(m, x, c):
    lengths = torch.tensor([x.shape[1] - i % x.shape[1] for i in range(len(x))])
    given = nn.utils.rnn.pack_padded_sequence(
        x, lengths, batch_first=True, enforce_sorted=bool((lengths.diff() <= 0).all())
    )
    out, _ = m.lstm(given)
    return nn.utils.rnn.pad_packed_sequence(out, True, total_length=x.shape[1])[0]


def copies(m, x, c):
    """Every sample twice, and their mean."""
    y = m.drop(m.a(x.repeat_interleave(2, 0)))
    return y.view(len(x), 2, *x.shape[1:]).mean(1)


def grouped(m, x, c):
    """A convolution with the samples in its channels, as weights of samples are applied."""
    w = c.weight(m)[None, :, :, None].expand(len(x), D, D, 1).reshape(-1, D, 1)
    return folded(
        F.conv1d(folded(x).reshape(1, -1, x.shape[1]), w, groups=len(x)).view(len(x), D, x.shape[1])
    )


def vmapped(m, x, c):
    w, v = c.weight(m), c.vector(m)
    return torch.func.vmap(lambda row: torch.tanh(row @ w) + v)(x)


def swapped(m, x, c):
    values = {"weight": c.weight(m), "bias": c.vector(m)}
    return torch.func.functional_call(m.a, values, (x,))


def nested(m, x, c):
    """A checkpoint inside another."""
    w = c.weight(m)
    inner = lambda x: m.drop(torch.tanh(x @ w))  # noqa: E731
    outer = lambda x: checkpoint(inner, m.a(x), use_reentrant=False) + x  # noqa: E731
    return checkpoint(outer, x, use_reentrant=False)


def biased(m, x, c):
    bias = c.vector(m)[0] * torch.arange(x.shape[1]).double()
    return F.scaled_dot_product_attention(m.a(x), x, m.b(x), attn_mask=bias - bias[:, None])


def positions(m, x, c):
    near = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    table = F.embedding(near.clamp(-1, 1) + 1, c.weight(m)[:3])
    return torch.einsum("bsd,tsd->bts", x, table) @ x


def turning(m, x, c):
    """Frequencies: complex numbers between real ones."""
    y = torch.fft.fft(F.linear(x, c.weight(m)), dim=-1) * torch.exp(1j * c.vector(m))
    return torch.fft.ifft(y, dim=-1).real


def positive(w):
    return w @ w.mT + torch.eye(D).double()


def reordered(m, x, c):
    order = x[:, 0, 0].argsort()
    return m.a(x[order])[order.argsort()]


ODD = {
    "penalty": penalty,
    "experts": experts,
    "packed": packed,
    "copies": copies,
    "grouped": grouped,
    "vmapped": vmapped,
    "swapped": swapped,
    "nested": nested,
    "biased": biased,
    "positions": positions,
    "turning": turning,
    "reordered": reordered,
    "counts": lambda m, x, c: x + m.counts(c.index(*x.shape[:2])),
    "sparse": lambda m, x, c: x + m.sparse(c.index(*x.shape[:2])),
    "weight norm": lambda m, x, c: m.weighted(x),
    "orthogonal": lambda m, x, c: m.turned(x),
    "spectral": lambda m, x, c: m.spectral(x),
    "back": lambda m, x, c: folded(m.back(folded(x))),
    "sampled bag": lambda m, x, c: (
        x
        + F.embedding_bag(
            c.index(len(x), 2, high=D),
            c.weight(m),
            mode="sum",
            per_sample_weights=x[:, 0, :2].contiguous(),
        )[:, None]
    ),
    "solved": lambda m, x, c: torch.linalg.solve(positive(c.weight(m)), folded(x)).mT,
    "products": lambda m, x, c: (x.sin() + c.vector(m)).cumprod(1),
    "log sums": lambda m, x, c: torch.logsumexp(x.unsqueeze(-2) + c.weight(m), -1),
    "medians": lambda m, x, c: x - F.linear(x, c.weight(m)).median(1, keepdim=True)[0],
    "scanned": lambda m, x, c: (x * c.vector(m)).cummax(1)[0],
    "windows": lambda m, x, c: F.pad(x, (1, 1)).unfold(2, 3, 1) @ c.vector(m)[:3],
    "kron": lambda m, x, c: F.linear(x, torch.kron(m.left[:2], m.right[:, :2])),
    "quadratic": lambda m, x, c: torch.einsum("btd,de,bse->bts", x, c.weight(m), x) @ x,
    "roots": lambda m, x, c: F.linear(x, torch.linalg.cholesky(positive(c.weight(m)))),
    "split": lambda m, x, c: sum(
        F.linear(part, w) for part, w in zip(x.split(2, -1), c.weight(m).split(2, 1), strict=True)
    ),
    "chunks": lambda m, x, c: torch.cat([F.linear(p, c.weight(m)) for p in x.unbind(1)], -1).view(
        x.shape
    ),
    "outer": lambda m, x, c: (
        (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(2) @ m.flat.view(2, D * D).t() @ m.right
    ),
    "no grad": lambda m, x, c: m.a(x) * torch.sigmoid(m.b(x)).detach(),
    "twice": lambda m, x, c: m.a(m.a(x).tanh()),
    "of a list": lambda m, x, c: sum(
        F.linear(x, w) * v for w, v in zip([c.weight(m)] * 2, [c.vector(m)] * 2, strict=True)
    ),
}
MEETING = {
    "centered": lambda m, x, c: x - x.mean(0),
    "softmax": lambda m, x, c: x.softmax(0),
    "rolled": lambda m, x, c: x + x.roll(1, 0),
    "sorted": lambda m, x, c: x.sort(0)[0],
    "one for all": lambda m, x, c: x + x[c.number(len(x))],
    "whole": lambda m, x, c: x / (1 + x.square().sum()),
    "mean weight": lambda m, x, c: F.linear(x, c.weight(m) * x.mean()),
}
THEMES = {
    "plain": PLAIN,
    "shared": SHARED,
    "in place": IN_PLACE,
    "modules": MODULES,
    "odd": ODD,
    "functions": FUNCTIONS,
    "hooks": HOOKS,
    "meeting": MEETING,
}


def entropy(m, x):
    return F.cross_entropy(x[:, -1], torch.arange(len(x)) % D, reduction="none")


def whole(m, x):
    return x.square().sum((1, 2))


LOSSES = {
    "sum": whole,
    "tokens": lambda m, x: x.square().sum(2),
    "entropy": entropy,
    "joined": lambda m, x: torch.cat([whole(m, x)[:2], whole(m, x)[2:] * m.scalar]),
    "stacked": lambda m, x: torch.stack([whole(m, x), whole(m, x.sin()) * m.scalar], 1),
    "regularized": lambda m, x: whole(m, x) + 0.1 * m.scale.square().sum(),
    "apart": lambda m, x: torch.stack([m.a(row).square().sum() for row in x]),
    "columns": lambda m, x: x.square().sum(2).mT,
    "kept": lambda m, x: x.square().sum(2)[x[..., 0] > -0.2],
    "order": lambda m, x: whole(m, x).flip(0),
    "sorted": lambda m, x: whole(m, x).sort()[0],
    "twice": lambda m, x: torch.cat([whole(m, x), entropy(m, x)]),
    "again": lambda m, x: whole(m, x).repeat(2),
    "one each": lambda m, x: whole(m, x)[:, None],
    "scalar": lambda m, x: whole(m, x).mean(),
    "picked": lambda m, x: whole(m, x)[:1],
    "log": lambda m, x: torch.log1p(whole(m, x)) * m.scalar.exp(),
    "in place": lambda m, x: whole(m, x).mul_(m.scalar).add_(m.scale.sum()),
}


def forward(m, x, steps, kind, seed):
    """Losses of the program; random numbers drawn in it are those of `seed`."""
    torch.manual_seed(seed)
    for theme, name, detail in steps:
        x = THEMES[theme][name](m, x, Chosen(detail)).clamp(-5, 5)
    return LOSSES[kind](m, x)


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
