"""Parameters of every kind, and the tensors computed from them that random programs use."""

import torch
from torch import nn
from torch.nn import functional as F

D = 4


class Pool(nn.Module):
    """What a program may use, any number of times."""

    def __init__(self, seed, batch, tokens):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.scale, self.shift = (nn.Parameter(torch.randn(D)) for _ in range(2))
        self.table = nn.Parameter(torch.randn(D + 2, D))
        self.flat = nn.Parameter(torch.randn(2 * D * D))
        self.joint = nn.Parameter(torch.randn(3 * D, D))
        self.left, self.right = nn.Parameter(torch.randn(D, 2)), nn.Parameter(torch.randn(2, D))
        self.places, self.scalar = (
            nn.Parameter(torch.randn(tokens, D)),
            nn.Parameter(torch.randn(())),
        )
        self.own = nn.Parameter(torch.randn(batch, 1, D))
        self.frozen = nn.Parameter(torch.randn(D, D), requires_grad=False)
        self.norm, self.groups = nn.LayerNorm(D), nn.GroupNorm(2, D)
        self.root, self.batch = nn.RMSNorm(D), nn.BatchNorm1d(D)
        self.mix = nn.Conv1d(D, D, 3, padding=1)
        self.deep = nn.Conv1d(D, D, 3, padding=1, groups=D)
        self.words = nn.Embedding(D + 2, D, padding_idx=1)
        self.bag = nn.EmbeddingBag(D + 2, D, mode="mean")
        self.attention = nn.MultiheadAttention(D, 2, dropout=0.2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(D, 2, 6, dropout=0.2, batch_first=True)
        self.gru, self.lstm = nn.GRU(D, D, batch_first=True), nn.LSTM(D, D, batch_first=True)
        self.cell, self.long, self.short = nn.GRUCell(D, D), nn.LSTMCell(D, D), nn.RNNCell(D, D)
        self.pair, self.slope = nn.Bilinear(D, D, D), nn.PReLU(D)
        self.counts = nn.Embedding(D + 2, D, scale_grad_by_freq=True)
        self.sparse = nn.Embedding(D + 2, D, sparse=True)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))
        self.turned = nn.utils.parametrizations.orthogonal(nn.Linear(D, D))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))
        self.back = nn.ConvTranspose1d(D, D, 3, padding=1)
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(D, D, bias=False)
        self.out.weight = self.b.weight  # tied
        self.double()


def assigned(m):
    w = m.a.weight.clone()
    w[0] = m.scale
    w.diagonal().add_(1)
    return w


# [D, D]
WEIGHTS = {
    "plain": lambda m: m.a.weight,
    "turned": lambda m: m.a.weight.t(),
    "sum": lambda m: m.a.weight + m.b.weight,
    "sum of itself": lambda m: m.a.weight + m.a.weight.t(),
    "stacked": lambda m: torch.stack([m.a.weight, m.b.weight]).sum(0),
    "mean of three": lambda m: torch.stack([m.a.weight, m.b.weight, m.frozen]).mean(0),
    "scaled": lambda m: m.a.weight * m.scalar,
    "rows": lambda m: m.table[1 : D + 1],
    "every second": lambda m: m.flat[::2].view(D, D),
    "half": lambda m: m.flat.view(2, D, D)[1],
    "third": lambda m: m.joint.chunk(3)[1],
    "expanded": lambda m: m.scale.expand(D, D),
    "expanded column": lambda m: m.shift[:, None].expand(D, D),
    "expanded scalar": lambda m: m.scalar.expand(D, D),
    "outer": lambda m: torch.outer(m.scale, m.shift),
    "low rank": lambda m: m.frozen + m.left @ m.right,
    "joined": lambda m: torch.cat([m.left, m.right.t()], 1),
    "in place": lambda m: m.a.weight.clone().mul_(2).add_(m.b.weight),
    "assigned": assigned,
    "triangle": lambda m: m.a.weight.tril(),
    "normalized": lambda m: F.normalize(m.a.weight, dim=1),
    "whole norm": lambda m: m.a.weight / m.a.weight.norm(),
    "softmax": lambda m: m.a.weight.softmax(1),
    "flipped": lambda m: m.b.weight.flip(0),
    "permuted": lambda m: m.b.weight[torch.tensor([2, 0, 3, 1])],
    "repeated rows": lambda m: m.b.weight[torch.tensor([1, 1, 0, 2])],
    "chosen": lambda m: torch.where(m.frozen > 0, m.a.weight, m.b.weight),
    "partly detached": lambda m: m.a.weight.detach() + m.b.weight,
    "exponential": lambda m: torch.matrix_exp(0.3 * (m.a.weight - m.a.weight.t())),
    "strided": lambda m: torch.as_strided(m.flat, (D, D), (2, 1)),
    "windows": lambda m: m.flat[: 2 * D - 1].unfold(0, D, 1),
    "diagonal": lambda m: torch.diag(m.scale),
    "squared": lambda m: m.a.weight @ m.a.weight,
    "spectral": lambda m: m.a.weight / torch.linalg.matrix_norm(m.a.weight, 2),
}
# [D]
VECTORS = {
    "plain": lambda m: m.scale,
    "sum": lambda m: m.scale + m.shift,
    "bias twice": lambda m: m.a.bias + m.a.bias,
    "sum of rows": lambda m: m.table.sum(0),
    "mean of rows": lambda m: m.joint.mean(0),
    "row": lambda m: m.table[-1],
    "column": lambda m: m.a.weight[:, 2],
    "stacked": lambda m: torch.stack([m.scale, m.shift, m.a.bias]).mean(0),
    "expanded": lambda m: m.scalar.expand(D),
    "repeated": lambda m: m.scalar.repeat(D),
    "joined": lambda m: torch.cat([m.scale[:2], m.shift[2:]]),
    "flipped": lambda m: m.scale.flip(0),
    "in place": lambda m: m.scale.clone().add_(1).mul_(m.scalar),
    "exponential": lambda m: m.scale.exp() * 0.3,
    "diagonal": lambda m: m.a.weight.diagonal(),
    "largest": lambda m: m.table.max(0)[0],
    "whole sum": lambda m: 0.1 * m.joint.sum().expand(D),
    "product": lambda m: m.scale * m.shift,
    "of a sample's own": lambda m: m.own.sum((0, 1)),
    "of nothing": lambda m: m.scale.detach(),
}
