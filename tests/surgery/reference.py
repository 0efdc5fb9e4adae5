"""OrthoGrad in plain torch, readable in one screen: what the library must equal.

Per-sample gradients by vmap(grad), the projection by Householder QR, no Gramian anywhere.
"""

import torch
from torch.func import functional_call, grad, vmap


def per_sample_gradients(model, batch, loss):
    """One row per sample, all parameters in one: [B, n]."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def sample_loss(parameters, sample):
        call = lambda *args: functional_call(model, parameters, args)  # noqa: E731
        return loss(call, tuple(leaf[None] for leaf in sample))[0]

    grads = vmap(grad(sample_loss), in_dims=(None, 0))(parameters, batch)
    return torch.cat([g.flatten(1) for g in grads.values()], dim=1)


def orthograd(forget_rows, retain_rows, alpha):
    """g = α mean_i g_i - (1 - α) g⊥, g⊥ = the mean forget gradient less its part in span{g_i}."""
    g_u = forget_rows.mean(0)
    q = torch.linalg.qr(retain_rows.mT).Q
    g_perp = g_u - q @ (q.mT @ g_u)
    return alpha * retain_rows.mean(0) - (1 - alpha) * g_perp


def step(model, optimizer, forget, retain, loss, alpha):
    update = orthograd(
        per_sample_gradients(model, forget, loss), per_sample_gradients(model, retain, loss), alpha
    )
    start = 0
    for parameter in model.parameters():
        end = start + parameter.numel()
        parameter.grad = update[start:end].view_as(parameter)
        start = end
    optimizer.step()
    optimizer.zero_grad()
