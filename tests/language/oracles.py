"""Losses of one sample by their definitions, a token at a time, in float64."""

import math

import torch

from tests.language.tiny import log_p, tokens


def p(logits):
    return logits.exp() / logits.exp().sum()


def total(model, sample):
    return -sum(log_p(z, y) for z, y in tokens(model, sample))


def mean(values):
    return sum(values) / len(values)


def nll(model, sample):
    return mean([-log_p(z, y) for z, y in tokens(model, sample)])


def wga(model, sample, beta):
    return mean(
        [-(log_p(z, y).exp().item() ** beta) * log_p(z, y) for z, y in tokens(model, sample)]
    )


def satimp(model, sample, beta1, beta2):
    def one(z, y):
        sure = log_p(z, y).exp().item()
        return -(sure**beta1) * (1 - sure) ** beta2 * log_p(z, y)

    return mean([one(z, y) for z, y in tokens(model, sample)])


def preferred(margin, beta):
    return 2 / beta * torch.log1p(torch.exp(-beta * margin))


def npo(model, original, sample, beta):
    return preferred(total(model, sample) - total(original, sample).item(), beta)


def simnpo(model, sample, beta, delta):
    return preferred(nll(model, sample) - delta, beta)


def dpo(model, original, sample, other, beta):
    win = total(original, other).item() - total(model, other)
    lose = total(original, sample).item() - total(model, sample)
    return preferred(win - lose, beta)


def ceu(model, sample, skip):
    def one(z, y):
        others = [v for v in range(len(z)) if v != y]
        fixed = z.detach()
        share = fixed[others].exp().sum()
        return -sum(fixed[v].exp() / share * log_p(z, v) for v in others)

    return mean([one(z, y) for z, y in tokens(model, sample)[skip:]])


def pdu(model, sample):
    return mean([(max(z) - sum(z) / len(z)) ** 2 for z, _ in tokens(model, sample)])


def raul(model, sample):
    return mean([(p(z) * (p(z) * len(z)).log()).sum() for z, _ in tokens(model, sample)])


def undial(model, original, sample, beta):
    values = []
    for (z, y), (theirs, _) in zip(tokens(model, sample), tokens(original, sample), strict=True):
        lowered = [theirs[v].item() - beta * (v == y) for v in range(len(z))]
        share = sum(map(math.exp, lowered))
        values.append(-sum(math.exp(lowered[v]) / share * log_p(z, v) for v in range(len(z))))
    return mean(values)


def kl(model, original, sample):
    pairs = zip(tokens(model, sample), tokens(original, sample), strict=True)
    return mean([(p(a.detach()) * (p(a.detach()) / p(z)).log()).sum() for (z, _), (a, _) in pairs])


def states(model, sample, layer):
    """Of a layer, at each token of the answer."""
    prompt, answer = sample
    ids = torch.tensor([prompt + answer])
    h = model.words(ids) + model.places(torch.arange(ids.shape[1]))[None]
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    for k in range(layer + 1):
        h = model.layers[k](h, seen)
    return h[0, len(prompt) :]


def rmu(model, sample, layer, scale, seed):
    h = states(model, sample, layer)
    drawn = torch.rand(h.shape[1], generator=torch.Generator().manual_seed(seed), dtype=h.dtype)
    u = drawn / drawn.square().sum().sqrt()
    return mean([((one - scale * u) ** 2).sum() for one in h])


def rmu_retain(model, original, sample, layer):
    pairs = zip(states(model, sample, layer), states(original, sample, layer), strict=True)
    return mean([((one - other.detach()) ** 2).sum() for one, other in pairs])
