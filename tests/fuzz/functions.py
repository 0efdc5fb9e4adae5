"""autograd Functions and hooks: what user code does to gradients between parameters and losses."""

# pyright: reportIncompatibleMethodOverride=false
# a Function names what its outputs are; torch declares one name for them all

import torch


def scale(g):
    return 2 * g


def clamp(g):
    return g.clamp(-0.1, 0.1)


def watch(g):
    """Looks, and changes nothing."""


def mask(g):
    return g * (torch.arange(g.shape[-1]) % 2) if g.dim() else g


def per_sample(g):
    """Each sample's gradient to length 1, its tokens together."""
    return g / (g.flatten(1).norm(dim=1).view(-1, *[1] * (g.dim() - 1)) + 1e-3)


def per_token(g):
    return g / (g.norm(dim=-1, keepdim=True) + 1e-3)


def whole_norm(g):
    return g / (g.norm() + 1e-3)


def centered(g):
    return g - g.mean(0)


def spread(g):
    return g / (g.std() + 1e-3)


def clipped(g):
    return g * (0.1 / (g.norm() + 1e-6)).clamp(max=1)


# on a gradient [B, ...]: which rows they see apart
EDITS = {
    "scale": scale,
    "clamp": clamp,
    "watch": watch,
    "mask": mask,
    "per sample": per_sample,
    "per token": per_token,
    "whole norm": whole_norm,
    "centered": centered,
    "spread": spread,
    "clipped": clipped,
}


class Edited(torch.autograd.Function):
    """The identity, with an edit of its gradient."""

    @staticmethod
    def forward(ctx, x, edit):
        ctx.edit = edit
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        changed = ctx.edit(g)
        return (g if changed is None else changed), None


class Linear(torch.autograd.Function):
    """x Wᵀ, as kernels of one's own have it."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.mT

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).mT @ x.flatten(0, -2)


class New(torch.autograd.Function):
    """As `Linear`, in the style with setup_context, once differentiable."""

    @staticmethod
    def forward(x, w):
        return x @ w.mT, x.sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).mT @ x.flatten(0, -2)


class Two(torch.autograd.Function):
    """Two outputs of one input, of which one may stay unused."""

    @staticmethod
    def forward(ctx, x, v):
        ctx.save_for_backward(x, v)
        return x * v, x.sin()

    @staticmethod
    def backward(ctx, g, h):
        x, v = ctx.saved_tensors
        return g * v + h * x.cos(), (g * x).flatten(0, -2).sum(0)


class InPlace(torch.autograd.Function):
    """Forms its gradient in the forward pass and scales it in place, as fused losses do."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = 2 * x
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return ctx.kept.mul_(g)


class Saved(torch.autograd.Function):
    """The same of a saved tensor."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(2 * (x @ w.mT), x, w)
        return (x @ w.mT).square()

    @staticmethod
    def backward(ctx, g):
        kept, x, w = ctx.saved_tensors
        kept.mul_(g)
        return kept @ w, kept.flatten(0, -2).mT @ x.flatten(0, -2)


class Counting(torch.autograd.Function):
    """Its gradient depends on how often it was called."""

    @staticmethod
    def forward(ctx, x):
        ctx.calls = 0
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        ctx.calls += 1
        return g * ctx.calls
