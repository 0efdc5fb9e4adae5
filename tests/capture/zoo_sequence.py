"""Embeddings, recurrence, attention and transformers."""

import math
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from tests.capture.zoo_entry import (
    EVERY_DTYPE,
    Entry,
    Made,
    classify,
    ids,
    images,
    labelled,
    padded,
    sequences,
    squares,
    sums,
    text,
    tokens,
)

WIDTH, LENGTH = (8, 4), (5, 1, 2, 7)
SEQUENCE = {"width": WIDTH, "tokens": LENGTH}
HEADS = {**SEQUENCE, "heads": (2, 1, 4)}
RECURRENT = {
    "width": (3, 1, 4),
    "tokens": LENGTH,
    "hidden": (4, 2),
    "layers": (1, 2),
    "both": (False, True),
}


def _of(function, shapes=SEQUENCE, batch=sequences, loss=squares, **parts):
    return Entry(
        lambda s: Made(function, **{name: part(s) for name, part in parts.items()}),
        batch,
        loss,
        shapes,
    )


def _embedding(**options):
    return lambda s: nn.Embedding(11, s.width, **options)


def _linear(out=0):
    return lambda s: nn.Linear(s.width, out or s.width)


# bags


def _bag(mode, **options):
    return _of(
        lambda m, x: m.head(m.bag(x)),
        batch=ids,
        bag=lambda s: nn.EmbeddingBag(11, s.width, mode=mode, **options),
        head=_linear(3),
    )


def _bag_of_offsets(m, x, padding):
    lengths = (~padding).sum(1)
    offsets = lengths.cumsum(0) - lengths
    return m.head(m.bag(x[~padding], offsets))


def _bag_of_weights(m, x, weights):
    """Weights of the samples, scaled by a parameter."""
    return m.head(m.bag(x, per_sample_weights=weights * m.scale))


# recurrence


def _recurrent(kind, batch_first, **options):
    def run(m, x):
        if batch_first:
            out, _ = m.rnn(x)
            return m.head(out)
        out, last = m.rnn(x.transpose(0, 1))
        last = last[0] if isinstance(last, tuple) else last
        return m.head(out).transpose(0, 1).flatten(1).sum(1, True) + last.transpose(0, 1).flatten(1)

    return _of(
        run,
        RECURRENT,
        rnn=lambda s: kind(
            s.width, s.hidden, s.layers, batch_first=batch_first, bidirectional=s.both, **options
        ),
        head=lambda s: nn.Linear(s.hidden * (1 + s.both), 2),
    )


def _cells(m, x):
    """One step after another, from a state that is learned."""
    h = m.start.expand(len(x), -1)
    state = (h, torch.zeros_like(h)) if isinstance(m.cell, nn.LSTMCell) else h
    outputs = []
    for t in range(x.shape[1]):
        state = m.cell(x[:, t], state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs, 1)


def _cell(kind):
    return _of(
        _cells,
        cell=lambda s: kind(s.width, s.width),
        start=lambda s: torch.randn(1, s.width),
    )


def _elman(m, x):
    h = x.new_zeros(len(x), x.shape[2])
    for step in x.unbind(1):
        h = (m.a(step) + h @ m.b).tanh()
    return h


def _linear_recurrence(m, x):
    """Decays of its own per channel, computed in parallel by cumulated sums."""
    decay = F.softplus(m.decay)
    times = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * decay
    return (m.a(x) * times.exp()).cumsum(1) * (-times).exp() * m.gate(x).sigmoid()


def _linear_attention(m, x):
    q, k, v = m.qkv(x).chunk(3, -1)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    states = torch.einsum("btd,bte->btde", k, v).cumsum(1)
    return torch.einsum("btd,btde->bte", q, states) / (q * k.cumsum(1)).sum(-1, True)


# attention


def _split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _self_attention(mask):
    """Attention written by hand, with `mask` of the scores: a function of model and scores."""

    def attend(m, x):
        q, k, v = (_split(layer(x), m.heads) for layer in (m.q, m.k, m.v))
        scores = mask(m, q @ k.mT / math.sqrt(q.shape[-1]))
        return m.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    return attend


