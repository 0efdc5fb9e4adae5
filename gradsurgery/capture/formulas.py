"""Formulas: for each operation in which a leaf meets samples, the gradient of the leaf by blocks.

A formula reads what autograd saved, before the backward pass frees it, and returns the `Finish`: a
function from the gradient P of the operation's output to a `Use`, or to a `Sum` that is yet to be
taken. It gets the node, which input the leaf is, the layout of P, the `axis` where P has its
samples, None where all of it belongs to one row, and the leaf's shape. None for an answer: in this
case it does not know.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradsurgery.capture.broadcast import Broadcast, Factors, Sum, blocks
from gradsurgery.capture.carriers import base_name
from gradsurgery.capture.convolution import ConvolutionUse, Geometry
from gradsurgery.capture.layout import Axis, Layout
from gradsurgery.capture.picking import flat_indices, indices_of
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.trace import Junction
from gradsurgery.capture.uses import EmbeddingUse, MatrixUse, RowsUse, Use

Shape = tuple[int, ...]
Finish = Callable[[Tensor], Use | Sum]
Formula = Callable[[Any, int, Layout, Axis | None, Shape], Finish | None]

FORMULAS: dict[str, Formula] = {}


def formula(names: str) -> Callable[[Formula], Formula]:
    """Register a formula for autograd nodes, named without their `Backward0`."""

    def register(function: Formula) -> Formula:
        FORMULAS.update(dict.fromkeys(names.split(), function))
        return function

    return register


def prepare(junction: Junction, shape: Shape) -> Finish | None:
    """What turns the output's gradient into a use of the leaf; None if no formula knows how."""
    known = FORMULAS.get(base_name(junction.node))
    if known is None or set(junction.outs) != {0}:
        return None
    # the operation keeps rows apart in the leaf, where a formula has every block over all of it:
    # right only if there is one block
    if junction.whole is not None and not junction.outs[0].constant:
        return None
    meta = junction.node._input_metadata[0]
    if meta.dtype.is_complex:
        return None
    out = tuple(meta.shape)
    layout = junction.outs[0]
    axis = layout.axis(out)
    if axis is None and not layout.constant:
        return None
    return known(junction.node, junction.k, layout, axis, shape)


def _plain(
    layout: Layout, axis: Axis | None, broadcast: Shape, shape: Shape | None = None
) -> Finish:
    """The sums of the gradient itself."""
    to = broadcast if shape is None else shape
    return Broadcast(lambda grad: grad, layout.numbers, axis, broadcast, to, Factors())


# sums and products by a broadcast tensor


