"""An entry of the zoo, and what entries are written with."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

Shape = SimpleNamespace
EVERY_DTYPE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Entry:
    """A small architecture, batches for it, and its per-sample losses.

    `shapes` holds the values that each number of a shape may take, the first being the default.
    All that a batch holds has samples in its first dimension, and no loss depends on another
    sample. `falls_back` names the dtypes in which a UserWarning is expected; `tolerance` is for
    float64, larger where a model computes in float32 whatever its dtype.
    """

    build: Callable[[Shape], nn.Module]
    batch: Callable[[int, Shape], Any]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    shapes: dict[str, tuple]
    falls_back: tuple[torch.dtype, ...] = ()
    tolerance: float = 1e-10

    def default(self):
        return Shape(**{name: values[0] for name, values in self.shapes.items()})

    def strategy(self):
        drawn = {name: st.sampled_from(values) for name, values in self.shapes.items()}
        return st.fixed_dictionaries(drawn).map(lambda values: Shape(**values))


class Made(nn.Module):
    """Modules and parameters, and a function of them and the inputs."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if torch.is_tensor(part) else part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


# batches


def vectors(size, shape):
    return (torch.randn(size, shape.width),)


def sequences(size, shape):
    return (torch.randn(size, shape.tokens, shape.width),)


def lines(size, shape):
    return (torch.randn(size, shape.channels, shape.side),)


def images(size, shape):
    return (torch.randn(size, shape.channels, shape.side, shape.side),)


def volumes(size, shape):
    return (torch.randn(size, shape.channels, shape.side, shape.side, shape.side),)


def ids(size, shape):
    return (torch.randint(11, (size, shape.tokens)),)


def labelled(batch, classes=3):
    """The batch and a class for each sample."""
    return lambda size, shape: (*batch(size, shape), torch.randint(classes, (size,)))


def padding(size, tokens):
    """Which tokens are padding: those at the end, never all."""
    return torch.arange(tokens) >= torch.randint(1, tokens + 1, (size, 1))


def padded(batch):
    return lambda size, shape: (*batch(size, shape), padding(size, shape.tokens))


# losses


def squares(model, batch):
    """Mean squared distance of all outputs from a fixed wave."""
    out = model(*batch)
    out = out.reshape(len(out), -1)
    wave = torch.arange(out.shape[1], dtype=out.dtype).cos()
    return (out - wave).square().mean(1)


def sums(model, batch):
    """Distances of the outputs from a fixed wave, summed by dimensions at once."""
    out = model(*batch)
    wave = torch.arange(out[0].numel(), dtype=out.dtype).sin().view(out.shape[1:])
    errors = F.smooth_l1_loss(out, wave.expand_as(out), reduction="none")
    return errors.sum(tuple(range(1, out.ndim)))


def classify(model, batch):
    *inputs, y = batch
    return F.cross_entropy(model(*inputs), y, reduction="none")


def tokens(model, batch):
    """Cross-entropy of the next token, averaged over the tokens of a sample."""
    x, y = batch
    return F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").mean(1)


def text(size, shape):
    return torch.randint(11, (size, shape.tokens)), torch.randint(11, (size, shape.tokens))