def _by_hand(mask, **parts):
    return _of(
        _self_attention(mask), HEADS, heads=lambda s: s.heads,
        q=_linear(), k=_linear(), v=_linear(), o=_linear(), **parts,
    )  # fmt: skip


def _causal(m, scores):
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)


def _relative(m, scores):
    steps = torch.arange(scores.shape[-1])
    return scores + m.table[:, steps[:, None] - steps + len(steps) - 1]


def _sdpa(m, x):
    q, k, v = m.qkv(x).unflatten(-1, (3, m.heads, -1)).permute(2, 0, 3, 1, 4)
    return m.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def _sdpa_with_bias(m, x):
    q, k, v = m.qkv(x).unflatten(-1, (3, m.heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, m.bias)
    return out.transpose(1, 2).flatten(2)


def _grouped_queries(m, x):
    q = _split(m.q(x), 4)
    k, v = (_split(layer(x), 2).repeat_interleave(2, 1) for layer in (m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _rotated(m, x):
    q, k, v = (layer(x) for layer in (m.q, m.k, m.v))
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * m.frequency
    turn = torch.cat([angles, angles], -1)

    def rotate(t):
        a, b = t.chunk(2, -1)
        return t * turn.cos() + torch.cat([-b, a], -1) * turn.sin()

    return (rotate(q) @ rotate(k).mT).softmax(-1) @ v


def _multihead(**options):
    return lambda s: nn.MultiheadAttention(s.width, s.heads, **options)


def _transformer(kind, **options):
    return lambda s: kind(s.width, s.heads, 2 * s.width, dropout=0.0, batch_first=True, **options)


def _masked_mean(m, x, padding):
    out = m.layer(x, src_key_padding_mask=padding)
    return out.masked_fill(padding[..., None], 0.0).sum(1) / (~padding).sum(1, keepdim=True)


def _decode(m, x, memory):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
    return m.layer(x, memory, tgt_mask=mask, tgt_is_causal=True)


def _decoder_batch(b, s):
    return torch.randn(b, s.tokens, s.width), torch.randn(b, 3, s.width)


def _class_token(m, x):
    x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.position
    return m.head(m.layer(x)[:, 0])


def _tied(m, x):
    h = m.embedding(x) + m.position(torch.arange(x.shape[1]))
    h = m.layer(h, src_mask=torch.ones(2 * x.shape[1:], dtype=torch.bool).triu(1))
    return F.linear(m.norm(h), m.embedding.weight)


def _tied_modules(s):
    model = nn.Sequential(nn.Embedding(11, s.width), nn.Tanh(), nn.Linear(s.width, 11, False))
    model[2].weight = model[0].weight
    return model


def _patches(m, x):
    x = m.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat([m.token.repeat(len(x), 1, 1), x], 1) + m.position
    return m.head(m.norm(m.layer(x))[:, 0])


def _mixer(m, x):
    x = x + m.b(m.a(m.norms[0](x).transpose(1, 2)).relu()).transpose(1, 2)
    return x + m.d(m.c(m.norms[1](x)).relu())


def _perceiver(m, x):
    latents = m.latents.expand(len(x), -1, -1)
    latents = latents + m.cross(m.norm(latents), x, x, need_weights=False)[0]
    return m.head(latents + m.inner(latents, latents, latents, need_weights=False)[0])


def _cross(m, x, y):
    return m.attention(x, y[..., :5], y[..., 5:])[0]


TEXT = {
    "embedding": Entry(
        lambda s: nn.Sequential(nn.Embedding(11, s.width), nn.Linear(s.width, 11)),
        text,
        tokens,
        SEQUENCE,
    ),
    "embedding with padding": Entry(
        lambda s: nn.Sequential(
            nn.Embedding(11, s.width, padding_idx=3), nn.Tanh(), nn.Linear(s.width, 11)
        ),
        text,
        tokens,
        SEQUENCE,
    ),
    "embedding of one id": _of(
        lambda m, x: m.embedding(x[:, 0]), batch=ids, embedding=_embedding(), loss=sums
    ),
    "two lookups in one table": _of(
        lambda m, x: m.embedding(x) * m.embedding(x.flip(1) // 2), batch=ids, embedding=_embedding()
    ),
    "table indexed": _of(
        lambda m, x: m.table[x].tanh(), batch=ids, table=lambda s: torch.randn(11, s.width)
    ),
    "table by one-hot": _of(
        lambda m, x: F.one_hot(x, 11).to(m.table.dtype) @ m.table,
        batch=ids,
        table=lambda s: torch.randn(11, s.width),
    ),
    "position looked up once": _of(
        lambda m, x: m.a(m.embedding(x) + m.position(torch.arange(x.shape[1]))).tanh(),
        batch=ids,
        embedding=_embedding(),
        position=lambda s: nn.Embedding(s.tokens, s.width),
        a=_linear(),
    ),
    "embedding bag sum": _bag("sum"),
    "embedding bag mean": _bag("mean", padding_idx=2),
    "embedding bag max": replace(_bag("max"), falls_back=EVERY_DTYPE),
    "embedding bag with offsets": _of(
        _bag_of_offsets,
        batch=padded(ids),
        bag=lambda s: nn.EmbeddingBag(11, s.width, mode="mean"),
        head=_linear(3),
    ),
    "embedding bag with weights": _of(
        _bag_of_weights,
        batch=lambda b, s: (*ids(b, s), torch.rand(b, s.tokens)),
        bag=lambda s: nn.EmbeddingBag(11, s.width, mode="sum"),
        scale=lambda s: torch.tensor(1.5),
        head=_linear(3),
    ),
    "rnn": _recurrent(nn.RNN, True),
    "rnn relu, sequence first": _recurrent(nn.RNN, False, nonlinearity="relu"),
    "gru": _recurrent(nn.GRU, True),
    "gru, sequence first": _recurrent(nn.GRU, False, bias=False),
    # one operation of oneDNN in float32
    "lstm": replace(_recurrent(nn.LSTM, True), falls_back=(torch.float32,)),
    "lstm, sequence first": replace(_recurrent(nn.LSTM, False), falls_back=(torch.float32,)),
    "lstm cell": _cell(nn.LSTMCell),
    "gru cell": _cell(nn.GRUCell),
    "rnn cell": _cell(nn.RNNCell),
    "elman by hand": _of(_elman, a=_linear(), b=lambda s: torch.randn(s.width, s.width)),
    "linear recurrence": _of(
        _linear_recurrence, decay=lambda s: torch.randn(s.width), a=_linear(), gate=_linear()
    ),
    "linear attention": _of(_linear_attention, qkv=lambda s: nn.Linear(s.width, 3 * s.width)),
    "attention": _by_hand(lambda m, scores: scores),
    "causal attention": _by_hand(_causal),
    "relative position bias": _by_hand(
        _relative, table=lambda s: torch.randn(s.heads, 2 * s.tokens - 1)
    ),
    "fused attention": _of(
        _sdpa,
        HEADS,
        heads=lambda s: s.heads,
        qkv=lambda s: nn.Linear(s.width, 3 * s.width, bias=False),
        o=_linear(),
    ),
    "fused attention with learned bias": _of(
        _sdpa_with_bias,
        HEADS,
        heads=lambda s: s.heads,
        qkv=lambda s: nn.Linear(s.width, 3 * s.width),
        bias=lambda s: torch.randn(s.heads, s.tokens, s.tokens),
    ),
    "grouped queries": _of(
        _grouped_queries,
        q=_linear(),
        k=lambda s: nn.Linear(s.width, s.width // 2),
        v=lambda s: nn.Linear(s.width, s.width // 2),
    ),
    "rotary with learned frequencies": _of(
        _rotated,
        q=_linear(),
        k=_linear(),
        v=_linear(),
        frequency=lambda s: torch.rand(s.width // 2),
    ),
    "multihead self": _of(
        lambda m, x: m.attention(x, x, x, need_weights=False)[0],
        HEADS,
        attention=_multihead(batch_first=True),
    ),
    "multihead self with weights": _of(
        lambda m, x: m.attention(x, x, x, average_attn_weights=False)[1].sqrt(),
        HEADS,
        attention=_multihead(batch_first=True, bias=False),
    ),
    "multihead, sequence first": _of(
        lambda m, x: m.attention(*3 * [x.transpose(0, 1)])[0].transpose(0, 1),
        HEADS,
        attention=_multihead(),
    ),
    "multihead with padding": _of(
        lambda m, x, p: m.attention(x, x, x, key_padding_mask=p, need_weights=False)[0],
        HEADS,
        padded(sequences),
        attention=_multihead(batch_first=True),
    ),
    "multihead with learned keys": _of(
        lambda m, x: m.attention(x, x, x)[0],
        HEADS,
        attention=_multihead(batch_first=True, add_bias_kv=True, add_zero_attn=True),
    ),
    "multihead cross": _of(
        _cross,
        HEADS,
        lambda b, s: (*sequences(b, s), torch.randn(b, 4, 8)),
        attention=_multihead(batch_first=True, kdim=5, vdim=3),
    ),
    "encoder layer": _of(
        _masked_mean, HEADS, padded(sequences), layer=_transformer(nn.TransformerEncoderLayer)
    ),
    "encoder layer, norm first": _of(
        _masked_mean,
        HEADS,
        padded(sequences),
        layer=_transformer(nn.TransformerEncoderLayer, norm_first=True, activation="gelu"),
    ),
    "decoder layer": _of(
        _decode, HEADS, _decoder_batch, layer=_transformer(nn.TransformerDecoderLayer)
    ),
    "decoder layer, norm first": _of(
        _decode,
        HEADS,
        _decoder_batch,
        layer=_transformer(nn.TransformerDecoderLayer, norm_first=True, bias=False),
    ),
    "class token": _of(
        _class_token,
        HEADS,
        token=lambda s: torch.randn(1, 1, s.width),
        position=lambda s: torch.randn(s.tokens + 1, s.width),
        layer=_transformer(nn.TransformerEncoderLayer),
        head=_linear(3),
    ),
    "language model, tied": _of(
        _tied,
        HEADS,
        text,
        tokens,
        embedding=_embedding(),
        position=lambda s: nn.Embedding(s.tokens, s.width),
        layer=_transformer(nn.TransformerEncoderLayer, norm_first=True),
        norm=lambda s: nn.LayerNorm(s.width),
    ),
    "embedding tied to head": Entry(_tied_modules, text, tokens, SEQUENCE),
    "vision transformer": _of(
        _patches,
        {"width": WIDTH, "heads": (2, 1), "channels": (3, 1), "side": (8, 4)},
        labelled(images),
        classify,
        patch=lambda s: nn.Conv2d(s.channels, s.width, 4, 4),
        token=lambda s: torch.randn(1, 1, s.width),
        position=lambda s: torch.randn(1, (s.side // 4) ** 2 + 1, s.width),
        layer=_transformer(nn.TransformerEncoderLayer, norm_first=True),
        norm=lambda s: nn.LayerNorm(s.width),
        head=_linear(3),
    ),
    "mixer": _of(
        _mixer,
        norms=lambda s: nn.ModuleList(nn.LayerNorm(s.width) for _ in range(2)),
        a=lambda s: nn.Linear(s.tokens, 3),
        b=lambda s: nn.Linear(3, s.tokens),
        c=_linear(6),
        d=lambda s: nn.Linear(6, s.width),
    ),
    "perceiver": _of(
        _perceiver,
        HEADS,
        latents=lambda s: torch.randn(3, s.width),
        norm=lambda s: nn.LayerNorm(s.width),
        cross=_multihead(batch_first=True),
        inner=_multihead(batch_first=True),
        head=_linear(2),
    ),
}
