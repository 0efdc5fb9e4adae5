"""What kernels share with the operators that call them; nothing of Triton."""

import torch
from torch import Tensor

BUFFER = 32 << 20  # bytes of a kernel's tiles of planes on a GPU: an H200 caches 50 MiB
# Of planes of fewer values than this, bfloat16 ones would cost accuracy: each rounding is 2^-9 of a
# value, in the products of two planes some 2^-9 / sqrt(values) of the norms
SMALL = 1 << 16


def alike(*tensors: Tensor) -> list[Tensor]:
    """Tokens in one dtype: 16-bit ones as they are, if all are of one kind."""
    if all(tensor.dtype == tensors[0].dtype for tensor in tensors):
        return list(tensors)
    kinds = [torch.float32 if tensor.dtype.itemsize == 2 else tensor.dtype for tensor in tensors]
    kind = torch.float64 if torch.float64 in kinds else torch.float32
    return [tensor.to(kind) for tensor in tensors]
