"""Rows corrected by each other one at a time, PCGrad's and GradVac's loop, on a Gramian."""

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.ops._backend import _C, call, register, runs_cuda
from gradsurgery.ops._inputs import (
    as_gramian,
    check_beside,
    check_dense,
    check_gramian_finite,
    check_number,
)
from gradsurgery.ops.weighting import scratch_for


def deconflict_weights(
    gramian: Tensor, order: Tensor, targets: Tensor | None = None, beta: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Each row visits the others; where it points away from one, a multiple of that one is added.

    For row i, v = g_i: for j in order[i], j ≠ i, with φ = cos(v, g_j): if φ < t_ij,

        v ← v + |v| (t √(1 - φ²) - φ √(1 - t²)) / (|g_j| √(1 - t²)) g_j

    after which their cosine is t. With t = 0 that is v - ⟨v, g_j⟩ / |g_j|² g_j. g_j is the row as
    it was given. Zero rows are neither changed nor visited. √(1 - t²) counts as 1e-4 at least.

    Args:
        gramian: K, [..., m, m].
        order: the order of the visits, [..., m, m] int64, a permutation of the rows in each row.
        targets: t, [..., m, m] in [-1, 1]; None for 0.
        beta: the targets returned are (1 - beta) t + beta φ, φ as seen at the visit.

    Returns:
        coefficients [..., m, m] float64, row i those of v; and the new targets, None if none.

    Raises:
        InputError: shapes that do not fit.
        NonFiniteError: a Gramian with NaN or infinity (CPU).
    """
    gram = as_gramian(gramian)
    given = {"order": order} if targets is None else {"order": order, "targets": targets}
    for name, tensor in given.items():
        check_dense(tensor, name)
        check_beside(tensor, name, gram)
        if tensor.shape != gram.shape:
            raise InputError(
                f"{name} must be {list(gram.shape)} to match gramian, got {list(tensor.shape)}"
            )
    if order.dtype != torch.int64:
        raise InputError(f"order must be int64, got {order.dtype}")
    check_number("beta", beta)
    if targets is not None:
        targets = targets.to(gram)
    v, moved = call("deconflict_weights", gram, order, targets, beta)
    return v, None if targets is None else moved


def shuffled(draws: Tensor) -> Tensor:
    """Permutations [..., m] int64 of 0 .. m - 1 from numbers in [0, 1), by Fisher and Yates.

    The same everywhere. `draws` is [..., m] float32.
    """
    if _C is not None and draws.is_cpu:
        order = draws.new_empty(size=draws.shape, dtype=torch.int64)
        _C.shuffle_cpu(draws.contiguous(), order)
        return order
    order = torch.arange(draws.shape[-1], device=draws.device).expand(draws.shape).contiguous()
    for k in range(draws.shape[-1] - 1, 0, -1):
        other = (draws[..., k] * (k + 1)).long().clamp(max=k).unsqueeze(-1)
        picked = order.take_along_dim(other, -1)
        order.scatter_(-1, other, order[..., k : k + 1].clone())
        order[..., k : k + 1] = picked
    return order


def deconflict_weights_reference(
    gramian: Tensor, order: Tensor, targets: Tensor | None, beta: float
) -> tuple[Tensor, Tensor]:
    check_gramian_finite(gramian)
    moved = _copy(gramian, targets)
    m = gramian.shape[-1]
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0)
    unit = gramian * scale[..., :, None] * scale[..., None, :]
    v = torch.eye(m, dtype=gramian.dtype, device=gramian.device).expand(gramian.shape).clone()
    products, counts = unit.clone(), scale > 0
    own = torch.arange(m, device=gramian.device)
    for step in range(m):
        j = order[..., step : step + 1]
        valid = (j.squeeze(-1) != own) & counts & counts.take_along_dim(j.squeeze(-1), -1)
        product = products.take_along_dim(j, -1).squeeze(-1)
        share = (-product).clamp_min(0)
        if targets is not None:
            norm = (v * products).sum(-1).clamp_min(0).sqrt()
            target = moved.take_along_dim(j, -1).squeeze(-1)
            cosine = torch.where(norm > 0, product / norm, 0).clamp(-1, 1)
            sine, bound = (1 - cosine**2).sqrt(), (1 - target**2).clamp_min(1e-8).sqrt()
            share = (norm * (target * sine - cosine * bound) / bound).clamp_min(0)
            share = torch.where(cosine < target, share, 0)
            next_target = torch.where(valid, (1 - beta) * target + beta * cosine, target)
            moved.scatter_(-1, j, next_target[..., None])
        share = torch.where(valid, share, 0)
        v.scatter_add_(-1, j, share[..., None])
        visited = unit.take_along_dim(j, -2)  # [..., m, m]: row i is the unit row that i visits
        products = products + share[..., None] * visited
    ratio = torch.where(counts[..., :, None], norms[..., :, None] * scale[..., None, :], 0)
    eye = torch.eye(m, dtype=torch.bool, device=gramian.device)
    return torch.where(eye, v, v * ratio), moved


def deconflict_weights_native(
    gramian: Tensor, order: Tensor, targets: Tensor | None, beta: float
) -> tuple[Tensor, Tensor]:
    gramian = gramian.contiguous()
    check_gramian_finite(gramian)
    v, moved = gramian.new_empty(size=gramian.shape), _copy(gramian, targets)
    args = (gramian, order.contiguous(), None if targets is None else moved, v)
    if runs_cuda(gramian):
        scratch = scratch_for("deconflict", gramian.shape[:-1].numel(), gramian)
        _C.deconflict_weights_cuda(*args, scratch, beta)
    else:
        _C.deconflict_weights_cpu(*args, beta, torch.get_num_threads())
    return v, moved


def _copy(gramian: Tensor, targets: Tensor | None) -> Tensor:
    """What a kernel changes in place; without targets a tensor of nothing stands for them."""
    if targets is None:
        return gramian.new_empty(0)
    return targets.clone(memory_format=torch.contiguous_format)


def _fake(
    gramian: Tensor, order: Tensor, targets: Tensor | None, beta: float
) -> tuple[Tensor, Tensor]:
    moved = gramian.new_empty(0 if targets is None else targets.shape)
    return gramian.new_empty(gramian.shape), moved


register(
    "deconflict_weights",
    "(Tensor gramian, Tensor order, Tensor? targets, float beta) -> (Tensor, Tensor)",
    {
        ("torch", "any"): deconflict_weights_reference,
        ("native", "cpu"): deconflict_weights_native,
        ("native", "cuda"): deconflict_weights_native,
        ("triton", "cuda"): deconflict_weights_reference,
    },
    device_of=lambda gramian, *_: gramian.device,
    fake=_fake,
)
