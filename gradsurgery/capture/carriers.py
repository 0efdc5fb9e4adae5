"""Carriers: how each operation carries a layout from its outputs to its inputs.

A carrier gets a node, the layouts and shapes of its outputs and the shapes of its inputs, and says
for each input: a Layout; SHARED where several rows meet in one element, as they do in a parameter;
COUPLED where the operation computes across samples; None where it does not know. Then, and where an
operation has no carrier, the operation is asked itself (probe.py), whose answer may be OPAQUE:
nothing is known.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.modules._functions import BackwardHookFunction

from gradsurgery.capture.layout import Axis, Layout, compress, constant, listed
from gradsurgery.capture.recomputed import read_again

SHARED = "shared"
COUPLED = "coupled"
OPAQUE = "opaque"
Shape = tuple[int, ...]
Answer = Layout | str | None  # None: ask the operation
Carrier = Callable[[Any, dict[int, Layout], Sequence[Shape], Sequence[Shape | None]], list[Answer]]

CARRIERS: dict[str, Carrier] = {}
POINTWISE = (
    "Abs Acos Acosh Add Addcdiv Addcmul Alias Angle Asin Asinh Atan Atan2 Atanh BinaryCrossEntropy"
    " BinaryCrossEntropyWithLogits Celu Ceil Clamp ClampMax ClampMin Clone"
    " Copysign CopyBackwards Cos Cosh Deg2Rad Digamma Div Elu Erf Erfc Erfinv Exp Exp2 Expand Expm1"
    " Fill Floor Fmax Fmin Fmod Frac FusedDropout Gelu Hardshrink Hardsigmoid Hardswish Hardtanh"
    " HuberLoss Hypot LeakyRelu Lerp Lgamma Log Log10 Log1P Log2 LogSigmoid Logaddexp Logaddexp2"
    " Logit MaskedFill Maximum Minimum Mish MseLoss Mul NanToNum NativeDropout Neg Pow PreluKernel"
    " Rad2Deg Reciprocal Relu Remainder Round RreluWithNoise Rsqrt Rsub Sgn Sigmoid Sign Silu Sin"
    " Sinc Sinh SmoothL1Loss SoftMarginLoss Softplus Softshrink SpecialEntr Sqrt Sub Tan Tanh"
    " Threshold ToCopy Trunc Where Xlogy"
)
ELEMENTWISE = {*POINTWISE.split(), "Addmv", "Baddbmm", "Addmm"}
ACROSS = {"Softmax", "LogSoftmax", "SafeSoftmax", "Cumsum", "Cumprod", "Logcumsumexp"}
# carriers that know of more outputs than the first
MANY = {"BackwardHookFunction", "Split", "UnsafeSplit", "SplitWithSizes", "UnsafeSplitWithSizes",
        "Unbind"}  # fmt: skip


def carries(names: str, **options: Any) -> Callable[[Callable], Callable]:
    """Register a carrier for autograd nodes, named without their `Backward0`."""

    def register(function: Callable) -> Callable:
        for name in names.split():
            CARRIERS[name] = (
                (lambda *args, f=function: f(*args, **options)) if options else function
            )
        return function

    return register


def base_name(node: Any) -> str:
    """AddBackward0 -> Add; torch::autograd::CopySlices -> CopySlices.

    A torch.autograd.Function keeps its name: one called Mul is not torch's.
    """
    name = node.name().rpartition("::")[2]
    if hasattr(node, "apply") and node.__class__ is not BackwardHookFunction._backward_cls:
        return name
    head, found, tail = name.rpartition("Backward")
    return head if found and (not tail or tail.isdigit()) else name


def wrap(dim: int, ndim: int) -> int:
    """A dimension as autograd saved it: negative ones come as unsigned numbers."""
    dim = dim - (1 << 64) if dim >= 1 << 63 else dim
    return dim + ndim if dim < 0 else dim


def keep(layout: Layout, out: Shape, shape: Shape, dims: Sequence[int] | None = None) -> Answer:
    """Samples stay in their dimension, which must be one of `dims`."""
    axis = layout.axis(out)
    if layout.constant:
        return layout
    if axis is None or (dims is not None and axis.dim not in dims):
        return None
    return move(layout, axis, out, shape, axis.dim)


def move(layout: Layout, axis: Axis, out: Shape, shape: Shape, dim: int) -> Answer:
    if dim >= len(shape) or shape[dim] != out[axis.dim]:
        return None
    return layout.at(shape, dim, axis)


def broadcast(layout: Layout, out: Shape, shape: Shape) -> Answer:
    if layout.constant or shape == out:
        return layout
    axis = layout.axis(out)
    if axis is None:
        return None
    dim = axis.dim - (len(out) - len(shape))
    if dim < 0 or (shape[dim] == 1 and out[axis.dim] != 1):
        return SHARED
    return move(layout, axis, out, shape, dim)


@carries(POINTWISE)
def pointwise(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    return [None if s is None else broadcast(outs[0], shapes[0], s) for s in ins]


@carries("View UnsafeView ReshapeAlias Squeeze Unsqueeze")
def view(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    layout, (shape,) = outs[0], ins
    return [layout if layout.constant or layout.axis(shape) else compress(layout.elements(shape))]


@carries("T Transpose Permute")
def permute(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    layout, out, (shape,) = outs[0], shapes[0], ins
    axis = layout.axis(out)
    if layout.constant or axis is None:
        return [layout if layout.constant else None]
    order = list(range(len(out)))
    name = base_name(node)
    if name == "Permute":
        order = [wrap(d, len(out)) for d in node._saved_dims]
    elif len(out) > 1:
        a, b = (0, 1) if name == "T" else (node._saved_dim0, node._saved_dim1)
        a, b = wrap(a, len(out)), wrap(b, len(out))
        order[a], order[b] = order[b], order[a]
    return [move(layout, axis, out, shape, order[axis.dim])]


@carries("Repeat")
def repeat(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    layout, out, (shape,) = outs[0], shapes[0], ins
    axis = layout.axis(out)
    if layout.constant or axis is None:
        return [layout if layout.constant else None]
    dim = axis.dim - (len(out) - len(shape))
    if dim < 0 or shape[dim] % (axis.inner * layout.count):
        return [SHARED]
    return [layout.at(shape, dim, axis)]


@carries("BackwardHookFunction")
def same(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    """Output k is input k."""
    return [outs.get(k, constant(-1)) for k in range(len(ins))]


# reductions and what works along one dimension


@carries("Sum Nansum Mean Amax Amin Max Min Var Std Norm LinalgVectorNorm Logsumexp Prod")
def reduced(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    layout, out, shape = outs[0], shapes[0], ins[0]
    if layout.constant:
        return [layout, *[None] * (len(ins) - 1)]
    axis, dims = layout.axis(out), getattr(node, "_saved_dim", None)
    if axis is None or dims is None:
        return [None] * len(ins)
    dims = {wrap(d, len(shape)) for d in (dims if isinstance(dims, tuple) else (dims,))}
    kept = [d for d in range(len(shape)) if d not in dims]
    dim = axis.dim if len(out) == len(shape) else kept[axis.dim]
    return [move(layout, axis, out, shape, dim), *[None] * (len(ins) - 1)]


@carries(
    "Softmax LogSoftmax SafeSoftmax Cumsum Cumprod Logcumsumexp Sort Flip Roll Glu Gather Unfold"
)
@carries("Topk")
def along(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    """Samples lie in another dimension than the operation's own, and stay there."""
    layout, out, shape = outs[0], shapes[0], ins[0]
    saved = ("_saved_dim", "_saved_dims", "_saved_dimension")
    own = next((getattr(node, a) for a in saved if hasattr(node, a)), ())
    own = own if isinstance(own, tuple) else (own,)
    if not own:
        return [None] * len(ins)
    own = {wrap(d, len(shape)) for d in own}
    axis = layout.axis(out)
    if axis is not None and axis.dim in own and base_name(node) in ACROSS:
        return [COUPLED if _several(layout) else None]
    others = [d for d in range(len(shape)) if d not in own]
    return [keep(layout, out, shape, others), *[None] * (len(ins) - 1)]


