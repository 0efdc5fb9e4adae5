"""Sums over tokens that make the rows of what is broadcast: biases, and weights of norms."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradsurgery.ops._backend import OPERATORS, choose
from gradsurgery.ops._inputs import DTYPES, to_device, wide

MOST = (1 << 16) - 1  # parameters in a launch
# tokens that one block of threads adds up: torch has many blocks for one sum, and takes more
LONG = 1 << 13


class Summand(NamedTuple):
    """What is summed over tokens: values, or values (factors - means) rstds. Views go."""

    values: Tensor  # [n, T, C]
    factors: Tensor | None = None  # [n, T, C]
    means: Tensor | None = None  # [n, T, C / each]
    rstds: Tensor | None = None  # [n, T, C / each]
    each: int = 1

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:4]

    @property
    def known(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors if tensor is not None]

    @property
    def dtype(self) -> torch.dtype:
        """Of the sum."""
        kind = self.values.dtype
        for tensor in self.known:
            kind = torch.promote_types(kind, tensor.dtype)
        return kind

    @property
    def layout(self) -> tuple:
        """What those of one launch have in common."""
        laid = (
            None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)
            for tensor in self.tensors
        )
        return self.each, self.values.device, *laid


def row_sums(summands: Sequence[Summand]) -> list[Tensor]:
    """Σ_t values (factors - means) rstds of each, [n, C].

    Products and sums are float32, float64 where one of the tensors is, and rounded once, to the
    widest dtype of the tensors. On a GPU those laid out alike take one launch.
    """
    if not summands:
        return []
    device = summands[0].values.device.type
    return choose("row_sums", IMPLEMENTATIONS, device)(summands)


def row_sums_reference(summands: Sequence[Summand]) -> list[Tensor]:
    return list(map(summed, summands))


def summed(summand: Summand) -> Tensor:
    """The sum of one."""
    values, factors, means, rstds, each = summand
    total = wide(values)
    if factors is not None:
        factor = wide(factors)
        if means is not None:
            factor = factor - wide(means).repeat_interleave(each, 2)
        if rstds is not None:
            factor = factor * wide(rstds).repeat_interleave(each, 2)
        total = total * factor
    return total.sum(1).to(summand.dtype)


def row_sums_triton(summands: Sequence[Summand]) -> list[Tensor]:
    found: list[Tensor | None] = [None] * len(summands)
    alike: dict[tuple, list[int]] = {}
    for k, summand in enumerate(summands):
        if _served(summand):
            alike.setdefault(summand.layout, []).append(k)
        else:
            found[k] = summed(summand)
    groups = [ks[lo : lo + MOST] for ks in alike.values() for lo in range(0, len(ks), MOST)]
    if groups:
        from gradsurgery.kernels import row_sums as kernels

        # where all is, in one copy to the device
        places = [
            [0 if tensor is None else tensor.data_ptr() for tensor in column]
            for ks in groups
            for column in zip(*(summands[k].tensors for k in ks), strict=True)
        ]
        flat = [place for line in places for place in line]
        device = summands[groups[0][0]].values.device
        tables = to_device(torch.tensor(flat, device="cpu"), device).split(
            [4 * len(ks) for ks in groups]
        )
        for ks, table in zip(groups, tables, strict=True):
            first = summands[ks[0]]
            sums = kernels.row_sums(first.tensors, first.each, first.dtype, table.view(4, -1))
            for k, total in zip(ks, sums.unbind(), strict=True):
                found[k] = total
    return [total for total in found if total is not None]


def _served(summand: Summand) -> bool:
    """Whether the kernel takes it: memory begins where 16 bytes do, and tokens are not too many."""
    values = summand.values
    return (
        values.numel() > 0
        and values.shape[1] <= LONG
        and all(tensor.dtype in DTYPES for tensor in summand.known)
        and all(tensor.data_ptr() % 16 == 0 for tensor in summand.known)
    )


IMPLEMENTATIONS = {
    ("torch", "any"): row_sums_reference,
    ("triton", "cuda"): row_sums_triton,
}
OPERATORS["row_sums"] = IMPLEMENTATIONS
