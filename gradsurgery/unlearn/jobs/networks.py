"""Networks of classifiers that jobs share: images [B, C, H, W] -> logits [B, classes].

Group and layer norms, not batch norm: a sample's loss must depend on that sample alone.
"""

from __future__ import annotations

from collections import OrderedDict
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.errors import InputError

LARGE = 64  # pixels from which a ResNet begins with a stride of 4
PATCHES = 64  # of an image, at most
GRID = 8  # positions a side that the CNN's first linear layer sees, at most


class SmallCNN(nn.Module):
    """Three convolutions and two linear layers; 124,426 parameters for 8 x 8 digits.

    `width`, the channels of its first layer, is half of those of the others.

    Images of more than 35 pixels a side are averaged down to 8 x 8 positions before the linear
    layers, whose weights would grow with the image.

    Raises:
        InputError: images of fewer than 4 pixels a side, of which two poolings leave nothing.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], classes: int, *, width: int = 32
    ) -> None:
        super().__init__()
        if min(size) < 4:
            raise InputError(
                f"a small CNN takes images of at least 4 x 4 pixels, got {size[0]} x {size[1]}"
            )
        height, across = (min(side // 4, GRID) for side in size)
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        if max(size) // 4 > GRID:
            self.features.append(nn.AdaptiveAvgPool2d((height, across)))
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(2 * width * height * across, 256),
            nn.ReLU(),
            nn.Linear(256, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with group norm beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.GroupNorm(groups(width), width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.GroupNorm(groups(width), width)
        self.downsample = nn.Sequential()
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False),
                nn.GroupNorm(groups(width), width),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


def groups(width: int) -> int:
    """Of a group norm: 32, or so many that each has two channels."""
    return min(32, width // 2)


def resnet18(
    channels: int, size: tuple[int, int], classes: int, *, width: int = 64
) -> nn.Sequential:
    """ResNet-18 with group norm of 32 groups: some 11 million parameters.

    `width`, the channels of its first layers, is 64 in the paper; 16 makes 0.7 million parameters.

    Images of fewer than 64 pixels a side have a 3x3 stem and no pooling after it, as is customary
    for CIFAR; larger ones the 7x7 stem and the max pooling of ImageNet. Parameters have the names
    of torchvision's, `bn1` among them, so that weights of its ResNet-18 with group norm fit.

    He et al., Deep Residual Learning for Image Recognition, 2016; Wu and He, Group Normalization,
    2018.
    """
    large = min(size) >= LARGE
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        if large
        else nn.Conv2d(channels, width, 3, 1, 1, bias=False),
        bn1=nn.GroupNorm(groups(width), width),
        relu=nn.ReLU(),
    )
    if large:
        layers["maxpool"] = nn.MaxPool2d(3, 2, 1)
    before = width
    for number in range(1, 5):
        own = width * 2 ** (number - 1)
        layers[f"layer{number}"] = nn.Sequential(
            BasicBlock(before, own, 1 if number == 1 else 2), BasicBlock(own, own, 1)
        )
        before = own
    layers.update(
        avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(before, classes)
    )
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class SmallViT(nn.Module):
    """A pre-norm vision transformer of 0.8 million parameters: class token, learned positions.

    Patches are squares of the fewest pixels that make at most 64 of them; where they do not divide
    the image, it has a border of zeros.

    Dosovitskiy et al., An Image is Worth 16x16 Words, 2021.
    """

    def __init__(self, channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        width, depth, heads = 128, 4, 4

        def grid(patch: int) -> tuple[int, int]:
            return ceil(size[0] / patch), ceil(size[1] / patch)

        patch = 1
        while grid(patch)[0] * grid(patch)[1] > PATCHES:
            patch += 1
        border = [ceil((n * patch - side) / 2) for n, side in zip(grid(patch), size, strict=True)]
        self.patches = nn.Conv2d(channels, width, patch, patch, (border[0], border[1]))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + grid(patch)[0] * grid(patch)[1], width))
        layer = nn.TransformerEncoderLayer(
            *(width, heads, 4 * width),
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, depth, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for parameter in self.encoder.parameters():  # the layers are copies of one
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT  # [B, patches, width]
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])