def _several(layout: Layout) -> bool:
    """Samples of more than one row."""
    return len(layout.rows[layout.rows >= 0].unique()) > 1


@carries("NllLoss NllLoss2D")
def nll(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    layout, out, shape = outs[0], shapes[0], ins[0]
    axis = layout.axis(out)
    if layout.constant or axis is None:
        return [layout if layout.constant else None]
    return [move(layout, axis, out, shape, axis.dim if axis.dim == 0 else axis.dim + 1)]


# operations whose last dimensions are their own


@carries("MaxPool2DWithIndices AvgPool2D AdaptiveAvgPool2D AdaptiveMaxPool2D Im2Col", own=2)
@carries("MaxPool3DWithIndices AvgPool3D AdaptiveAvgPool3D AdaptiveMaxPool3D PixelShuffle", own=3)
@carries("PixelUnshuffle", own=3)
@carries("UpsampleNearest1D UpsampleLinear1D UpsampleNearestExact1D", own=1)
@carries("UpsampleNearest2D UpsampleBilinear2D UpsampleBicubic2D UpsampleNearestExact2D", own=2)
@carries("UpsampleNearest3D UpsampleTrilinear3D UpsampleNearestExact3D", own=3)
@carries("ReflectionPad1D ReplicationPad1D", own=1)
@carries("ReflectionPad2D ReplicationPad2D", own=2)
@carries("ReflectionPad3D ReplicationPad3D", own=3)
@carries("Tril Triu", own=2)
def leading(node: Any, outs: dict, shapes: Sequence, ins: Sequence, own: int) -> list[Answer]:
    shape = ins[0]
    answer = keep(outs[0], shapes[0], shape, range(len(shapes[0]) - own))
    return [answer, *[None] * (len(ins) - 1)]


@carries("NativeLayerNorm FusedRmsNorm")
def layer_norm(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    layout, out = outs[0], shapes[0]
    own = len(node._saved_normalized_shape)
    if layout.constant:
        return [layout] * len(ins)
    axis = layout.axis(out)
    if axis is None or axis.dim >= len(out) - own:
        return [None] * len(ins)
    return [layout, *[SHARED] * (len(ins) - 1)]


@carries("NativeGroupNorm Convolution")
def first(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    """Samples lie in the first dimension; weight and bias are shared."""
    layout = outs[0]
    if layout.constant:
        return [layout] * len(ins)
    answer = None if ins[0] is None else keep(layout, shapes[0], ins[0], (0,))
    axis = layout.axis(shapes[0])
    shared = SHARED if axis is not None and axis.dim == 0 else None
    return [answer, *[shared] * (len(ins) - 1)]


@carries("NativeBatchNorm CudnnBatchNorm")
def batch_norm(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    layout, out = outs[0], shapes[0]
    if layout.constant:
        return [layout] * len(ins)
    axis = layout.axis(out)
    if axis is None:
        return [None] * len(ins)
    if axis.dim == 1:  # each channel is of one sample, as instance norm has it
        return [
            layout,
            *[None if s is None else Layout(axis.inner, layout.numbers) for s in ins[1:]],
        ]
    x = layout if not node._saved_training else COUPLED if _several(layout) else None
    return [x, *[SHARED] * (len(ins) - 1)]


@carries(
    "ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention"
    " ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention"
)
def attention(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    layout, out, others = outs[0], shapes[0], [None] * (len(ins) - 3)
    axis = layout.axis(out)
    if axis is None or axis.dim != 2:
        heads = [None if s is None else keep(layout, out, s, (0, 1)) for s in ins[:3]]
        return [*heads, *others]
    q, k, v = ins[:3]
    # queries of several samples: a key has the row of all that see it, if that is one
    side = k if v is None else v
    keys = None if side is None else _seen(node, layout.along(out), side[2])
    if keys is None:
        return [None] * len(ins)
    theirs = [None if s is None else listed(keys, s, 2) for s in (k, v)]
    return [None if q is None else move(layout, axis, out, q, 2), *theirs, *others]


def _seen(node: Any, of: torch.Tensor, count: int) -> torch.Tensor | None:
    """Of each of K keys the one row of the queries, `of` [Q], that its mask lets see it, [K]."""
    read_again([node])
    mask = getattr(node, "_saved_attn_mask", getattr(node, "_saved_attn_bias", None))
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask != -math.inf
    seen = seen.expand(*seen.shape[:-2], len(of), count).reshape(-1, len(of), count)
    seen = seen.any(0).cpu() & (of >= 0)[:, None]
    keys = torch.where(seen, of[:, None], -1).amax(0)
    return keys if bool((~seen | (keys == of[:, None])).all()) else None


# products


@carries("Mm", first=0)
@carries("Addmm", first=1)
@carries("Bmm", first=0)
@carries("Baddbmm", first=1)
@carries("Mv", first=0)
@carries("Addmv", first=1)
def product(node: Any, outs: dict, shapes: Sequence, ins: Sequence, first: int) -> list[Answer]:
    layout, out = outs[0], shapes[0]
    if layout.constant:
        return [layout] * len(ins)
    axis = layout.axis(out)
    if axis is None:
        return [None] * len(ins)
    a, b = ins[first], ins[first + 1]
    batch = 1 if "bmm" in base_name(node).lower() else 0
    # what is added comes before the factors
    answers: list[Answer] = [None if s is None else broadcast(layout, out, s) for s in ins[:first]]
    if axis.dim < batch:
        sides = [None if s is None else move(layout, axis, out, s, 0) for s in (a, b)]
    elif axis.dim == batch:  # lines of the product are lines of its first factor
        sides = [None if a is None else move(layout, axis, out, a, batch), SHARED]
    else:
        sides = [SHARED, None if b is None else move(layout, axis, out, b, batch + 1)]
    return answers + sides


@carries("Embedding EmbeddingBag")
def embedding(node: Any, outs: dict, shapes: Sequence, ins: Sequence) -> list[Answer]:
    if outs[0].constant:
        return [outs[0]] * len(ins)
    return [SHARED, *[None] * (len(ins) - 1)]
