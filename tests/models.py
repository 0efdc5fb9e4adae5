"""Small models of every kind that a Jacobian is taken of, with batches and per-sample losses."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Embedding, self-attention, layer norm; the output is tied to the embedding."""

    def __init__(self, tied):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(self.norm(x))


class Partial(nn.Module):
    """One layer is frozen, one never used, one scale is a scalar."""

    def __init__(self):
        super().__init__()
        self.frozen, self.unused, self.used = nn.Linear(5, 6), nn.Linear(3, 2), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.scale * self.used(torch.tanh(self.frozen(x)))


def classification(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def tokens(model, batch):
    """Mean over the tokens of a sample."""
    logits = model(batch["ids"])
    return F.cross_entropy(logits.mT, batch["next"], reduction="none").mean(1)


def nested(model, batch):
    return batch["extra"]["weight"] * classification(model, batch["pair"])


def _digits(size, *shape):
    return torch.randn(size, *shape), torch.randint(3, (size,))


def _tokens(size):
    return {"ids": torch.randint(11, (size, 6)), "next": torch.randint(11, (size, 6))}


def _mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def _cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3),
    ).eval()  # fmt: skip


def mlp():
    """What the tests of steps train, in float64."""
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batch(size):
    return torch.randn(size, 6).double(), torch.randint(4, (size,))


# name: (model, batch of a size, per-sample loss)
MODELS = {
    "mlp": (_mlp, lambda b: _digits(b, 5), classification),
    "cnn in eval": (_cnn, lambda b: _digits(b, 2, 6, 6), classification),
    "attention": (lambda: Attention(tied=False), _tokens, tokens),
    "tied attention": (lambda: Attention(tied=True), _tokens, tokens),
    "partial": (Partial, lambda b: _digits(b, 5), classification),
    "nested batch": (
        _mlp,
        lambda b: {"pair": _digits(b, 5), "extra": {"weight": torch.rand(b)}},
        nested,
    ),
}


def make(name, size=5, dtype=torch.float64):
    """A model, a batch of `size` samples and their loss; floating point in `dtype`."""
    build, batch_of, loss = MODELS[name]
    model = build().to(dtype)
    if name == "cnn in eval":  # statistics as a trained model has them
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    cast = lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf  # noqa: E731
    return model, torch.utils._pytree.tree_map(cast, batch_of(size)), loss


def state_of(model, optimizer=None):
    """Copies of everything a failed step must leave as it was."""
    tensors = {f"model.{k}": v.detach().clone() for k, v in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors[f"grad.{name}"] = None if parameter.grad is None else parameter.grad.clone()
    if optimizer is not None:
        for k, (_, state) in enumerate(optimizer.state.items()):
            for name, value in state.items():
                tensors[f"state.{k}.{name}"] = value.clone() if torch.is_tensor(value) else value
    return tensors


def assert_same_state(before, after):
    assert list(before) == list(after)
    for name, value in before.items():
        same = torch.equal(value, after[name]) if torch.is_tensor(value) else value == after[name]
        assert same, f"{name} changed"
