"""Group norm whose gradient has a derivative in few passes over memory.

torch makes of that gradient a graph of a dozen small operations on every activation.
"""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from gradsurgery.errors import InputError
from gradsurgery.ops._backend import _C, OPERATORS, choose


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.group_norm`, for second derivatives.

    Of float32 and float64 [N, C, *] with a weight and a bias, both [C], the gradient can be
    differentiated once; anything else, and what stands in a transform, is torch's.
    """
    if weight is None or bias is None or not _serves(input, weight, bias, num_groups):
        return F.group_norm(input, num_groups, weight, bias, eps)
    # native_group_norm reads whatever lies in memory
    given = (each.contiguous() for each in (input, weight, bias))
    return _GroupNorm.apply(*given, num_groups, eps)


def _serves(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> bool:
    """Whether all is plain and as torch wants it: what is wrong is for torch to say."""
    return (
        all(type(each) in (Tensor, nn.Parameter) for each in (x, weight, bias))
        and x.dtype in (torch.float32, torch.float64)
        and all(each.dtype == x.dtype and each.device == x.device for each in (weight, bias))
        and x.dim() > 2
        and x.numel() > 0
        and weight.shape == bias.shape == x.shape[1:2]
        and groups > 0
        and x.shape[1] % groups == 0
        and not torch.is_autocast_enabled(x.device.type)
        and peek_interpreter_stack() is None  # vmap, jvp, ...
        and forward_ad._current_level < 0
    )


# torch declares backward(ctx, *grads), which named gradients do not match: hence the ignores
class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *_sizes(x), groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # this is differentiated in turn
            return *_Gradient.apply(dy, x, weight, mean, rstd), None, None
        return *_native_backward(dy.contiguous(), x, mean, rstd, weight), None, None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dy = dy.contiguous()
        ctx.save_for_backward(dy, x, weight, mean, rstd)
        return _native_backward(dy, x, mean, rstd, weight)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, u: Tensor, p: Tensor, q: Tensor
    ) -> tuple[Tensor | None, ...]:
        dy, x, *rest = ctx.saved_tensors
        return *_DoubleBackward.apply(dy, x, u, p, q, *rest), None, None


class _DoubleBackward(torch.autograd.Function):
    """Not torch's `once_differentiable`: what that raises, `torch.autograd.grad` of some inputs
    goes round."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        u: Tensor,
        p: Tensor,
        q: Tensor,
        weight: Tensor,
        mean: Tensor,
        rstd: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        double_backward = choose("group_norm", IMPLEMENTATIONS, x.device.type)
        flat = [each.contiguous().view(*x.shape[:2], -1) for each in (dy, x, u)]
        to_dy, to_x, to_weight = double_backward(*flat, weight, p, q, mean, rstd)
        return to_dy.view_as(x), to_x.view_as(x), to_weight

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:  # type: ignore[override]
        raise InputError("group_norm has no third derivative; torch's has")


def double_backward_reference(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of ⟨u, dx⟩ + ⟨p, dweight⟩ + ⟨q, dbias⟩ in dy, x and weight.

    With n = (x - mean) rstd and P z = z - <z> - n <z n>, <.> a group's mean, dx is rstd P(weight
    dy). All of dy, x, u are [N, C, L], of weight, p, q [C], of mean, rstd [N, G].
    """
    batch, channels, _ = x.shape
    groups = mean.shape[1]
    count = x.numel() // mean.numel()  # values of a group

    def by_channel(per_group: Tensor) -> Tensor:  # [N, G] -> [N, C, 1]
        return per_group.repeat_interleave(channels // groups, 1).unsqueeze(-1)

    def by_group(per_channel: Tensor) -> Tensor:  # sums, [N, C] -> [N, G]
        return per_channel.view(batch, groups, -1).sum(-1)

    r = by_channel(rstd)
    n = (x - by_channel(mean)) * r
    w, p, q = (each.view(1, -1, 1) for each in (weight, p, q))
    kept = _native_backward(u, x, mean, rstd)[0]  # rstd P u
    touched = (dy * kept).sum(-1)  # [N, C]
    along = by_group((u * n).sum(-1)) / count  # <u n>
    across = by_group((dy * n).sum(-1) * weight) / count  # <weight dy n>
    z = (p - r * by_channel(along) * w) * dy - r * by_channel(across) * u
    through_n = _native_backward(z, x, mean, rstd)[0]
    through_rstd = by_channel(rstd * by_group(touched * weight) / count) * n
    return kept * w + n * p + q, through_n - through_rstd, touched.sum(0)


def double_backward_native(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    sides = (dy, x, u, *(each.contiguous() for each in (weight, p, q, mean, rstd)))
    outs = torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[:2])
    _C.group_norm_double_backward_cpu(*sides, *outs, torch.get_num_threads())
    return outs[0], outs[1], outs[2].sum(0)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x[0, 0].numel()


def _native_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = [True, weight is not None, weight is not None]
    return torch.ops.aten.native_group_norm_backward(
        dy, x, mean, rstd, weight, *_sizes(x), mean.shape[1], wanted
    )


IMPLEMENTATIONS = {
    ("torch", "any"): double_backward_reference,
    ("native", "cpu"): double_backward_native,
    ("triton", "cuda"): double_backward_reference,
}
OPERATORS["group_norm"] = IMPLEMENTATIONS