@formula("Add Sub Rsub Expand Clone ToCopy")
def shift(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    name, alpha = base_name(node), getattr(node, "_saved_alpha", 1)
    scale = {"Add": (1, alpha), "Sub": (1, -alpha), "Rsub": (-alpha, 1)}.get(name, (1,))[k]
    if scale == 1:
        return _plain(layout, axis, shape)
    return Broadcast(lambda grad: scale * grad, layout.numbers, axis, shape, shape)


@formula("Mul")
def scale(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    other = node._saved_other if k == 0 else node._saved_self
    by = Factors(other) if isinstance(other, Tensor) else None
    return Broadcast(lambda grad: grad * other, layout.numbers, axis, shape, shape, by)


@formula("Div")
def divide(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    if node.name() != "DivBackward0":
        return None
    below = node._saved_other
    if k == 0:
        return Broadcast(lambda grad: grad / below, layout.numbers, axis, shape, shape)
    above = node._saved_self
    return Broadcast(lambda grad: -grad * above / below**2, layout.numbers, axis, shape, shape)


@formula("PreluKernel")
def prelu(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    if k == 0:
        return None
    x = node._saved_self
    return Broadcast(lambda grad: grad * x.clamp(max=0), layout.numbers, axis, shape, shape)


@formula("Repeat")
def repeat(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    out = tuple(node._input_metadata[0].shape)
    lead = len(out) - len(shape)
    if axis is None or axis.dim < lead or axis.inner % shape[axis.dim - lead]:
        return None

    def finish(grad: Tensor) -> Use:
        parts = blocks(grad, axis, axis.dim)
        sizes = [1] * lead + list(shape)
        sums = []
        for dim in range(parts.dim() - 2, -1, -1):  # [.., repeats, size, ..]
            parts = parts.unflatten(dim + 1, (-1, sizes[dim]))
            sums.append(dim)
        parts = parts.sum([1 + 2 * dim for dim in sums])
        return RowsUse(parts.reshape(parts.shape[0], *shape), layout.numbers)

    return finish


# norms


@formula("NativeLayerNorm")
def layer_norm(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    if k == 0:
        return None
    if k == 2:
        return _plain(layout, axis, shape)
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    by = Factors(x, mean, rstd)
    return Broadcast(
        lambda grad: _normalized(grad, x, mean, rstd), layout.numbers, axis, shape, shape, by
    )


@formula("FusedRmsNorm")
def rms_norm(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    if k == 0:
        return None
    x, rstd = node._saved_input, node._saved_result1
    by = Factors(x, None, rstd)
    return Broadcast(lambda grad: grad * (x * rstd), layout.numbers, axis, shape, shape, by)


@formula("NativeGroupNorm")
def group_norm(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    if k == 0:
        return None
    out = tuple(node._input_metadata[0].shape)
    per_channel = (*shape, *[1] * (len(out) - 2))  # [C, 1, ..]
    if k == 2:
        return _plain(layout, axis, per_channel, shape)
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    groups = mean.shape[-1]

    def normalized(grad: Tensor) -> Tensor:
        whole = x.reshape(out[0], groups, -1)
        grad = grad.reshape(whole.shape)
        return _normalized(grad, whole, mean.unsqueeze(-1), rstd.unsqueeze(-1)).view(out)

    of_group = (*mean.shape, *[1] * (len(out) - 2))
    by = Factors(x, mean.view(of_group), rstd.view(of_group), shape[0] // groups)
    return Broadcast(normalized, layout.numbers, axis, per_channel, shape, by)


@formula("NativeBatchNorm CudnnBatchNorm")
def batch_norm(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    if k == 0:
        return None
    out = tuple(node._input_metadata[0].shape)
    per_channel = (*shape, *[1] * (len(out) - 2))
    if k == 2:
        return _plain(layout, axis, per_channel, shape)
    x = node._saved_input
    if node._saved_training:
        mean, rstd = node._saved_result1, node._saved_result2
    else:
        eps = getattr(node, "_saved_eps", None) or node._saved_epsilon
        mean, rstd = node._saved_running_mean, (node._saved_running_var + eps).rsqrt()

    def normalized(grad: Tensor) -> Tensor:
        return _normalized(grad, x, mean.view(per_channel), rstd.view(per_channel))

    by = Factors(x, mean.view(per_channel), rstd.view(per_channel))
    return Broadcast(normalized, layout.numbers, axis, per_channel, shape, by)


def _normalized(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """grad (x - mean) rstd, in one temporary: fresh memory costs more than the arithmetic."""
    out = (x - mean).mul_(rstd)
    same = out.dtype == torch.promote_types(out.dtype, grad.dtype)
    return out.mul_(grad) if same else out * grad


# products with a matrix


@formula("Mm Addmm")
def matmul(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    add = base_name(node) == "Addmm"
    alpha = node._saved_alpha if add else 1
    if add and k == 0:
        beta = node._saved_beta
        if beta == 1:
            return _plain(layout, axis, shape)
        return Broadcast(lambda grad: beta * grad, layout.numbers, axis, shape, shape)
    if k == 1 + add:  # y = x W: W's gradient is x^T P, tokens in the first dimension
        if axis is not None and axis.dim != 0:
            return None
        x = node._saved_mat1 if add else node._saved_self
        return lambda grad: MatrixUse(
            blocks(x, axis), blocks(_times(alpha, grad), axis), layout.numbers, "left"
        )
    if axis is not None and axis.dim != 1:
        return None
    x = node._saved_mat2  # y = W x: P x^T, tokens in the second
    return lambda grad: MatrixUse(
        blocks(_times(alpha, grad).mT, axis), blocks(x.mT, axis), layout.numbers
    )


@formula("Bmm")
def bmm(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    if axis is not None and axis.dim != (1 if k == 1 else 2):
        return None
    if k == 1:
        x = node._saved_self
        left, right = (lambda grad: x), (lambda grad: grad)
    else:
        x = node._saved_mat2
        left, right = (lambda grad: grad.mT), (lambda grad: x.mT)
    along = None if axis is None else axis._replace(dim=1)

    def finish(grad: Tensor) -> Use:
        one, other = (blocks(side(grad), along, 1) for side in (left, right))
        return MatrixUse(one, other, layout.numbers, "left" if k == 1 else "right")

    return finish


@formula("Mv Addmv")
def mv(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    add = base_name(node) == "Addmv"
    alpha = node._saved_alpha if add else 1
    if add and k == 0:
        beta = node._saved_beta
        if beta == 1:
            return _plain(layout, axis, shape)
        return Broadcast(lambda grad: beta * grad, layout.numbers, axis, shape, shape)
    if k == add:
        if axis is not None:  # each line of the matrix is of one sample
            return None
        vector = node._saved_vec
        return lambda grad: MatrixUse(
            _times(alpha, grad)[None, None], vector[None, None], layout.numbers
        )
    x = node._saved_mat if add else node._saved_self

    def finish(grad: Tensor) -> Use:
        parts = blocks(_times(alpha, grad), axis).unsqueeze(1) @ blocks(x, axis)
        return RowsUse(parts.squeeze(1), layout.numbers)

    return finish


def _times(alpha: float, grad: Tensor) -> Tensor:
    return grad if alpha == 1 else alpha * grad


# lines picked from a parameter


@formula("Embedding")
def embedding(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    if node._saved_scale_grad_by_freq or node._saved_sparse:
        return None
    indices, padding = node._saved_indices, node._saved_padding_idx
    padding = padding - (1 << 64) if padding >= 1 << 63 else padding
    if padding < 0:
        return _picked(indices, layout, axis, shape)
    indices = torch.where(indices == padding, -1, indices)
    return _picked(indices, layout, axis, shape, padding)


@formula("Index IndexSelect")
def index(node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape) -> Finish | None:
    chosen = indices_of(node, len(shape))
    while chosen and chosen[-1] is None:
        chosen.pop()
    if not chosen or any(each is None for each in chosen):
        return None
    # lines of the parameter with its first dimensions as one
    first, rest = shape[: len(chosen)], shape[len(chosen) :]
    return _picked(flat_indices(chosen, first), layout, axis, (math.prod(first), *rest))


def _picked(
    indices: Tensor, layout: Layout, axis: Axis | None, shape: Shape, padding: int | None = None
) -> Finish | None:
    if axis is not None and axis.dim >= indices.dim():
        return None
    dim = 0 if axis is None else axis.dim

    def finish(grad: Tensor) -> Use:
        parts, where = blocks(grad, axis, dim), blocks(indices, axis, dim)
        n = parts.shape[0]
        flat = parts.reshape(n, where[0].numel(), math.prod(shape[1:]))
        return EmbeddingUse(where.reshape(n, -1), flat, layout.numbers, shape[0], padding)

    return finish


@formula("EmbeddingBag")
def embedding_bag(
    node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape
) -> Finish | None:
    mode = node._saved_mode
    if k != 0 or node._saved_scale_grad_by_freq or node._saved_sparse or mode == 2:
        return None
    if axis is not None and axis.dim != 0:
        return None
    indices, bags, sizes = node._saved_indices, node._saved_result1, node._saved_result2
    weights, padding = node._saved_per_sample_weights, node._saved_padding_idx
    padding = padding - (1 << 64) if padding >= 1 << 63 else padding
    out = tuple(node._input_metadata[0].shape)
    if len(bags) != len(indices):  # a mode whose bags were not kept
        offsets = node._saved_offsets
        positions = torch.arange(len(indices), device=offsets.device)
        bags = torch.searchsorted(offsets, positions, right=True) - 1

    def finish(grad: Tensor) -> Use:
        scale = grad.new_ones(len(indices)) if weights is None else weights.to(grad.dtype)
        if mode == 1:
            scale = scale / sizes[bags].clamp(min=1).to(grad.dtype)
        kept = torch.where(indices == padding, -1, indices) if padding >= 0 else indices
        # one block per token: bags differ in length
        of_bag = layout.elements(out)[:, 0].to(bags.device)
        grads = (grad[bags] * scale[:, None])[:, None]
        rows = RowNumbers(of_bag[bags].cpu())
        return EmbeddingUse(kept[:, None].long(), grads, rows, shape[0])

    return finish


# convolutions


@formula("Convolution")
def convolution(
    node: Any, k: int, layout: Layout, axis: Axis | None, shape: Shape
) -> Finish | None:
    if k == 0:
        return None
    per_channel = (*shape, *[1] * (len(node._input_metadata[0].shape) - 2))
    if k == 2:
        return _plain(layout, axis, per_channel, shape)
    if axis is not None and axis.dim != 0:
        return None
    x, geometry = node._saved_input, Geometry.of(node)
    return lambda grad: ConvolutionUse(
        blocks(x, axis), blocks(grad, axis), layout.numbers, shape, geometry
    )
