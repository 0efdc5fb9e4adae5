"""Differentiable membership inference: small networks that tell members by a model's outputs."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.unlearn.objectives.classification import label_losses

# features, all of order one, that vary by less are not stretched to unit deviation: verdicts, and
# with them the model's gradients, would hang on differences of that size
LEAST = 0.01


Features = Literal["outputs", "loss"]


def features(logits: Tensor, labels: Tensor, which: Features = "outputs") -> Tensor:
    """What a membership model sees of each sample, differentiable in the logits.

    outputs, [N, 2 C + 1]: the softmax in descending order [C], the loss at the label, log(1 + loss)
    [1], and the label, one-hot [C]. loss, [N, 1]: log(1 + loss) alone.
    """
    loss = label_losses(logits, labels).log1p().unsqueeze(-1)
    if which == "loss":
        return loss
    shares = logits.softmax(-1).sort(-1, descending=True).values
    known = F.one_hot(labels, logits.shape[-1]).to(logits)
    return torch.cat([shares, loss, known], -1)


class MembershipModels(nn.Module):
    """K networks with one hidden layer, each computed in the same batched products.

    Args:
        size: features of a sample.
        models: K.
        hidden: units of the hidden layer.
        generator: draws the weights; a model's differ from those of every other.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int, models: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()

        def drawn(*shape: int) -> nn.Parameter:
            bound = 1 / math.sqrt(shape[-2])
            uniform = torch.rand(models, *shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(bound * (2 * uniform - 1))

        self.inner, self.inner_bias = drawn(size, hidden), drawn(1, hidden)
        self.outer, self.outer_bias = drawn(hidden, 1), drawn(1, 1)
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(size, dtype=torch.float64))

    def forward(self, seen: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
        """Logits that samples are members, [k, N], of features [N, size], by the models `which`."""
        x = (seen - self.mean) * self.scale
        hidden = torch.tanh(x @ self.inner[which] + self.inner_bias[which])
        return (hidden @ self.outer[which] + self.outer_bias[which]).squeeze(-1)

    def learn(self, seen: Tensor, member: Tensor, shown: Tensor, steps: int, rate: float) -> Tensor:
        """Train on an audit set; each model's share of right answers on samples not shown to it.

        Args:
            seen: features [N, size].
            member: 1 or 0, [N]. The two count alike, however many each has.
            shown: which samples each model sees, a mask [K, N].
            steps: of Adam, each on all the samples shown.
            rate: its learning rate.

        Returns:
            [K], 0.5 where nothing was learned; NaN where all samples of a kind were shown.
        """
        self.mean.copy_(seen.mean(0))
        deviation = seen.std(0, correction=0)
        self.scale.copy_(torch.where(deviation > 0, 1 / deviation.clamp_min(LEAST), 0))
        wanted = member.to(seen).expand(len(shown), -1)
        weights = _balanced(wanted, shown)
        optimizer = torch.optim.Adam(self.requires_grad_().parameters(), rate)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                losses = F.binary_cross_entropy_with_logits(self(seen), wanted, reduction="none")
                (losses * weights).sum().backward()
                optimizer.step()
        self.requires_grad_(False)
        right = ((self(seen) > 0) == (wanted > 0)).to(seen)
        return (right * _balanced(wanted, ~shown)).sum(-1)


def _balanced(wanted: Tensor, shown: Tensor) -> Tensor:
    """[K, N]: members and non-members shown to a model share its weight of one alike."""
    weights = torch.zeros_like(wanted)
    for kind in (0, 1):
        chosen = (shown & (wanted == kind)).to(wanted)
        weights += chosen / (2 * chosen.sum(-1, keepdim=True))
    return weights


def halves(member: Tensor, models: int, generator: torch.Generator) -> Tensor:
    """Masks [K, N] of half of the members and half of the others, drawn for each model.

    Two models in turn see opposite halves, so every sample is shown to as many as not.
    """
    shown = torch.zeros(models, len(member), dtype=torch.bool)
    for kind in (0, 1):
        at = (member == kind).nonzero().flatten()
        for k in range(0, models, 2):
            order = at[torch.randperm(len(at), generator=generator)]
            half = (len(at) + 1) // 2
            shown[k, order[:half]] = True
            if k + 1 < models:
                shown[k + 1, order[half:]] = True
    return shown
