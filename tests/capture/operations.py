"""Graphs of one operation, for every name that has a carrier or a formula."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

GENERATOR = torch.Generator()


def leaf(*shape, low=0.2, high=0.9):
    """Within the domain of every function here, away from kinks."""
    values = torch.rand(shape, generator=GENERATOR, dtype=torch.float64) * (high - low) + low
    return values.requires_grad_()


def ints(high, *shape):
    return torch.randint(high, shape, generator=GENERATOR)


SHAPE = (4, 6)


def unary(*functions):
    return [lambda f=f: f(leaf(*SHAPE)) for f in functions]


def binary(function):
    """Of equal shapes, and with either input broadcast."""
    pairs = [(SHAPE, SHAPE), (SHAPE, (6,)), ((4, 1), SHAPE), ((3, 4, 6), (4, 1)), ((1, 6), (4, 1))]
    return [lambda a=a, b=b: function(leaf(*a), leaf(*b)) for a, b in pairs]


def with_target(function):
    return [
        lambda: function(leaf(*SHAPE), torch.rand(SHAPE, dtype=torch.float64), reduction="none")
    ]


def padded(dims, **options):
    def call():
        return F.pad(leaf(3, 2, *[4] * dims), [1, 2] * dims, **options)

    return [call]


def upsampled(dims, mode):
    return [lambda: F.interpolate(leaf(3, 2, *[3] * dims), size=[4] * (dims - 1) + [3], mode=mode)]


def attention(function):
    return [lambda: function(*[leaf(3, 2, 4, 8) for _ in range(3)])]


def apart():
    """A mask of two documents of two tokens each, causal."""
    document = torch.tensor([0, 0, 1, 1])
    return (document[:, None] == document).tril()[None, None]


def hooked():
    """A module with a full backward hook has its inputs pass through a function of torch."""

    class Two(nn.Module):
        def forward(self, a, b):
            return a, b

    module = Two()
    module.register_full_backward_hook(lambda *_: None)
    return module(leaf(*SHAPE) * 1, leaf(3, 2) * 1)


def filled(function):
    def call():
        x = leaf(*SHAPE) * 1
        function(x)
        return x

    return call


def multiplied_in_groups():
    pytest.importorskip("transformers.integrations.moe")
    offs = torch.tensor([2, 2, 3, 6])
    return torch.ops.transformers.grouped_mm_fallback(leaf(6, 2), leaf(4, 2, 3), offs)


aten = torch.ops.aten

# of torch and torch.nn.functional, by their names in lower case
UNARY = (
    "Abs Acos Angle Asin Asinh Atan Atanh Ceil Clone Cos Cosh Deg2Rad Digamma Erf Erfc Erfinv Exp"
    " Exp2 Expm1 Floor Frac Lgamma Log Log10 Log1P Log2 Logit Nan_To_Num Neg Rad2Deg Reciprocal"
    " Relu Round Rsqrt Sgn Sigmoid Sign Sin Sinc Sinh Sqrt Tan Tanh Trunc Celu Elu Gelu Hardshrink"
    " Hardsigmoid Hardswish Hardtanh Leaky_Relu LogSigmoid Mish Silu Softplus Softshrink"
)
BINARY = (
    "Add Atan2 Copysign Div Fmax Fmin Fmod Hypot Logaddexp Logaddexp2 Maximum Minimum Mul Pow"
    " Remainder Rsub Sub Xlogy"
)
LOSSES = (
    "Binary_Cross_Entropy Binary_Cross_Entropy_With_Logits Huber_Loss Mse_Loss Smooth_L1_Loss"
    " Soft_Margin_Loss"
)
REDUCTIONS = "Sum Nansum Mean Amax Amin Max Min Var Std Logsumexp Prod"


def named(names, make):
    """{the node's name: calls of the function}."""
    found = {}
    for name in names.split():
        owner = torch if hasattr(torch, name.lower()) and "_With" not in name else F
        function = getattr(owner, name.lower())
        found[name.replace("_", "")] = make(function)
    return found


def reduced(f):
    return [
        lambda: f(leaf(4, 4, 4), 1),
        lambda: f(leaf(4, 6, 2), -1, keepdim=True),
        lambda: f(leaf(4, 4, 4), 0),
    ]


def along(f):
    return [lambda d=d: f(leaf(4, 6, 3), d) for d in (0, 1, -1)]


CASES = {
    **named(UNARY, lambda f: unary(f)),
    **named(BINARY, binary),
    **named(LOSSES, with_target),
    **named(REDUCTIONS, reduced),
    **named("Softmax Log_Softmax Cumsum Cumprod Logcumsumexp Sort", along),
    "SafeSoftmax": along(aten._safe_softmax),
    "Acosh": [lambda: torch.acosh(leaf(*SHAPE, low=1.1, high=2))],
    "Addcdiv": [lambda: torch.addcdiv(leaf(*SHAPE), leaf(6), leaf(4, 1), value=2)],
    "Addcmul": [lambda: torch.addcmul(leaf(6), leaf(4, 1), leaf(*SHAPE), value=2)],
    "Alias": [lambda: aten.alias(leaf(*SHAPE))],
    "Clamp": [lambda: leaf(*SHAPE).clamp(0.3, 0.7), lambda: leaf(*SHAPE).clamp(leaf(6) / 4)][:1],
    "ClampMax": [lambda: leaf(*SHAPE).clamp_max(0.7)],
    "ClampMin": [lambda: leaf(*SHAPE).clamp_min(0.3)],
    "CopyBackwards": [filled(lambda x: x.copy_(leaf(6))), filled(lambda x: x.copy_(leaf(4, 1)))],
    "Expand": [lambda: leaf(4, 1).expand(4, 6), lambda: leaf(6).expand(3, 4, 6)],
    "Fill": [lambda: torch.fill(leaf(*SHAPE), leaf())],
    "Lerp": [
        lambda: torch.lerp(leaf(*SHAPE), leaf(6), 0.3),
        lambda: torch.lerp(leaf(*SHAPE), leaf(6), leaf(4, 1)),
    ],
    "MaskedFill": [
        lambda: leaf(*SHAPE).masked_fill(ints(2, 4, 6) > 0, 0.0),
        lambda: leaf(*SHAPE).masked_fill(ints(2, 6) > 0, leaf()),
    ],
    "NativeDropout": [lambda: torch.native_dropout(leaf(*SHAPE), 0.3, True)],
    "PreluKernel": [
        lambda: F.prelu(leaf(3, 4, 2, low=-1), leaf(4)),
        lambda: F.prelu(-leaf(4), leaf(1)),
    ],
    "RreluWithNoise": [lambda: F.rrelu(leaf(*SHAPE, low=-1), training=True)],
    "SpecialEntr": unary(torch.special.entr),
    "Threshold": unary(lambda x: F.threshold(x, 0.5, 0.1)),
    "ToCopy": unary(lambda x: x.float()),
    "Where": [lambda: torch.where(ints(2, 4, 6) > 0, leaf(*SHAPE), leaf(6))],
    # views
    "View": [
        lambda: leaf(4, 6).view(2, 2, 6),
        lambda: leaf(4, 6).view(24),
        lambda: leaf(2, 3, 4).view(6, 4),
    ],
    "UnsafeView": [lambda: aten._unsafe_view(leaf(2, 3, 4), [6, 4])],
    "ReshapeAlias": [lambda: aten._reshape_alias(leaf(2, 3, 4), [6, 4], [4, 1])],
    "Squeeze": [lambda: leaf(4, 1, 6).squeeze(1), lambda: leaf(4, 1, 6).squeeze()],
    "Unsqueeze": [lambda: leaf(4, 6).unsqueeze(1), lambda: leaf(4, 6).unsqueeze(-1)],
    "T": [lambda: leaf(4, 4).t(), lambda: leaf(4).t()],
    "Transpose": [lambda: leaf(4, 6, 2).transpose(-1, 0), lambda: leaf(4, 4, 4).transpose(1, -1)],
    "Permute": [lambda: leaf(4, 6, 2).permute(2, 0, -2), lambda: leaf(3, 3, 3).permute(1, 2, 0)],
    "Repeat": [lambda: leaf(4, 3).repeat(2, 3), lambda: leaf(3).repeat(2, 4, 1)],
    "BackwardHookFunction": [hooked],
    # reductions
    "Norm": [lambda: aten.norm(leaf(4, 6, 2), 3, [1]), lambda: aten.norm(leaf(4, 6, 2), 2, [0, 2])],
    "LinalgVectorNorm": [
        lambda: torch.linalg.vector_norm(leaf(4, 6, 2), 3, 1),
        lambda: torch.linalg.vector_norm(leaf(4, 6, 2), 2, (0, 2), keepdim=True),
    ],
    # along one dimension
    "Topk": [lambda: leaf(4, 6).topk(3, 1), lambda: leaf(4, 6).topk(4, 0)],
    "Flip": [lambda: leaf(4, 6, 2).flip(1), lambda: leaf(4, 6, 2).flip(0, -1)],
    "Roll": [
        lambda: leaf(4, 6, 2).roll(1, 0),
        lambda: leaf(4, 6, 2).roll((1, 2), (1, -1)),
        lambda: leaf(4, 6).roll(3),
    ],
    "Glu": [lambda: F.glu(leaf(4, 6, 3), 1), lambda: F.glu(leaf(4, 6), 0)],
    "Gather": [
        lambda: leaf(4, 4).gather(1, ints(4, 4, 4)),
        lambda: leaf(4, 6).gather(0, ints(4, 3, 6)),
        lambda: leaf(4, 6).gather(1, ints(6, 2, 6)),
    ],
    "Unfold": [lambda: leaf(4, 6).unfold(1, 3, 1), lambda: leaf(4, 6, 3).unfold(-2, 2, 2)],
    "IndexSelect": [
        lambda: leaf(4, 6).index_select(0, ints(4, 5)),
        lambda: leaf(4, 6).index_select(-1, ints(6, 4)),
    ],
    # losses
    "NllLoss": [lambda: F.nll_loss(leaf(4, 6), ints(6, 4), reduction="none")],
    "NllLoss2D": [lambda: F.nll_loss(leaf(4, 4, 4, 4), ints(4, 4, 4, 4), reduction="none")],
    # of the last dimensions
    "MaxPool2DWithIndices": [lambda: F.max_pool2d(leaf(3, 2, 4, 4), 3, 1, 1)],
    "AvgPool2D": [
        lambda: F.avg_pool2d(leaf(3, 2, 4, 4), 3, 1, 1),
        lambda: F.avg_pool2d(leaf(3, 4, 4), 2),
    ],
    "AdaptiveAvgPool2D": [lambda: F.adaptive_avg_pool2d(leaf(3, 2, 4, 4), 3)],
    "AdaptiveMaxPool2D": [lambda: F.adaptive_max_pool2d(leaf(3, 2, 4, 4), 3)],
    "Im2Col": [lambda: F.unfold(leaf(3, 2, 4, 4), 2)],
    "MaxPool3DWithIndices": [lambda: F.max_pool3d(leaf(3, 2, 4, 4, 4), 3, 1, 1)],
    "AvgPool3D": [lambda: F.avg_pool3d(leaf(3, 2, 4, 4, 4), 3, 1, 1)],
    "AdaptiveAvgPool3D": [lambda: F.adaptive_avg_pool3d(leaf(3, 2, 4, 4, 4), 3)],
    "AdaptiveMaxPool3D": [lambda: F.adaptive_max_pool3d(leaf(3, 2, 4, 4, 4), 3)],
    "PixelShuffle": [lambda: F.pixel_shuffle(leaf(3, 8, 2, 3), 2)],
    "PixelUnshuffle": [lambda: F.pixel_unshuffle(leaf(3, 2, 4, 2), 2)],
    "UpsampleNearest1D": upsampled(1, "nearest"),
    "UpsampleLinear1D": upsampled(1, "linear"),
    "UpsampleNearestExact1D": upsampled(1, "nearest-exact"),
    "UpsampleNearest2D": upsampled(2, "nearest"),
    "UpsampleBilinear2D": upsampled(2, "bilinear"),
    "UpsampleBicubic2D": upsampled(2, "bicubic"),
    "UpsampleNearestExact2D": upsampled(2, "nearest-exact"),
    "UpsampleNearest3D": upsampled(3, "nearest"),
    "UpsampleTrilinear3D": upsampled(3, "trilinear"),
    "UpsampleNearestExact3D": upsampled(3, "nearest-exact"),
    **{f"ReflectionPad{d}D": padded(d, mode="reflect") for d in (1, 2, 3)},
    **{f"ReplicationPad{d}D": padded(d, mode="replicate") for d in (1, 2, 3)},
    "ConstantPadNd": [
        *padded(1),
        *padded(2, value=1.0),
        lambda: F.pad(leaf(4, 6), [0, 0, 1, 1]),
        lambda: F.pad(leaf(4, 6), [-1, 1]),
    ],
    "Tril": [lambda: leaf(3, 4, 4).tril(), lambda: leaf(4, 4).tril()],
    "Triu": [lambda: leaf(3, 4, 4).triu(1)],
    # norms and convolutions
    "NativeLayerNorm": [
        lambda: F.layer_norm(leaf(3, 4, 6), (6,), leaf(6), leaf(6)),
        lambda: F.layer_norm(leaf(3, 4, 6), (4, 6), leaf(4, 6), leaf(4, 6)),
    ],
    "NativeGroupNorm": [lambda: F.group_norm(leaf(3, 4, 6), 2, leaf(4), leaf(4))],
    "NativeBatchNorm": [
        lambda t=t: F.batch_norm(
            leaf(3, 4, 6), torch.zeros(4).double(), torch.ones(4).double(), leaf(4), leaf(4), t
        )
        for t in (True, False)
    ],
    "Convolution": [
        lambda: F.conv2d(leaf(3, 2, 4, 4), leaf(4, 2, 2, 2), leaf(4)),
        lambda: F.conv1d(leaf(2, 4, 5), leaf(4, 2, 2), leaf(4), groups=2),
        lambda: F.conv1d(leaf(1, 4, 4), leaf(4, 4, 1), leaf(4)),
        lambda: F.conv_transpose1d(leaf(3, 4, 5), leaf(4, 2, 3), leaf(2)),
    ],
    "ScaledDotProductFlashAttentionForCpu": [
        *attention(F.scaled_dot_product_attention),
        *attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, apart())),
        *attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, apart()[0, 0])),
        *attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, apart()[:, :, -1:])),
    ],
    # products
    "Mm": [lambda: leaf(4, 3) @ leaf(3, 6)],
    "Addmm": [
        lambda: torch.addmm(leaf(6), leaf(4, 3), leaf(3, 6), beta=0.5, alpha=2),
        lambda: torch.addmm(leaf(4, 1), leaf(4, 3), leaf(3, 6)),
    ],
    "Bmm": [lambda: torch.bmm(leaf(2, 4, 3), leaf(2, 3, 6))],
    "Baddbmm": [
        lambda: torch.baddbmm(leaf(6), leaf(2, 4, 3), leaf(2, 3, 6), beta=0.5, alpha=2),
        lambda: torch.baddbmm(leaf(2, 1, 6), leaf(2, 4, 3), leaf(2, 3, 6)),
    ],
    "Mv": [lambda: torch.mv(leaf(4, 3), leaf(3))],
    "Addmv": [
        lambda: torch.addmv(leaf(4), leaf(4, 3), leaf(3), beta=0.5, alpha=2),
        lambda: torch.addmv(leaf(1), leaf(4, 3), leaf(3)),
    ],
    "Embedding": [
        lambda: F.embedding(ints(5, 4, 3), leaf(5, 6)),
        lambda: F.embedding(ints(5, 4, 3), leaf(5, 6), padding_idx=1),
    ],
    "EmbeddingBag": [
        lambda m=m: F.embedding_bag(ints(5, 4, 3), leaf(5, 6), mode=m) for m in ("sum", "mean")
    ],
    # picking and joining
    "Slice": [
        lambda: leaf(8, 6)[2:6],
        lambda: leaf(4, 6)[:, -4:-1],
        lambda: leaf(8, 6)[::2],
        lambda: aten.slice(leaf(4, 6), 1, 0, 6),
    ],
    "Select": [lambda: leaf(4, 4, 4)[1], lambda: leaf(4, 4, 4)[:, -1], lambda: leaf(4)[2]],
    "Split": [lambda: leaf(4, 6).split(2), lambda: leaf(4, 6).split(4, -1)],
    "UnsafeSplit": [lambda: leaf(4, 6).unsafe_split(3, 1)],
    "SplitWithSizes": [lambda: leaf(4, 6).split([1, 3]), lambda: leaf(4, 6).split([2, 4], 1)],
    "UnsafeSplitWithSizes": [lambda: leaf(4, 6).unsafe_split_with_sizes([2, 4], 1)],
    "Unbind": [lambda: leaf(3, 4).unbind(), lambda: leaf(4, 4, 4).unbind(1)],
    "Cat": [
        lambda: torch.cat([leaf(1, 6), leaf(3, 6)]),
        lambda: torch.cat([leaf(4, 2), leaf(4, 4)], -1),
    ],
    "Stack": [lambda: torch.stack([leaf(4), leaf(4)]), lambda: torch.stack([leaf(4, 4, 4)] * 2, 1)],
    "IndexAdd": [
        lambda: leaf(4, 6).index_add(0, ints(4, 5), leaf(5, 6), alpha=2),
        lambda: leaf(4, 6, 2).index_add(-1, ints(2, 4), leaf(4, 6, 4)),
        lambda: leaf(4).index_add(0, ints(4, 3), leaf(3)),
    ],
    "IndexCopy": [
        lambda: leaf(4, 6).index_copy(0, torch.tensor([3, 1]), leaf(2, 6)),
        lambda: leaf(4, 6).index_copy(1, torch.tensor([0, 5, 2]), leaf(4, 3)),
    ],
    # operations without a formula of their own, for what meets a parameter
    "Index": [
        lambda: leaf(5, 3)[ints(5, 4, 2)],
        lambda: leaf(5, 6)[ints(5, 4), ints(6, 4)],
        lambda: leaf(5, 6, 2)[-ints(5, 4, 1) - 1, ints(6, 3)],
        lambda: leaf(5, 6)[:, ints(6, 4)],
        lambda: leaf(5)[ints(5, 6)],
        lambda: leaf(4, 3)[torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])],
        lambda: leaf(4, 3, 2)[:, torch.tensor([[0, 1, 1], [2, 0, 0]])],
        lambda: leaf(4, 3, 2)[torch.tensor([[0], [2]]), :, torch.tensor([1, 0])],
        lambda: leaf(4, 3)[torch.tensor([True, False, True, True])],
        lambda: leaf(4, 3)[leaf(4, 3) > 0.5],
        lambda: leaf(4, 3)[torch.tensor([3, 0]), torch.tensor([1, 2])],
    ],
    "GeneratedBackwardFor_transformers_grouped_mm_fallback_defaultBackward": [multiplied_in_groups],
}
