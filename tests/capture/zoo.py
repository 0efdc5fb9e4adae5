"""Small architectures of every kind, with batches and per-sample losses."""

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tests.capture.zoo_conv import IMAGES
from tests.capture.zoo_dense import DENSE
from tests.capture.zoo_entry import Entry
from tests.capture.zoo_hf import HF
from tests.capture.zoo_sequence import TEXT
from tests.capture.zoo_whole import WHOLE

PARTS = (DENSE, IMAGES, TEXT, WHOLE, HF)
ZOO: dict[str, Entry] = {name: entry for part in PARTS for name, entry in part.items()}
assert len(ZOO) == sum(map(len, PARTS)), "two entries have one name"


def make(name, shape=None, size=4, dtype=torch.float64, seed=0):
    """A model in eval and a batch of `size` samples; the values do not depend on `dtype`."""
    entry = ZOO[name]
    shape = entry.default() if shape is None else shape
    torch.manual_seed(seed)
    model = entry.build(shape)
    batch = entry.batch(size, shape)
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        model(*batch)
    with torch.no_grad():
        for module in model.modules():  # statistics as a trained model has them
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        for parameter in model.parameters():  # not the zeros and ones that some start from
            parameter.add_(0.1 * torch.randn_like(parameter))
    cast = lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf  # noqa: E731
    return model.eval().to(dtype), pytree.tree_map(cast, batch)
