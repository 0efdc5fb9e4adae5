"""Convolutions, pooling, resampling, normalisation of images, and networks of them."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.capture.zoo_entry import (
    Entry,
    Made,
    classify,
    images,
    labelled,
    lines,
    squares,
    sums,
    volumes,
)

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH = {1: lines, 2: images, 3: volumes}
SIDE = {1: (9, 6), 2: (7, 6), 3: (5, 6)}
IMAGE = {"channels": (2, 1, 3), "side": (8, 4)}
KERNEL = {"kernel": (3, 1, 2), "stride": (1, 2), "dilation": (1, 2), "groups": (1, 2, 4)}


def _conv(dims, mode="zeros", bias=True):
    return Entry(
        lambda s: nn.Sequential(
            CONV[dims](4, 4, s.kernel, s.stride, s.padding, s.dilation, s.groups, bias, mode),
            nn.Tanh(),
            CONV[dims](4, 3, 1, bias=bias),
        ),
        lambda b, s: BATCH[dims](b, s),
        squares,
        {"channels": (4,), "side": SIDE[dims], "padding": (1, 0, 2), **KERNEL},
    )


def _transposed(dims):
    return Entry(
        lambda s: TRANSPOSED[dims](
            4, 8, s.kernel, s.stride, s.padding, s.stride - 1, s.groups, True, s.dilation
        ),
        lambda b, s: BATCH[dims](b, s),
        sums,
        {"channels": (4,), "side": (4, 3), "padding": (0, 1), **KERNEL, "kernel": (3, 2)},
    )


def _same(mode):
    return Entry(
        lambda s: nn.Sequential(
            nn.Conv2d(s.channels, 3, s.kernel, padding="same", padding_mode=mode), nn.Tanh()
        ),
        images,
        squares,
        {**IMAGE, "kernel": (3, 1, (1, 5))},
    )


def _between(*layers):
    """Layers of no parameters, or few, between two convolutions."""
    return Entry(
        lambda s: nn.Sequential(
            nn.Conv2d(s.channels, 4, 3, padding=1),
            *(layer() for layer in layers),
            nn.LazyConv2d(3, 1),
        ),
        images,
        squares,
        IMAGE,
    )


def _resized(**options):
    return _between(lambda: Made(lambda m, x: F.interpolate(x, **options)))


def _classifier(build, shapes=IMAGE):
    return Entry(build, labelled(images), classify, shapes)


def _of(function, shapes=IMAGE, batch=images, **parts):
    return Entry(
        lambda s: Made(function, **{name: part(s) for name, part in parts.items()}),
        batch,
        squares,
        shapes,
    )


def _head(channels):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]


class Block(nn.Module):
    """Two convolutions around which the input is carried."""

    def __init__(self, fan_in, fan_out, norm, stride=1):
        super().__init__()
        self.a = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.b = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([norm(fan_out), norm(fan_out)])
        self.skip = nn.Conv2d(fan_in, fan_out, 1, stride)

    def forward(self, x):
        inner = F.relu(self.norms[0](self.a(x)), inplace=True)
        inner = self.norms[1](self.b(inner))
        inner += self.skip(x)
        return F.relu(inner)


def _resnet(norm):
    return _classifier(
        lambda s: nn.Sequential(Block(s.channels, 4, norm), Block(4, 6, norm, 2), *_head(6))
    )


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        return x * self.b(F.silu(self.a(x.mean((2, 3), keepdim=True)))).sigmoid()


def _mobilenet(s):
    return nn.Sequential(
        nn.Conv2d(s.channels, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 3, s.stride, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
        SqueezeExcite(8), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), *_head(4),
    )  # fmt: skip


def _convnext(m, x):
    inner = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
    inner = m.scale * m.project(F.gelu(m.expand(inner)))
    return x + inner.permute(0, 3, 1, 2)


def _unet(m, x):
    a = m.a(x).relu()
    b = m.b(F.max_pool2d(a, 2)).relu()
    c = m.c(F.avg_pool2d(b, 2)).relu()
    b = m.d(torch.cat([F.interpolate(c, scale_factor=2), b], 1)).relu()
    return m.out(torch.cat([m.up(b), a], 1))


def _unet_part(fan_in, fan_out):
    return lambda s: nn.Conv2d(fan_in or s.channels, fan_out, 3, padding=1)


def _transformer_of_space(m, x):
    theta = m.where(F.adaptive_avg_pool2d(x, 2).flatten(1)).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return m.a(F.grid_sample(x, grid, align_corners=False))


def _unfolded(m, x):
    columns = F.unfold(x, 3, padding=1)
    return (m.w @ columns).view(len(x), -1, *x.shape[2:]).tanh()


def _local(m, x):
    """Like a convolution, with weights of its own at each place."""
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2)
    return torch.einsum("bcijkl,ijockl->boij", patches, m.w)


def _demodulated(m, x):
    """Each sample convolved with its own weights, as groups of one convolution."""
    style = m.style(x.mean((2, 3)))
    w = m.w * style[:, None, :, None, None]
    w = w * w.square().sum((2, 3, 4), keepdim=True).add(1e-3).rsqrt()
    b, c, *side = x.shape
    out = F.conv2d(x.reshape(1, b * c, *side), w.flatten(0, 1), padding=1, groups=b)
    return out.view(b, -1, *side)


def _spectral(m, x):
    """A filter learned per frequency."""
    transformed = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(m.filter)
    return torch.fft.irfft2(transformed, s=x.shape[-2:], norm="ortho").tanh()


def _tcn(m, x):
    for k, layer in enumerate(m.layers):
        gate, value = layer(F.pad(x, (2 * 2**k, 0))).chunk(2, 1)
        x = x + gate.sigmoid() * value.tanh()
    return x


def _per_channel(m, x):
    return m.a(m.scale.view(1, -1, 1, 1) * x + m.shift[:, None, None])


def _film(m, x, y):
    scale, shift = m.condition(y).chunk(2, 1)
    return m.b(m.a(x) * scale[..., None, None] + shift[..., None, None])


class Unpooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x):
        return self.unpool(*self.pool(x))


IMAGES = {
    **{f"conv{d}d": _conv(d) for d in CONV},
    **{f"conv1d {mode}": _conv(1, mode) for mode in ("reflect", "replicate", "circular")},
    **{f"conv2d {mode}": _conv(2, mode, False) for mode in ("reflect", "replicate", "circular")},
    **{f"conv3d {mode}": _conv(3, mode) for mode in ("replicate", "circular")},
    **{f"transposed conv{d}d": _transposed(d) for d in TRANSPOSED},
    **{f"conv2d same {mode}": _same(mode) for mode in ("zeros", "reflect", "circular")},
    "conv2d valid": Entry(
        lambda s: nn.Conv2d(s.channels, 3, (2, 3), padding="valid"), images, sums, IMAGE
    ),
    "conv2d depthwise": _of(
        lambda m, x: m.b(m.a(x).relu()),
        a=lambda s: nn.Conv2d(s.channels, 2 * s.channels, 3, padding=1, groups=s.channels),
        b=lambda s: nn.Conv2d(2 * s.channels, 3, 1, bias=False),
    ),
    "conv2d channels last": Entry(
        lambda s: nn.Sequential(nn.Conv2d(s.channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2)),
        lambda b, s: (images(b, s)[0].contiguous(memory_format=torch.channels_last),),
        squares,
        IMAGE,
    ),
    "max pool": _between(lambda: nn.MaxPool2d(3, 2, 1)),
    "avg pool": _between(lambda: nn.AvgPool2d(2)),
    "lp pool": _between(lambda: nn.Softplus(), lambda: nn.LPPool2d(2, 2)),
    "adaptive avg pool": _between(lambda: nn.AdaptiveAvgPool2d((2, 3))),
    "adaptive max pool": _between(lambda: nn.AdaptiveMaxPool2d((3, 2))),
    "max unpool": _between(Unpooled),
    "nearest": _resized(scale_factor=2),
    "bilinear resize": _resized(size=(5, 7), mode="bilinear", align_corners=True),
    "bicubic": _resized(scale_factor=1.5, mode="bicubic"),
    "area": _resized(size=3, mode="area"),
    "pixel shuffle": _between(lambda: nn.PixelShuffle(2)),
    "pixel unshuffle": _between(lambda: nn.PixelUnshuffle(2)),
    "channel shuffle": _between(lambda: nn.ChannelShuffle(2)),
    "zero pad": _between(lambda: nn.ZeroPad2d((1, 2, 0, 1))),
    "reflection pad": _between(lambda: nn.ReflectionPad2d((1, 2, 2, 1))),
    "replication pad": _between(lambda: nn.ReplicationPad2d((1, 2, 0, 1))),
    "rolled": _between(lambda: Made(lambda m, x: x.roll((1, -2), (2, 3)))),
    "softmax over space": _between(lambda: Made(lambda m, x: x.flatten(2).softmax(2).view_as(x))),
    "batch norm in eval": _between(lambda: nn.BatchNorm2d(4), lambda: nn.ReLU(inplace=True)),
    "group norm": _between(lambda: nn.GroupNorm(2, 4)),
    "instance norm": _between(lambda: nn.InstanceNorm2d(4)),
    "affine instance norm": _between(lambda: nn.InstanceNorm2d(4, affine=True), nn.GELU),
    "tracked instance norm": _between(
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    ),
    "layer norm of channels": _between(
        lambda: Made(
            lambda m, x: m.norm(x.movedim(1, -1)).movedim(-1, 1), norm=nn.LayerNorm(4)
        )
    ),
    "local response norm": _between(lambda: nn.LocalResponseNorm(3)),
    "prelu per image channel": _between(lambda: nn.PReLU(4)),
    "affine instance norm 1d": Entry(
        lambda s: nn.Sequential(nn.Conv1d(s.channels, 3, 2), nn.InstanceNorm1d(3, affine=True)),
        lines,
        sums,
        IMAGE,
    ),
    "small cnn": _classifier(
        lambda s: nn.Sequential(
            nn.Conv2d(s.channels, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(s.side * s.side, 8), nn.ReLU(), nn.Linear(8, 3),
        ),
    ),
    "unet": _of(
        _unet,
        a=_unet_part(0, 3),
        b=_unet_part(3, 4),
        c=_unet_part(4, 5),
        d=_unet_part(9, 4),
        up=lambda s: nn.ConvTranspose2d(4, 3, 2, 2),
        out=lambda s: nn.Conv2d(6, 1, 1),
    ),
    "resnet with group norm": _resnet(lambda n: nn.GroupNorm(2, n)),
    "resnet with batch norm": _resnet(nn.BatchNorm2d),
    "squeeze excite": _between(lambda: SqueezeExcite(4)),
    "mobilenet": _classifier(_mobilenet, {**IMAGE, "stride": (1, 2)}),
    "convnext": _of(
        _convnext,
        depthwise=lambda s: nn.Conv2d(s.channels, s.channels, 5, padding=2, groups=s.channels),
        norm=lambda s: nn.LayerNorm(s.channels),
        expand=lambda s: nn.Linear(s.channels, 8),
        project=lambda s: nn.Linear(8, s.channels),
        scale=lambda s: torch.rand(s.channels),
    ),
    "spatial transformer": _of(
        _transformer_of_space,
        where=lambda s: nn.Linear(4 * s.channels, 6),
        a=lambda s: nn.Conv2d(s.channels, 3, 1),
    ),
    "unfolded convolution": _of(_unfolded, w=lambda s: torch.randn(3, 9 * s.channels)),
    "locally connected": _of(
        _local, w=lambda s: torch.randn(s.side // 2, s.side // 2, 3, s.channels, 2, 2)
    ),
    "demodulated convolution": _of(
        _demodulated,
        style=lambda s: nn.Linear(s.channels, s.channels),
        w=lambda s: torch.randn(3, s.channels, 3, 3),
    ),
    "filter of frequencies": _of(
        _spectral, filter=lambda s: torch.randn(s.channels, s.side, s.side // 2 + 1, 2)
    ),
    "derived convolution weight": _of(
        lambda m, x: F.conv2d(x, m.w * m.mask.sigmoid(), m.bias.exp()),
        w=lambda s: torch.randn(3, s.channels, 2, 2),
        mask=lambda s: torch.randn(3, 1, 1, 1),
        bias=lambda s: torch.randn(3),
    ),
    "convolution called twice": _of(
        lambda m, x: m.a(m.a(x).relu()) + m.a(F.avg_pool2d(x, 2)).mean((2, 3), keepdim=True),
        a=lambda s: nn.Conv2d(s.channels, s.channels, 3, padding=1),
    ),
    "scale and shift per channel": _of(
        _per_channel,
        a=lambda s: nn.Conv2d(s.channels, 2, 1),
        scale=lambda s: torch.randn(s.channels),
        shift=lambda s: torch.randn(s.channels),
    ),
    "feature-wise modulation": _of(
        _film,
        batch=lambda b, s: (*images(b, s), torch.randn(b, 3)),
        a=lambda s: nn.Conv2d(s.channels, 4, 3),
        condition=lambda s: nn.Linear(3, 8),
        b=lambda s: nn.Conv2d(4, 2, 1),
    ),
    "causal dilated convolutions": _of(
        _tcn,
        {"channels": (2, 1, 3), "side": (9, 4)},
        lines,
        layers=lambda s: nn.ModuleList(
            nn.Conv1d(s.channels, 2 * s.channels, 3, dilation=2**k) for k in range(3)
        ),
    ),
}  # fmt: skip
