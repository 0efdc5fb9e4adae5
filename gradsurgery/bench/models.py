"""The models that steps are measured on, a loss per sample and batches for them."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCAB, CLASSES = 128, 10
Batch = tuple[Tensor, Tensor]  # inputs and labels
Batches = Callable[[int], Batch]  # of a number of samples


def loss(model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """Cross entropy of each sample, [B]; the mean over its tokens where it has several."""
    x, y = batch
    logits = model(x)
    each = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
    return each.view(len(y), -1).mean(1)


class Block(nn.Module):
    """Causal attention and a GELU MLP, each after a LayerNorm and added to its input."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.heads = d // 64
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, 64] each
        x = x + self.proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, d: int, layers: int, vocab: int, tokens: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocab, d), nn.Embedding(tokens, d)
        self.blocks = nn.Sequential(*(Block(d) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocab)

    def forward(self, x: Tensor) -> Tensor:
        # positions of each sample, not of the batch: TorchJD takes modules' inputs for batched
        places = torch.arange(x.shape[1], device=x.device).expand_as(x)
        return self.head(self.norm(self.blocks(self.embedding(x) + self.positions(places))))


def transformer(d: int, layers: int, vocab: int, tokens: int) -> Transformer:
    return Transformer(d, layers, vocab, tokens)


class LoRA(nn.Module):
    """A frozen linear layer and a trained product of rank r beside it."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, r, bias=False)
        self.b = nn.Linear(r, base.out_features, bias=False)  # not zero: as after some steps

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def with_lora(model: nn.Module, r: int) -> nn.Module:
    """The model with LoRA on every linear layer and all else frozen."""
    model.requires_grad_(False)
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        model.set_submodule(name, LoRA(linear, r))
    return model


class Checkpointed(nn.Module):
    """Computed once more in the backward pass, in place of keeping activations."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def checkpointed(model: nn.Module) -> nn.Module:
    """The transformer with a checkpoint around each block."""
    blocks = model.get_submodule("blocks")
    for name, block in list(blocks.named_children()):
        blocks.set_submodule(name, Checkpointed(block))
    return model


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 100)),
    )


class Residual(nn.Module):
    """Two 3x3 convolutions with GroupNorm beside a shortcut."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.GroupNorm(32, o), nn.ReLU()),
            *(nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.GroupNorm(32, o)),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or i != o:
            self.shortcut = nn.Sequential(
                nn.Conv2d(i, o, 1, stride, bias=False), nn.GroupNorm(32, o)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(*widths: int) -> nn.Module:
    """For small images: a 3x3 stem, no pooling after it, GroupNorm, two blocks of each width."""
    width = widths[0]
    layers = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(32, width), nn.ReLU()]
    for k, o in enumerate(widths):
        layers += [Residual(width, o, 2 if k else 1), Residual(o, o, 1)]
        width = o
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
    return nn.Sequential(*layers)


def resnet18() -> nn.Module:
    """ResNet-18 for 32x32 images."""
    return resnet(64, 128, 256, 512)


def text(tokens: int) -> Batches:
    """A maker of batches: random tokens and random ones to follow them."""

    def batch(size: int) -> Batch:
        x, y = torch.randint(VOCAB, (2, size, tokens))
        return x, y

    return batch


def labelled(*shape: int) -> Batches:
    """A maker of batches: random inputs of a shape and random classes."""
    return lambda size: (torch.randn(size, *shape), torch.randint(CLASSES, (size,)))


# name: (the model, batches for it)
MODELS: dict[str, tuple[Callable[[], nn.Module], Batches]] = {
    "transformer 384x6 T64": (lambda: transformer(384, 6, VOCAB, 64), text(64)),
    "transformer 384x6 T196": (lambda: transformer(384, 6, VOCAB, 196), text(196)),
    "transformer 768x2 T16": (lambda: transformer(768, 2, VOCAB, 16), text(16)),
    "MLP 6.3M": (lambda: mlp(1024, 2048, 2048, CLASSES), labelled(1024)),
    "LoRA 384x6 T64": (lambda: with_lora(transformer(384, 6, VOCAB, 64), 8), text(64)),
    "transformer 256x8 T256": (lambda: transformer(256, 8, VOCAB, 256), text(256)),
    "LoRA 256x8 T256, checkpoints": (
        lambda: checkpointed(with_lora(transformer(256, 8, VOCAB, 256), 8)),
        text(256),
    ),
    "ResNet-18 GN": (resnet18, labelled(3, 32, 32)),
    "MLP 85k": (lambda: mlp(64, 256, 256, CLASSES), labelled(64)),
    "MLP 0.7M": (lambda: mlp(256, 640, 640, 160), labelled(256)),
    "CNN 0.1M": (cnn, labelled(1, 16, 16)),
}


def make(name: str) -> tuple[nn.Module, Batches]:
    """The model of a name and the maker of its batches, the same ones every time."""
    build, batches = MODELS[name]
    return seeded(build), batches


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The same weights every time, and the same batches after them."""
    torch.manual_seed(1)  # most others put a ReLU of the ResNet within float32's rounding of 0
    return build()
