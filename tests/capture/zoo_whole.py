"""Networks of several parts, batches of several inputs, and losses of every form."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.capture.zoo_entry import (
    EVERY_DTYPE,
    Entry,
    Made,
    classify,
    labelled,
    padding,
    sequences,
    squares,
    vectors,
)

WIDTH = {"width": (5, 1, 2, 8)}
NODES = {"width": (4, 1, 2), "tokens": (5, 1, 2, 7)}


def _mlp(fan_in, fan_out=3, hidden=6):
    return nn.Sequential(nn.Linear(fan_in, hidden), nn.Tanh(), nn.Linear(hidden, fan_out))


def _of(function, batch=vectors, shapes=WIDTH, loss=squares, **parts):
    return Entry(
        lambda s: Made(function, **{name: part(s) for name, part in parts.items()}),
        batch,
        loss,
        shapes,
    )


def _net(fan_out=3, extra=0):
    return lambda s: _mlp(s.width + extra, fan_out)


# losses of one network


def _digits(loss, classes=3):
    return Entry(lambda s: _mlp(s.width, classes), labelled(vectors, classes), loss, WIDTH)


def _picked(model, batch):
    x, y = batch
    return -model(x).log_softmax(1)[torch.arange(len(y)), y]


def _gathered(model, batch):
    x, y = batch
    out = model(x)
    return out.logsumexp(1) - out.gather(1, y[:, None]).squeeze(1)


def _smoothed(model, batch):
    x, y = batch
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=x.dtype)
    return F.cross_entropy(model(x), y, weight, reduction="none", label_smoothing=0.1)


def _focal(model, batch):
    x, y = batch
    nll = F.nll_loss(model(x).log_softmax(1), y, reduction="none")
    return (1 - (-nll).exp()) ** 2 * nll


def _binary(model, batch):
    x, y = batch
    return F.binary_cross_entropy_with_logits(model(x).squeeze(1), y.to(x.dtype), reduction="none")


def _hinge(model, batch):
    x, y = batch
    out = model(x)
    margin = out - out.gather(1, y[:, None]) + 1
    return margin.clamp(min=0).masked_fill(F.one_hot(y, out.shape[1]) > 0, 0.0).amax(1)


def _divergence(model, batch):
    x, y = batch
    target = F.one_hot(y, 3).to(x.dtype).mul(2).softmax(1)
    return F.kl_div(model(x).log_softmax(1), target, reduction="none").sum(1)


def _huber(model, batch):
    x, y = batch
    target = y[:, None].to(x.dtype).expand(-1, 3)
    return F.huber_loss(model(x), target, reduction="none").mean(-1)


def _gaussian(model, batch):
    x, y = batch
    mean, spread = model(x).unbind(1)
    return F.gaussian_nll_loss(mean, y.to(x.dtype), spread.exp(), reduction="none")


def _stacked(model, batch):
    """One forward pass for each sample."""
    return torch.stack([F.cross_entropy(model(x), y) for x, y in zip(*batch, strict=True)])


def _cat(model, batch):
    """Two halves of the batch, each its own way."""
    x, y = batch
    half = len(x) // 2
    first = F.cross_entropy(model(x[:half]), y[:half], reduction="none")
    second = F.mse_loss(model(x[half:]), F.one_hot(y[half:], 3).to(x.dtype), reduction="none")
    return torch.cat([first, second.sum(1)])


def _reversed(model, batch):
    return classify(model, batch).flip(0)


def _regularised(model, batch):
    """Each loss with the norm of the weights."""
    return classify(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())


def _penalty(model, batch):
    """With the norm of the gradient with respect to the input."""
    x, y = batch
    x = x.detach().requires_grad_()
    losses = F.cross_entropy(model(x), y, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    return losses + gradient.square().sum(1)


def _vmapped(model, batch):
    x, y = batch
    return torch.func.vmap(lambda x, y: F.cross_entropy(model(x), y))(x, y)


def _augmented(model, batch):
    """Every sample several times, next to each other."""
    x, y = batch
    x = x.repeat_interleave(3, 0) + torch.arange(3 * len(x), dtype=x.dtype)[:, None].remainder(3)
    losses = F.cross_entropy(model(x), y.repeat_interleave(3), reduction="none")
    return losses.view(-1, 3).mean(1)


def _views(model, batch):
    """Every sample twice: the batch and again the batch."""
    x, y = batch
    a, b = model(torch.cat([x, x.flip(1)])).chunk(2)
    return F.cross_entropy(a, y, reduction="none") + (a - b).square().sum(1)


# several inputs and outputs


def _dictionary(m, inputs):
    h = m.a(inputs["x"]).tanh() + m.b(inputs["more"]["z"]).tanh()
    return {"class": m.c(h), "value": m.d(h).squeeze(-1)}


def _of_dictionary(model, batch):
    out = model(batch["inputs"])
    losses = F.cross_entropy(out["class"], batch["y"], reduction="none")
    return batch["weight"] * losses + 0.5 * out["value"].square()


def _dictionary_batch(b, s):
    inputs = {"x": torch.randn(b, s.width), "more": {"z": torch.randn(b, 3)}}
    return {"inputs": inputs, "y": torch.randint(3, (b,)), "weight": torch.rand(b)}


def _labelling_batch(b, s):
    y = torch.randint(4, (b, s.tokens))
    return torch.randn(b, s.tokens, s.width), y, padding(b, s.tokens)


def _labelling(model, batch):
    """Averaged over the tokens that are no padding."""
    x, y, pad = batch
    nll = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    return (nll * ~pad).sum(1) / (~pad).sum(1)


def _ignoring(model, batch):
    x, y, pad = batch
    out = model(x).permute(0, 2, 1)
    return F.cross_entropy(out, y.masked_fill(pad, -100), reduction="none").sum(1)


def _masked_select(model, batch):
    """The tokens that are no padding, packed, and summed by sample again."""
    x, y, pad = batch
    sample = torch.arange(len(x))[:, None].expand_as(y)[~pad]
    losses = F.cross_entropy(model(x[~pad]), y[~pad], reduction="none")
    return losses.new_zeros(len(x)).index_add(0, sample, losses)


def _frozen(s):
    first, second, last = _mlp(s.width, 4), _mlp(4), nn.Linear(3, 3)
    for frozen in (first, second[0].bias, last):
        frozen.requires_grad_(False)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)


def _pairs(b, s):
    return torch.randn(b, s.width), torch.randn(b, s.width), torch.randint(2, (b,))


def _siamese(model, batch):
    x, y, same = batch
    distance = F.pairwise_distance(model(x), model(y))
    return torch.where(same > 0, distance**2, (2 - distance).clamp(min=0) ** 2)


def _triplet(model, batch):
    x, y, _ = batch
    a, p, n = model(x), model(y), model(x + y)
    return F.triplet_margin_loss(a, p, n, reduction="none") + 1 - F.cosine_similarity(a, n)


def _autoencoder(model, batch):
    x, noise = batch
    mean, log_variance = model.encoder(x).chunk(2, 1)
    z = mean + noise * (0.5 * log_variance).exp()
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
    target = x.sigmoid()
    recon = F.binary_cross_entropy_with_logits(model.decoder(z), target, reduction="none")
    return recon.sum(1) + divergence


def _mixture_density(model, batch):
    x, y = batch
    logits, mean, spread = model(x).chunk(3, 1)
    normal = torch.distributions.Normal(mean, spread.exp())
    return -(logits.log_softmax(1) + normal.log_prob(y[:, None].to(x.dtype))).logsumexp(1)


# routing, sets and graphs


def _routed(m, x):
    """Each token to the expert of the largest gate; those of one expert are computed at once."""
    flat = x.flatten(0, 1)
    gate, expert = m.gate(flat).softmax(1).max(1)
    out = torch.zeros_like(flat)
    for k, layer in enumerate(m.experts):
        where = (expert == k).nonzero().squeeze(1)
        out = out.index_add(0, where, gate[where, None] * layer(flat[where]))
    return (x.flatten(0, 1) + out).view_as(x)


def _weighted_experts(m, x):
    gates = m.gate(x).softmax(-1)
    return torch.einsum("be,bed->bd", gates, torch.stack([layer(x) for layer in m.experts], 1))


def _experts(s):
    return nn.ModuleList(_mlp(s.width, s.width, 3) for _ in range(3))


def _graphs(b, s):
    edges = torch.rand(b, s.tokens, s.tokens) > 0.5
    return torch.randn(b, s.tokens, s.width), edges.to(torch.get_default_dtype())


def _graph_convolution(m, x, edges):
    edges = edges + torch.eye(edges.shape[1], dtype=x.dtype)
    edges = edges / edges.sum(2, keepdim=True)
    return m.b(edges @ m.a(edges @ x).relu()).mean(1)


def _edge_lists(b, s):
    return torch.randn(b, s.tokens, s.width), torch.randint(s.tokens, (b, 6, 2))


def _messages(m, x, edges):
    """All graphs as one, with messages summed where edges end."""
    first = torch.arange(len(x))[:, None, None] * x.shape[1]
    source, target = (edges + first).flatten(0, 1).unbind(1)
    nodes = x.flatten(0, 1)
    message = m.message(torch.cat([nodes[source], nodes[target]], 1))
    total = torch.zeros(len(nodes), message.shape[1], dtype=x.dtype)
    total = total.scatter_add(0, target[:, None].expand_as(message), message)
    return m.update(torch.cat([nodes, total], 1)).view(*x.shape[:2], -1)


def _set(m, x, pad):
    return m.b(m.a(x).masked_fill(pad[..., None], 0.0).sum(1))


def _set_batch(b, s):
    return *sequences(b, s), padding(b, s.tokens)


def _capsules(m, x):
    """Routing by agreement."""
    votes = torch.einsum("bip,ijpq->bijq", x, m.w)
    logits = torch.zeros(votes.shape[:3], dtype=x.dtype)
    out = votes.sum(1)
    for _ in range(2):
        total = (logits.softmax(2)[..., None] * votes).sum(1)
        norm = total.square().sum(-1, keepdim=True)
        out = total * norm / (1 + norm) / (norm + 1e-6).sqrt()
        logits = logits + (votes * out[:, None]).sum(-1)
    return out


def _hypernetwork(m, x, y):
    """Weights of its own for each sample."""
    w = m.weights(y).view(len(x), 3, -1)
    return torch.bmm(w, x.unsqueeze(2)).squeeze(2) + m.bias


def _crf(model, batch):
    """Negative log-likelihood of a linear chain, by the forward algorithm."""
    x, y, _ = batch
    scores = model.a(x)
    right = scores.gather(2, y[..., None]).sum((1, 2)) + model.start[y[:, 0]]
    right = right + model.moves[y[:, :-1], y[:, 1:]].sum(1)
    alpha = model.start + scores[:, 0]
    for t in range(1, x.shape[1]):
        alpha = (alpha[:, :, None] + model.moves).logsumexp(1) + scores[:, t]
    return alpha.logsumexp(1) - right


def _euler(m, x):
    for t in range(4):
        x = x + 0.25 * m.a(torch.cat([x, torch.full_like(x[:, :1], t / 4)], 1))
    return x


def _solved(m, x):
    a = m.a @ m.a.T + torch.eye(len(m.a), dtype=x.dtype)
    return torch.linalg.solve(a, x.T).T


def _solved_per_sample(m, x):
    a = torch.diag_embed(x.exp()) + m.a @ m.a.T
    return torch.linalg.solve(a, m.b.expand_as(x))


def _best(m, x):
    """The largest three of the tokens."""
    best = m.a(x).topk(min(3, x.shape[1]), 1)
    return m.b(best.values.sum(1))


def _fourier(m, x):
    angles = x @ m.frequencies
    return m.a(torch.cat([angles.sin(), angles.cos()], 1))


WHOLE = {
    **{
        f"loss {name}": _digits(loss)
        for name, loss in {
            "picked": _picked,
            "gathered": _gathered,
            "smoothed": _smoothed,
            "focal": _focal,
            "hinge": _hinge,
            "divergence": _divergence,
            "huber": _huber,
            "stacked": _stacked,
            "of two halves": _cat,
            "reversed": _reversed,
            "regularised": _regularised,
            "with gradient penalty": _penalty,
            "vmapped": _vmapped,
            "of repeated samples": _augmented,
            "of two views": _views,
        }.items()
    },
    "loss binary": _digits(_binary, 1),
    "loss gaussian": _digits(_gaussian, 2),
    "loss mixture density": _digits(_mixture_density, 6),
    "dictionaries": _of(
        _dictionary,
        _dictionary_batch,
        loss=_of_dictionary,
        a=lambda s: nn.Linear(s.width, 4),
        b=lambda s: nn.Linear(3, 4),
        c=lambda s: nn.Linear(4, 3),
        d=lambda s: nn.Linear(4, 1),
    ),
    "labelling": Entry(lambda s: _mlp(s.width, 4), _labelling_batch, _labelling, NODES),
    "labelling, padding ignored": Entry(
        lambda s: _mlp(s.width, 4), _labelling_batch, _ignoring, NODES
    ),
    "labelling, padding left out": Entry(
        lambda s: _mlp(s.width, 4), _labelling_batch, _masked_select, NODES
    ),
    "frozen layers": Entry(_frozen, vectors, squares, WIDTH),
    "unused layers": _of(
        lambda m, x: m.a(x),
        unused=_net(),
        a=_net(),
        spare=lambda s: torch.randn(3),
    ),
    "siamese": Entry(lambda s: _mlp(s.width), _pairs, _siamese, WIDTH),
    "triplet": Entry(lambda s: _mlp(s.width), _pairs, _triplet, WIDTH),
    "variational autoencoder": Entry(
        lambda s: nn.ModuleDict({"encoder": _mlp(s.width, 4), "decoder": _mlp(2, s.width)}),
        lambda b, s: (torch.randn(b, s.width), torch.randn(b, 2)),
        _autoencoder,
        WIDTH,
    ),
    "routed experts": _of(
        _routed, sequences, NODES, gate=lambda s: nn.Linear(s.width, 3), experts=_experts
    ),
    "weighted experts": _of(
        _weighted_experts, gate=lambda s: nn.Linear(s.width, 3), experts=_experts
    ),
    "graph convolution": _of(
        _graph_convolution,
        _graphs,
        NODES,
        a=lambda s: nn.Linear(s.width, 4),
        b=lambda s: nn.Linear(4, 2),
    ),
    "messages on edges": _of(
        _messages,
        _edge_lists,
        NODES,
        message=lambda s: _mlp(2 * s.width, 3),
        update=lambda s: _mlp(s.width + 3, 2),
    ),
    "deep sets": _of(_set, _set_batch, NODES, a=_net(), b=lambda s: _mlp(3)),
    "capsules": _of(_capsules, sequences, NODES, w=lambda s: torch.randn(s.tokens, 3, s.width, 2)),
    "hypernetwork": _of(
        _hypernetwork,
        lambda b, s: (torch.randn(b, s.width), torch.randn(b, 2)),
        weights=lambda s: _mlp(2, 3 * s.width),
        bias=lambda s: torch.randn(3),
    ),
    "chain of labels": _of(
        None,
        _labelling_batch,
        NODES,
        _crf,
        a=lambda s: nn.Linear(s.width, 4),
        start=lambda s: torch.randn(4),
        moves=lambda s: torch.randn(4, 4),
    ),
    "euler steps": _of(_euler, a=lambda s: _mlp(s.width + 1, s.width)),
    "solved": replace(
        _of(_solved, a=lambda s: torch.randn(s.width, s.width)), falls_back=EVERY_DTYPE
    ),
    "solved per sample": _of(
        _solved_per_sample,
        a=lambda s: torch.randn(s.width, s.width),
        b=lambda s: torch.randn(s.width),
    ),
    "best tokens": _of(_best, sequences, NODES, a=_net(4), b=lambda s: nn.Linear(4, 2)),
    "fourier features": _of(
        _fourier, frequencies=lambda s: torch.randn(s.width, 4), a=lambda s: nn.Linear(8, 3)
    ),
    "checkpointed": _of(
        lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), a=_net(), b=lambda s: _mlp(3)
    ),
}
